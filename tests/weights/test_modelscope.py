"""model.source=modelscope with the real client against a ModelScope-speaking server on loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from modelscope_hub.config import set_default_config

from tests.support.modelscope_server import ModelScopeServer, files_of
from zimage_runner import logs
from zimage_runner.errors import UserError
from zimage_runner.model import FileModel, Model, Source, Variant
from zimage_runner.weights.find.resolve import EMBEDDED, download, resolve, resolve_without_network

REPO = "some-maker/Z-Image-0.1"
EXTRA_FILES = {"README.md": b"# a model card", "assets/teaser.png": b"\x89PNG", "transformer/old.bin": b"\x80\x04."}
"""What repositories also hold and a run does not need."""
SHARD = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModelScopeServer]:
    files = files_of(EMBEDDED) | EXTRA_FILES
    scheduler = json.loads(files["scheduler/scheduler_config.json"]) | {"shift": 6.0}
    other = files | {"scheduler/scheduler_config.json": json.dumps(scheduler).encode()}
    with ModelScopeServer(REPO, {"master": files, "v1.0": other}) as running:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", running.endpoint)
        monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "modelscope_home"))
        set_default_config(None)  # the client remembers the endpoint of the test before
        yield running


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model(name="z", source=Source.modelscope, repo=REPO, cache_dir=str(tmp_path / "hub"))


def test_downloads_what_is_needed_and_nothing_else(server: ModelScopeServer, model: Model, tmp_path: Path) -> None:
    checkpoint = resolve(model)
    assert files_of(checkpoint.path) == files_of(EMBEDDED)
    assert tmp_path / "hub" in checkpoint.path.parents
    assert checkpoint.revision == "master"
    assert not set(server.fetched()) & set(EXTRA_FILES)
    assert os.environ["MODELSCOPE_CACHE"] == os.environ["HF_HOME"] == str(tmp_path / "hub")


def test_digest_is_that_of_the_files(server: ModelScopeServer, model: Model) -> None:
    assert resolve(model).digest == resolve(Model(name="n", source=Source.embedded)).digest


def test_second_start_asks_nothing(server: ModelScopeServer, model: Model) -> None:
    first = resolve(model)
    server.requests.clear()
    assert resolve(model) == first
    assert server.requests == []


def test_second_start_does_not_import_the_client(server: ModelScopeServer, model: Model) -> None:
    first = resolve(model)
    code = (
        "import sys; from zimage_runner.model import *; from zimage_runner.weights.find.resolve import resolve\n"
        f"m = Model(name='z', source=Source.modelscope, repo={REPO!r}, cache_dir={model.cache_dir!r})\n"
        "print(resolve(m).digest); assert not {'modelscope', 'modelscope_hub', 'torch'} & set(sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, encoding="utf-8").strip() == first.digest


def test_revision_is_pinned(server: ModelScopeServer, model: Model) -> None:
    model.revision = "v1.0"
    pinned = resolve(model)
    assert json.loads((pinned.path / "scheduler/scheduler_config.json").read_text(encoding="utf-8"))["shift"] == 6.0
    assert pinned.revision == "v1.0"
    assert {request.revision for request in server.requests if REPO in request.path} == {"v1.0"}
    model.revision = None
    assert resolve(model).digest != pinned.digest


def test_connection_cut_midway_is_resumed_with_range(server: ModelScopeServer, model: Model) -> None:
    server.cut_after[SHARD] = 5_000_000
    assert files_of(resolve(model).path) == files_of(EMBEDDED)
    ranges = [request.range for request in server.requests if request.file == SHARD]
    assert ranges == [None, "bytes=5000000-"]


def test_the_client_writes_json_where_stderr_is_json(
    server: ModelScopeServer, model: Model, capfd: pytest.CaptureFixture[str]
) -> None:
    server.cut_after[SHARD] = 5_000_000
    logs.use_format(logs.LogFormat.json)
    try:
        resolve(model)
    finally:
        logs.use_format(logs.LogFormat.text)
    told = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["level"] for line in told] == ["info", "warning"]
    assert told[0]["message"].startswith("Downloading ")
    assert SHARD in told[1]["message"]


def wait_for_part(folder: Path) -> None:
    """Until some of the shard is on disk: sent is not yet written."""
    until = time.monotonic() + 60
    name, part = Path(SHARD).name, Path(SHARD).parts[0]  # the decoder's file has the same name
    while not any(path.stat().st_size for path in folder.rglob(f"*{name}*") if path.is_file() and part in path.parts):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_killed_download_leaves_nothing_half_made_and_resumes(server: ModelScopeServer, model: Model) -> None:
    server.stall_after[SHARD] = 7_000_000
    code = (
        "from zimage_runner.model import *; from zimage_runner.weights.find.resolve import resolve\n"
        f"resolve(Model(name='z', source=Source.modelscope, repo={REPO!r}, cache_dir={model.cache_dir!r}))"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert server.stalled.wait(60)
    wait_for_part(Path(model.cache_dir or ""))
    child.send_signal(signal.SIGKILL)
    child.wait(60)
    model.offline = True
    with pytest.raises(UserError, match=r"incomplete: .*diffusion_pytorch_model.safetensors .*is missing"):
        resolve(model)
    model.offline = False
    server.requests.clear()
    assert files_of(resolve(model).path) == files_of(EMBEDDED)
    resumed = [request.range for request in server.requests if request.file == SHARD]
    assert len(resumed) == 1
    assert resumed[0] is not None


def test_checksum_mismatch_is_refused(server: ModelScopeServer, model: Model) -> None:
    server.garbled.add(SHARD)
    with pytest.raises(UserError, match=rf"cannot download {REPO} from ModelScope: .*{SHARD}.*[Hh]ash") as error:
        resolve(model)
    assert "\n" not in str(error.value)
    assert not list(Path(str(model.cache_dir)).rglob("diffusion_pytorch_model.safetensors"))[1:]  # the VAE's at most
    server.garbled.clear()
    assert files_of(resolve(model).path) == files_of(EMBEDDED)


def test_unknown_repository_and_revision(server: ModelScopeServer, model: Model) -> None:
    model.revision = "v9"
    with pytest.raises(UserError, match=f"cannot download {REPO} at revision v9 from ModelScope: .*not found"):
        resolve(model)


def test_unreachable_hub(model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "modelscope_home"))
    set_default_config(None)
    monkeypatch.setattr("modelscope_hub._legacy_api.REPO_TREE_PAGE_MAX_ATTEMPTS", 1)
    with pytest.raises(UserError, match=f"cannot download {REPO} from ModelScope: .*Connection failed"):
        resolve(model)


def test_offline_after_download_touches_no_network(server: ModelScopeServer, model: Model, runner_cache: Path) -> None:
    first = resolve(model)
    server.requests.clear()
    model.offline = True
    assert resolve(model) == first
    for entry in runner_cache.rglob("*.json"):  # nothing remembered: the client itself looks, offline
        entry.unlink()
    assert resolve(model) == first
    assert server.requests == []


def test_offline_without_download_says_where_it_looked(server: ModelScopeServer, model: Model) -> None:
    model.offline = True
    with pytest.raises(UserError, match=r"model\.offline=true") as error:
        resolve(model)
    assert REPO in str(error.value)
    assert str(model.cache_dir) in str(error.value)
    assert server.requests == []


def test_offline_with_a_missing_file_names_it(server: ModelScopeServer, model: Model) -> None:
    path = resolve(model).path
    (path / "text_encoder/model.safetensors").unlink()
    server.requests.clear()
    model.offline = True
    with pytest.raises(UserError, match=r"text_encoder/model\.safetensors .*is missing") as error:
        resolve(model)
    assert str(path) in str(error.value)
    assert server.requests == []
    model.offline = False
    resolve(model)
    assert server.fetched() == ["text_encoder/model.safetensors"]


def test_truncated_file_is_fetched_again(server: ModelScopeServer, model: Model) -> None:
    path = resolve(model).path
    os.truncate(path / SHARD, 1_000_000)
    resolve(model)
    assert files_of(path) == files_of(EMBEDDED)


def test_altered_file_is_found_and_download_repairs_it(server: ModelScopeServer, model: Model) -> None:
    path = resolve(model).path
    raw = bytearray((path / SHARD).read_bytes())
    raw[-1000] ^= 1
    (path / SHARD).write_bytes(raw)
    with pytest.raises(UserError, match=rf"{SHARD} was altered: .*prepare download"):
        resolve(model)
    download(model)
    assert files_of(resolve(model).path) == files_of(EMBEDDED)


def test_complete_cache_is_never_written(server: ModelScopeServer, model: Model, runner_cache: Path) -> None:
    """It may be a read-only mount: neither a start nor the client's own first look at it changes anything."""
    path = resolve(model).path
    before = {p: p.stat().st_mtime_ns for p in Path(str(model.cache_dir)).rglob("*")}
    server.requests.clear()
    resolve(model)
    for entry in runner_cache.rglob("*.json"):
        entry.unlink()
    resolve(model)
    assert {p: p.stat().st_mtime_ns for p in Path(str(model.cache_dir)).rglob("*")} == before
    assert server.requests == []
    assert path.is_dir()


def test_a_file_is_completed_without_downloading_what_it_replaces(
    server: ModelScopeServer, model: Model, tmp_path: Path
) -> None:
    file = shutil.copy(EMBEDDED / SHARD, tmp_path / "mine.safetensors")
    part = FileModel(
        name="file", source=Source.modelscope, repo=REPO, cache_dir=model.cache_dir, path=str(file),
        variant=Variant.base,
    )  # fmt: skip
    assert resolve_without_network(part) is None
    first = resolve(part)
    assert "vae/diffusion_pytorch_model.safetensors" in server.fetched()
    assert SHARD not in server.fetched()
    assert first.revision == first.digest[:12]
    server.requests.clear()
    part.offline = True
    assert resolve(part) == resolve_without_network(part) == first
    assert server.requests == []
    assert files_of(resolve(model).path) == files_of(EMBEDDED)  # later the whole is completed
    assert {request.file for request in server.requests if request.file.endswith("safetensors")} == {SHARD}


def test_what_is_missing_offline_is_named(server: ModelScopeServer, model: Model, tmp_path: Path) -> None:
    file = shutil.copy(EMBEDDED / SHARD, tmp_path / "mine.safetensors")
    model.vae, model.path, model.offline = str(EMBEDDED / "vae"), str(file), True
    told = (
        "has the transformer, model.vae=.* has the vae, and not text_encoder, tokenizer, scheduler: model.offline=true"
    )
    with pytest.raises(UserError, match=f"{told} and {REPO} is not in ModelScope's cache"):
        resolve(model)
