"""Loading: every method gives the file's bits; what needs no GPU of the CUDA path; reading ahead without torch."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.fake_cuda import FakeEvent, FakeStream
from zimage_runner.weights import load
from zimage_runner.weights.find.layout import inspect
from zimage_runner.weights.find.resolve import EMBEDDED
from zimage_runner.weights.load import choose_method, load_tensors
from zimage_runner.weights.preload import page_cache as prefetch
from zimage_runner.weights.safetensors_file import read_header

FILES = [
    EMBEDDED / "text_encoder/model.safetensors",
    EMBEDDED / "transformer/diffusion_pytorch_model.safetensors",
    EMBEDDED / "vae/diffusion_pytorch_model.safetensors",
]


def same(ours: dict[str, torch.Tensor], *paths: Path) -> bool:
    theirs = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_mapped_tensors_are_the_files(sharded: Path) -> None:
    shards = [file.path for file in inspect(sharded).weights["transformer"]]
    assert same(load_tensors(shards), *shards)


@pytest.mark.parametrize(("method", "device"), [("mmap", "cuda"), ("staged", "cpu"), ("x", "cpu")])
def test_methods_name_their_device(method: str, device: str) -> None:
    with pytest.raises(ValueError, match=f"method='{method}' does not load to {device}"):
        load_tensors(FILES, device, method)


def test_choice_of_method(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_method("cpu") == "mmap"
    monkeypatch.setattr(load, "has_prefetch", lambda: True)
    assert choose_method("cuda") == "prefetch"
    monkeypatch.setattr(load, "has_prefetch", lambda: False)
    assert choose_method("cuda:1") == "staged"


@pytest.mark.parametrize(
    ("version", "expected"), [("0.8.0", False), ("0.9.0rc1", True), ("0.10.2", True), ("1.0", True)]
)
def test_prefetch_is_detected(monkeypatch: pytest.MonkeyPatch, version: str, expected: bool) -> None:
    import safetensors

    class Opener:
        prefetch = None

    monkeypatch.setattr(safetensors, "safe_open", Opener)
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    assert load.has_prefetch() == expected


def test_failing_prefetch_falls_back(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    tried: list[str] = []

    def attempt(paths: Any, device: str, method: str) -> dict[str, torch.Tensor]:
        tried.append(method)
        if method == "prefetch":
            raise RuntimeError("no CUDA runtime is loaded in this process")
        return {}

    monkeypatch.setattr(load, "has_prefetch", lambda: True)
    monkeypatch.setattr(load, "_load", attempt)
    assert load_tensors(FILES, "cuda") == {}
    assert tried == ["prefetch", "staged"]
    assert "no CUDA runtime" in caplog.text


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The staged loader with CUDA's streams replaced, so that its bookkeeping runs on the CPU."""
    from zimage_runner.weights import load as module

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **options: empty(*args, **options))
    monkeypatch.setattr(module, "PIECE", 1_000_003)
    return module


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_staged_pieces_add_up(staged: Any, path: Path) -> None:
    assert same(staged.load_staged([read_header(path)], "cpu", 3), path)


def test_an_interruption_ends_the_reading(staged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the main thread waits for the readers: they do not read the rest of the file first."""
    begun, read_on, pieces = threading.Event(), threading.Event(), []
    read, join = staged.read_exactly, threading.Thread.join

    def slow(*args: Any) -> None:
        pieces.append(args)
        begun.set()
        read_on.wait()
        read(*args)

    def interrupted(thread: threading.Thread, timeout: float | None = None) -> None:
        monkeypatch.setattr(threading.Thread, "join", join)
        begun.wait()
        threading.Timer(0.05, read_on.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(staged, "read_exactly", slow)
    monkeypatch.setattr(threading.Thread, "join", interrupted)
    file = max(map(read_header, FILES), key=lambda file: file.size)
    with pytest.raises(KeyboardInterrupt):
        staged.load_staged([file], "cpu", 1)
    assert not [thread for thread in threading.enumerate() if thread.name == "load-weights"]
    assert len(pieces) == 1 < file.size // staged.PIECE


def test_staged_tensors_are_aligned_views(staged: Any, tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3), "b": torch.randn(64, 64), "c": torch.randn(5).bfloat16(), "d": torch.tensor(1.5)}
    save_file(tensors, tmp_path / "x.safetensors")
    loaded = staged.load_staged([read_header(tmp_path / "x.safetensors")], "cpu", 2)
    assert same(loaded, tmp_path / "x.safetensors")
    assert all(tensor.data_ptr() % 16 == 0 for tensor in loaded.values())


def test_staged_reports_a_file_that_shrinks(staged: Any, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1000)}, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    os.truncate(tmp_path / "x.safetensors", header.data_start + 100)
    with pytest.raises(OSError, match=f"ended at byte {header.data_start + 100}"):
        staged.load_staged([header], "cpu", 2)


def test_read_ahead_reads_what_is_not_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(os.urandom(50_000_000))
    with path.open("rb") as file:
        os.fdatasync(file.fileno())  # what is not on the disk stays in memory
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    first = prefetch.read_ahead([path])
    assert first is not None
    first.wait()
    assert first.bytes_read + first.bytes_cached == 50_000_000
    again = prefetch.read_ahead([path])
    assert again is not None
    again.wait()
    assert (again.bytes_read, again.bytes_cached) == (0, 50_000_000)


def test_read_ahead_of_more_than_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "available_memory", lambda: 1_000_000)
    assert prefetch.read_ahead(FILES) is None


def test_available_memory_is_plausible() -> None:
    memory = prefetch.available_memory()
    assert memory is not None
    assert 50_000_000 < memory < 10**14


def test_prefetching_imports_no_torch() -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from zimage_runner.weights.preload.page_cache import CudaContext, read_ahead\n"
        f"read_ahead([Path({str(FILES[0])!r})]).wait(); context = CudaContext(); seconds = context.wait()\n"
        "assert (seconds is None) == (context.error is not None); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["prefetch", "staged"])
def test_every_method_gives_the_same_bits_on_the_gpu(method: str) -> None:
    if method == "prefetch" and not load.has_prefetch():
        pytest.skip("safetensors older than 0.9")
    for path in FILES:
        loaded = {name: tensor.cpu() for name, tensor in load_tensors([path], "cuda", method).items()}
        assert same(loaded, path)


@pytest.mark.gpu
def test_context_is_the_one_that_torch_uses() -> None:
    context = prefetch.CudaContext()
    assert context.wait() is not None, context.error
    assert torch.ones(2, device="cuda").sum().item() == 2
