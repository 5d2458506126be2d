"""sha256 of weights: on first use, remembered, never written beside the weights."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import edit_json
from zimage_runner.errors import UserError
from zimage_runner.model import Model, Source, Verify
from zimage_runner.weights.find import verify
from zimage_runner.weights.find.layout import inspect
from zimage_runner.weights.find.resolve import check_digests, resolve

WEIGHTS = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(nano: Path) -> Model:
    return Model(name="l", source=Source.local, path=str(nano))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose bytes were hashed in full."""
    names: list[str] = []
    original = verify.sha256_of

    def counting(path: Path, *args: Any) -> str:
        names.append(path.name)
        return original(path, *args)

    monkeypatch.setattr(verify, "sha256_of", counting)
    return names


def flip_unsampled_byte(path: Path, keep_mtime: bool) -> None:
    """Change one byte that the cheap digest need not see; optionally as a failing disk would, without a trace."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(-100_000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    if keep_mtime:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_hashed_once(model: Model, nano: Path, hashed: list[str]) -> None:
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in nano.rglob("*")}
    resolve(model)
    assert len(hashed) == 3
    resolve(model)
    assert len(hashed) == 3
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in nano.rglob("*")} == before


def test_only_the_touched_file_is_hashed_again(model: Model, nano: Path, hashed: list[str]) -> None:
    resolve(model)
    hashed.clear()
    os.utime(nano / WEIGHTS)
    resolve(model)
    assert hashed == [Path(WEIGHTS).name]


def test_altered_file_is_refused_until_accepted(model: Model, nano: Path) -> None:
    resolve(model)
    flip_unsampled_byte(nano / WEIGHTS, keep_mtime=False)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{WEIGHTS} was altered: .* of its first use on .*: copy nano again"):
            resolve(model)
    verify.forget([nano / WEIGHTS])
    resolve(model)


def test_a_change_is_seen_though_its_mtime_was_put_back(model: Model, nano: Path) -> None:
    """A5."""
    resolve(model)
    flip_unsampled_byte(nano / WEIGHTS, keep_mtime=True)
    with pytest.raises(UserError, match=rf"{WEIGHTS} was altered"):
        resolve(model)


def test_silent_corruption_is_found_on_request(model: Model, nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "file_state", lambda path: {"size": path.stat().st_size})
    resolve(model)
    flip_unsampled_byte(nano / WEIGHTS, keep_mtime=True)
    resolve(model)  # as a failing disk changes it, without a trace: not looked at
    model.verify = Verify.always
    with pytest.raises(UserError, match=rf"{WEIGHTS} was altered"):
        resolve(model)


def test_restored_file_is_good_again(model: Model, nano: Path) -> None:
    good = (nano / WEIGHTS).read_bytes()
    resolve(model)
    flip_unsampled_byte(nano / WEIGHTS, keep_mtime=False)
    with pytest.raises(UserError, match="altered"):
        resolve(model)
    (nano / WEIGHTS).write_bytes(good)
    resolve(model)


def test_headers_only(model: Model, nano: Path, hashed: list[str]) -> None:
    model.verify = Verify.headers
    resolve(model)
    assert hashed == []
    os.truncate(nano / WEIGHTS, 100_000)
    with pytest.raises(UserError, match="truncated"):
        resolve(model)


def test_always_looks_at_everything_that_is_read(model: Model, nano: Path, hashed: list[str]) -> None:
    model.verify = Verify.always
    resolve(model)
    resolve(model)
    everything = [*inspect(nano).weight_paths, *inspect(nano).config_files]
    assert sorted(hashed) == sorted(path.name for path in everything * 2)
    with (nano / "tokenizer/tokenizer_config.json").open("a", encoding="utf-8") as file:
        file.write(" ")
    with pytest.raises(UserError, match=r"tokenizer_config\.json was altered"):
        resolve(model)


def test_a_hubs_small_files_are_checked_too(nano: Path) -> None:
    """A5: an edited config in a hub's cache draws other pictures; in a folder of one's own it may be on purpose."""
    hub = Model(name="z", source=Source.modelscope, repo="a/b")
    check_digests(hub, inspect(nano))
    edit_json(nano / "scheduler/scheduler_config.json", shift=6.0)
    with pytest.raises(UserError, match=r"scheduler_config\.json was altered.*repair it with .*prepare download"):
        check_digests(hub, inspect(nano))


def test_the_embedded_model_is_what_its_list_says(
    nano: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A5."""
    embedded = Model(name="n", source=Source.embedded)
    resolve(embedded)
    assert len(hashed) == 11
    resolve(embedded)
    assert len(hashed) == 11
    monkeypatch.setattr("zimage_runner.weights.find.resolve.EMBEDDED", nano)
    resolve(embedded)
    flip_unsampled_byte(nano / WEIGHTS, keep_mtime=True)
    with pytest.raises(UserError, match=rf"{WEIGHTS} was altered: reinstall zimage-runner"):
        resolve(embedded)


@pytest.mark.parametrize("size", [0, 1, 2**23, 2**23 + 5])
def test_sha256_of_any_size(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "x").write_bytes(content)
    told: list[int] = []
    assert verify.sha256_of(tmp_path / "x", told.append) == hashlib.sha256(content).hexdigest()
    assert sum(told) == size


def test_large_files_show_progress(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(verify, "LARGE", 1000)
    with caplog.at_level("INFO"):
        resolve(model)
    assert "computing sha256 of 3 files (0.0 GB)" in caplog.text


def test_hub_blob_names_are_expected_digests(tmp_path: Path) -> None:
    content = b"weights"
    sha256 = hashlib.sha256(content).hexdigest()
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / sha256).write_bytes(content)
    link = tmp_path / "model.safetensors"
    link.symlink_to(blobs / sha256)
    (digest,) = verify.file_digests([link])
    assert (digest.sha256, digest.expected, digest.is_altered) == (sha256, sha256, False)
    (blobs / sha256).write_bytes(b"veights")
    (digest,) = verify.file_digests([link])
    assert digest.is_altered
    assert digest.expected_from == "the hub"


def test_cache_that_cannot_be_written(
    model: Model, runner_cache: Path, hashed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    runner_cache.write_text("a file where the folder should be", encoding="utf-8")
    resolve(model)
    assert hashed == []  # else every start would hash everything
    assert "cannot be written, so sha256 of the weights is not checked" in caplog.text
    model.verify = Verify.always
    resolve(model)
    assert len(hashed) == 11


def test_damaged_cache_entries_are_ignored(model: Model, runner_cache: Path, hashed: list[str]) -> None:
    resolve(model)
    for number, entry in enumerate(runner_cache.rglob("*.json")):
        entry.write_text(["", "[]", '{"key": 1}'][number % 3], encoding="utf-8")
    hashed.clear()
    resolve(model)
    assert len(hashed) == 3
