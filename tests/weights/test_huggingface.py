"""model.source=huggingface with the real client, in processes of its own, against a server on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_server import COMMIT, HuggingFaceServer
from modelscope_server import files_of

from zimage_runner.weights.find.resolve import EMBEDDED

REPO = "some-maker/Z-Image"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
SCRIPT = """
import json, os, sys
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


def resolve(server: HuggingFaceServer, **options: Any) -> dict[str, Any]:
    environment = os.environ | {"HF_ENDPOINT": server.endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(options)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
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
