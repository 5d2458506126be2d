"""A server on loopback that speaks the part of Hugging Face's HTTP API that ``snapshot_download`` uses."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class HuggingFaceServer:
    """Serves one repository at one commit; files above 1 MB are LFS files. Use as a context manager."""

    repo: str
    files: dict[str, bytes]
    cut_after: dict[str, int] = field(default_factory=dict)
    """File -> bytes after which the connection is closed; each entry is used once."""
    cut_always: int | None = None
    """Bytes after which every connection that delivers a file is closed."""
    dead_after: int | None = None
    """Cut deliveries of a file after which no more byte of it is sent."""
    cuts: Counter[str] = field(default_factory=Counter)
    silent: bool = False
    """Connections are taken, and nothing is ever said on them."""
    garbled: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and Range of each request."""

    def __enter__(self) -> HuggingFaceServer:
        owner = self

        class Handler(_Handler):
            server_state = owner

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def fetched(self) -> list[str]:
        """Files whose bytes were asked for, in order."""
        prefix = f"/{self.repo}/resolve/{COMMIT}/"
        return [path.removeprefix(prefix) for method, path, _ in self.requests if method == "GET" and prefix in path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: HuggingFaceServer

    def do_GET(self) -> None:
        state, path = self.server_state, unquote(urlsplit(self.path).path)
        state.requests.append((self.command, path, self.headers.get("Range")))
        if state.silent:
            threading.Event().wait(60)
        file = path.removeprefix(f"/{state.repo}/resolve/{COMMIT}/")
        if path in (f"/api/models/{state.repo}/revision/main", f"/api/models/{state.repo}/revision/{COMMIT}"):
            self._json({"id": state.repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in state.files]})
        elif path == f"/api/models/{state.repo}/tree/{COMMIT}":
            self._json([_entry(name, content) for name, content in state.files.items()])
        elif file in state.files:
            self._deliver(file, state.files[file])
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound" if state.repo not in path else "RevisionNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def do_HEAD(self) -> None:
        self.do_GET()

    def _json(self, body: object) -> None:
        raw = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def _deliver(self, file: str, content: bytes) -> None:
        state, etag = self.server_state, _etag(content)
        if file in state.garbled:
            content = content[:-1] + bytes([content[-1] ^ 1])
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start = int(asked[1]) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = state.cut_after.pop(file, state.cut_always)
        if limit is not None and limit < len(content) - start and state.dead_after is not None:
            state.cuts[file] += 1
            limit = limit if state.cuts[file] <= state.dead_after else 0
        self.wfile.write(content[start:] if limit is None else content[start : start + limit])
        if limit is not None:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


def _is_lfs(content: bytes) -> bool:
    return len(content) > 1_000_000


def _etag(content: bytes) -> str:
    """LFS files have their sha256, small ones git's blob id."""
    if _is_lfs(content):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(name: str, content: bytes) -> dict:
    entry = {"type": "file", "path": name, "size": len(content), "oid": _etag(content)[:40]}
    if _is_lfs(content):
        entry["lfs"] = {"oid": _etag(content), "size": len(content), "pointerSize": 134}
    return entry
