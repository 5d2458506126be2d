"""sha256 of weights: on first use, remembered, never written beside the weights."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from zimage_runner.errors import UserError
from zimage_runner.model import Model, Source, Verify
from zimage_runner.weights.find import verify
from zimage_runner.weights.find.resolve import resolve

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


def test_silent_corruption_is_found_on_request(model: Model, nano: Path) -> None:
    resolve(model)
    flip_unsampled_byte(nano / WEIGHTS, keep_mtime=True)
    resolve(model)  # size, mtime and inode are the same: not looked at
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


def test_embedded_model_is_not_hashed(hashed: list[str]) -> None:
    resolve(Model(name="n", source=Source.embedded))
    assert hashed == []


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
    runner_cache.write_text("a file where the folder should be")
    resolve(model)
    assert hashed == []  # else every start would hash everything
    assert "cannot be written, so sha256 of the weights is not checked" in caplog.text
    model.verify = Verify.always
    resolve(model)
    assert len(hashed) == 3


def test_damaged_cache_entries_are_ignored(model: Model, runner_cache: Path, hashed: list[str]) -> None:
    resolve(model)
    for number, entry in enumerate(runner_cache.rglob("*.json")):
        entry.write_text(["", "[]", '{"key": 1}'][number % 3])
    hashed.clear()
    resolve(model)
    assert len(hashed) == 3
