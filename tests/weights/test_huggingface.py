"""model.source=huggingface with the real client, in processes of its own, against a server on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.huggingface_server import COMMIT, HuggingFaceServer
from tests.support.modelscope_server import files_of
from zimage_runner.weights.find.resolve import EMBEDDED

REPO = "some-maker/Z-Image"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
SCRIPT = """
import json, os, sys, time
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))  # the client waits whole seconds before it asks once more
from zimage_runner.errors import UserError
from zimage_runner.model import Model, Source
from zimage_runner.weights.find.resolve import resolve
options = json.loads(sys.argv[1])
try:
    checkpoint = resolve(Model(name="z", source=Source.huggingface, repo="some-maker/Z-Image", **options))
except UserError as error:
    print(json.dumps({"error": str(error)}))
else:
    facts = {"path": str(checkpoint.path), "revision": checkpoint.revision, "home": os.environ.get("HF_HOME")}
    print(json.dumps({**facts, "client": "huggingface_hub" in sys.modules, "torch": "torch" in sys.modules}))
"""


@pytest.fixture
def server() -> Iterator[HuggingFaceServer]:
    with HuggingFaceServer(REPO, files_of(EMBEDDED) | {"README.md": b"# card", "teaser.png": b"\x89PNG"}) as running:
        yield running


def resolve(server: HuggingFaceServer, variables: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
    environment = os.environ | {"HF_ENDPOINT": server.endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"} | (variables or {})
    command = [sys.executable, "-c", SCRIPT, json.dumps(options)]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=60, encoding="utf-8"
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_downloads_what_is_needed_then_asks_nothing(server: HuggingFaceServer, tmp_path: Path) -> None:
    cache = str(tmp_path / "hub")
    first = resolve(server, cache_dir=cache)
    assert files_of(Path(first["path"])) == files_of(EMBEDDED)
    assert first["revision"] == COMMIT
    assert first["home"] == cache
    assert not {"README.md", "teaser.png"} & set(server.fetched())
    server.requests.clear()
    second = resolve(server, cache_dir=cache)
    assert second["path"] == first["path"]
    assert (second["client"], second["torch"]) == (False, False)
    assert server.requests == []


def test_cut_connection_is_tried_again(server: HuggingFaceServer, tmp_path: Path) -> None:
    server.cut_after[WEIGHTS] = 5_000_000
    result = resolve(server, cache_dir=str(tmp_path / "hub"))
    assert files_of(Path(result["path"])) == files_of(EMBEDDED)
    assert server.fetched().count(WEIGHTS) == 2


def test_altered_delivery_is_refused(server: HuggingFaceServer, tmp_path: Path) -> None:
    server.garbled.add(WEIGHTS)
    error = resolve(server, cache_dir=str(tmp_path / "hub"))["error"]
    assert f"{WEIGHTS} was altered" in error
    assert "of the hub" in error


def test_offline(server: HuggingFaceServer, tmp_path: Path, runner_cache: Path) -> None:
    cache = str(tmp_path / "hub")
    error = resolve(server, cache_dir=cache, offline=True)["error"]
    assert f"{REPO} is not in Hugging Face's cache {cache}" in error
    path = Path(resolve(server, cache_dir=cache)["path"])
    server.requests.clear()
    assert resolve(server, cache_dir=cache, offline=True)["path"] == str(path)
    for entry in runner_cache.rglob("*.json"):
        entry.unlink()
    assert resolve(server, cache_dir=cache, offline=True)["path"] == str(path)
    (path / WEIGHTS).unlink()
    error = resolve(server, cache_dir=cache, offline=True)["error"]
    assert f"{path} is incomplete: {WEIGHTS}" in error
    assert server.requests == []


def test_unknown_revision(server: HuggingFaceServer, tmp_path: Path) -> None:
    error = resolve(server, cache_dir=str(tmp_path / "hub"), revision="v9")["error"]
    assert error.startswith(f"cannot download {REPO} at revision v9 from Hugging Face: ")
    assert "\n" not in error


def test_a_server_that_cuts_every_answer(server: HuggingFaceServer, tmp_path: Path) -> None:
    """N1 and A11: one line where nothing more comes at all; the next start goes on there and leaves nothing behind."""
    cache = tmp_path / "hub"
    server.cut_always = 3_000_000
    server.dead_after = 4
    error = resolve(server, cache_dir=str(cache))["error"]
    assert error.startswith(f"cannot download {REPO} from Hugging Face: ")
    assert error.endswith(": the next start goes on from there")
    assert "\n" not in error
    partial = max(cache.rglob("*.incomplete"), key=lambda path: path.stat().st_size)
    kept = partial.stat().st_size
    assert kept >= 3_000_000 - (64 << 10), "one delivery, without the block that the client had not whole"
    server.cut_always, server.dead_after = None, None
    server.requests.clear()
    assert files_of(Path(resolve(server, cache_dir=str(cache))["path"])) == files_of(EMBEDDED)
    assert f"bytes={kept}-" in [asked for method, _, asked in server.requests if method == "GET"]
    assert list(cache.rglob("*.incomplete")) == []


def test_a_process_killed_within_a_download_leaves_what_the_next_completes(
    server: HuggingFaceServer, tmp_path: Path
) -> None:
    cache = tmp_path / "hub"
    sha256 = hashlib.sha256(server.files[WEIGHTS]).hexdigest()
    folder = cache / "hub" / "models--some-maker--Z-Image" / "blobs"
    folder.mkdir(parents=True)
    (folder / f"{sha256}.partial.incomplete").write_bytes(server.files[WEIGHTS][:20_000_000])
    path = Path(resolve(server, cache_dir=str(cache))["path"])
    assert files_of(path) == files_of(EMBEDDED)
    assert "bytes=20000000-" in [asked for _, path, asked in server.requests if path.endswith(WEIGHTS)]


def test_bytes_kept_of_other_content_are_not_used(server: HuggingFaceServer, tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    sha256 = hashlib.sha256(server.files[WEIGHTS]).hexdigest()
    folder = cache / "hub" / "models--some-maker--Z-Image" / "blobs"
    folder.mkdir(parents=True)
    (folder / f"{sha256}.partial.incomplete").write_bytes(bytes(1_000_000))
    assert f"{WEIGHTS}: other bytes arrived than the hub" in resolve(server, cache_dir=str(cache))["error"]
    assert files_of(Path(resolve(server, cache_dir=str(cache))["path"])) == files_of(EMBEDDED)


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        pytest.param({"ALL_PROXY": "socks5://127.0.0.1:1"}, r"ALL_PROXY=socks5://127\.0\.0\.1:1", id="N3"),
        pytest.param({"HF_TOKEN": "hf_café一"}, r"^HF_TOKEN, .* holds letters that no token has", id="N5"),
        pytest.param({"HF_ENDPOINT": "http://127.0.0.1:1"}, r"^cannot download .*: the next start", id="nobody there"),
    ],
)
def test_environments_that_cannot_download(
    server: HuggingFaceServer, tmp_path: Path, variables: dict[str, str], text: str
) -> None:
    error = resolve(server, variables, cache_dir=str(tmp_path / "hub"))["error"]
    assert re.search(text, error), error
    assert "\n" not in error


def test_a_silent_hub_is_given_up(server: HuggingFaceServer, tmp_path: Path) -> None:
    """N2: seconds, not for ever; the limits are those that the user's variables give, else ours."""
    server.silent = True
    limits = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    began = time.monotonic()
    error = resolve(server, limits, cache_dir=str(tmp_path / "hub"))["error"]
    assert error.startswith(f"cannot download {REPO} from Hugging Face: ")
    assert time.monotonic() - began < 45
