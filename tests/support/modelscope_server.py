"""A server on loopback that speaks the part of ModelScope's HTTP API that ``snapshot_download`` uses.

``GET /api/v1/models/<repo>/repo/files?Revision=`` lists files with size and sha256;
``GET /api/v1/models/<repo>/repo?Revision=&FilePath=`` delivers one, honouring Range. Faults can be ordered per file.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit


@dataclass
class Request:
    """One request as the server saw it."""

    method: str
    path: str
    """URL path without the query."""
    file: str
    """FilePath, or "" for a listing."""
    revision: str
    range: str | None


@dataclass
class ModelScopeServer:
    """Serves ``revisions`` of one repository; use as a context manager."""

    repo: str
    revisions: dict[str, dict[str, bytes]]
    cut_after: dict[str, int] = field(default_factory=dict)
    """File -> bytes after which the connection is closed; each entry is used once."""
    stall_after: dict[str, int] = field(default_factory=dict)
    """File -> bytes after which nothing more comes until the client goes away; each entry is used once."""
    garbled: set[str] = field(default_factory=set)
    """Files delivered with one byte changed, though the listing has the true sha256."""
    requests: list[Request] = field(default_factory=list)
    stalled: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> ModelScopeServer:
        owner = self

        class Handler(_Handler):
            server_state = owner

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def fetched(self) -> list[str]:
        """Files asked for, in order."""
        return [request.file for request in self.requests if request.file]


DOCUMENTS = ("MODEL_CARD.md", "NOTICES", "SHA256SUMS")
"""They lie beside the embedded model and are no part of a checkpoint."""


def files_of(directory: Path) -> dict[str, bytes]:
    files = [p for p in sorted(directory.rglob("*")) if p.is_file() and p.name not in DOCUMENTS]
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in files}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: ModelScopeServer

    def do_GET(self) -> None:
        state = self.server_state
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        revision, file = query.get("Revision", "master"), query.get("FilePath", "")
        state.requests.append(Request(self.command, url.path, file, revision, self.headers.get("Range")))
        files = state.revisions.get(revision)
        if not url.path.startswith(f"/api/v1/models/{state.repo}/repo") or files is None:
            self._json(404, {"Code": 10010205001, "Success": False, "Message": "not found"})
        elif url.path.endswith("/repo/files"):
            self._json(200, {"Code": 200, "Success": True, "Data": {"Files": _listing(files, query.get("Root"))}})
        elif file not in files:
            self._json(404, {"Code": 10010205001, "Success": False, "Message": "no such file"})
        else:
            self._deliver(file, files[file])

    def do_HEAD(self) -> None:
        self.do_GET()

    def _json(self, status: int, body: dict) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def _deliver(self, file: str, content: bytes) -> None:
        state = self.server_state
        if file in state.garbled:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start = int(asked[1]) if asked else 0
        end = int(asked[2]) + 1 if asked and asked[2] else len(content)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(end - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.end_headers()
        body = content[start:end]
        cut, stall = state.cut_after.pop(file, None), state.stall_after.pop(file, None)
        limit = cut if cut is not None else stall
        try:
            self.wfile.write(body if limit is None else body[:limit])
            if stall is not None:
                self.wfile.flush()
                state.stalled.set()
                self.connection.recv(1)  # returns when the client has gone
        except OSError:
            pass  # the client went away, which some tests make it do
        if limit is not None:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


def _listing(files: dict[str, bytes], root: str | None) -> list[dict]:
    names = [name for name in files if not root or name.startswith(f"{root}/")]
    folders = sorted({name.rpartition("/")[0] for name in names} - {""})
    trees = [{"Path": folder, "Name": folder, "Type": "tree", "Size": 0} for folder in folders]
    blobs = [
        {
            "Path": name,
            "Name": name.rpartition("/")[2],
            "Type": "blob",
            "Size": len(files[name]),
            "Sha256": hashlib.sha256(files[name]).hexdigest(),
        }
        for name in names
    ]
    return trees + blobs
