"""GPU readings against an allocator whose figures are known."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from zimage_runner.memory import readings as monitor

GB = 10**9


class Allocator:
    """torch.cuda of a 10 GB GPU on which other processes hold 2 GB."""

    def __init__(self) -> None:
        self.allocated = self.peak = 0
        self.reserved = 0
        self.fraction = 1.0

    def hold(self, size: int) -> None:
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        self.reserved = max(self.reserved, self.allocated)

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def memory_stats(self) -> dict[str, int]:
        return {
            "allocated_bytes.all.current": self.allocated,
            "allocated_bytes.all.peak": self.peak,
            "reserved_bytes.all.current": self.reserved,
            "reserved_bytes.all.peak": self.reserved,
        }

    def mem_get_info(self) -> tuple[int, int]:
        return 8 * GB - self.reserved, 10 * GB

    def memory_allocated(self) -> int:
        return self.allocated

    def memory_reserved(self) -> int:
        return self.reserved

    def max_memory_allocated(self) -> int:
        return self.peak

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.allocated

    def get_per_process_memory_fraction(self) -> float:
        return self.fraction


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    allocator = Allocator()
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=allocator))
    monkeypatch.setattr(monitor, "_peaks_before_reset", {"peak_allocated_gb": 0.0, "peak_reserved_gb": 0.0})
    return allocator


def test_readings(gpu):
    gpu.hold(3 * GB)
    gpu.hold(-1 * GB)
    assert monitor.gpu_memory() == {
        "allocated_gb": 2.0,
        "reserved_gb": 3.0,
        "peak_allocated_gb": 3.0,
        "peak_reserved_gb": 3.0,
    }
    # 8 GB that others leave, less what is allocated; the cache counts as free.
    assert monitor.free_gpu_bytes() == 6 * GB
    gpu.fraction = 0.5
    assert monitor.free_gpu_bytes() == 3 * GB


def draw(gpu: Allocator, size: int) -> None:
    gpu.hold(size)
    gpu.hold(-size)


@pytest.mark.parametrize(("picture", "fit"), [(1 * GB, 5), (4 * GB, 1), (6 * GB, 1), (GB // 100, 16)])
def test_as_many_pictures_as_fit_into_what_is_free(gpu, picture, fit):
    gpu.hold(2 * GB)  # the model
    draw(gpu, 7 * GB)  # while loading
    memory = monitor.BatchMemory()
    draw(gpu, picture)
    assert memory.pictures_that_fit(16) == fit  # 6 GB x 0.85 / picture
    assert monitor.gpu_memory()["peak_allocated_gb"] == 9.0, "measuring one batch hid the run's peak"


def test_without_a_gpu(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert monitor.gpu_memory() == {}
    assert monitor.free_gpu_bytes() == 0
    assert monitor.BatchMemory().pictures_that_fit(16) == 1
    assert monitor.peak_host_gb() > 0.01


def test_while_another_thread_imports_torch(tmp_path, monkeypatch):
    """As in a resident process on a machine with a GPU: there torch has no torch.cuda yet."""
    (tmp_path / "torch.py").write_text("import probe\nprobe.seen()\nfrom types import SimpleNamespace as cuda\n")
    seen = []
    probe = SimpleNamespace(seen=lambda: seen.append((monitor.gpu_memory(), monitor.forget_peaks())))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "probe", probe)
    before = sys.modules.pop("torch", None)
    try:
        import torch  # noqa: F401
    finally:
        sys.modules.pop("torch", None)
        if before is not None:
            sys.modules["torch"] = before
    assert seen == [({}, None)]


def test_versions_name_what_decides_pixels():
    assert {"zimage_runner", "python", "torch", "diffusers", "transformers", "numpy", "pillow"} <= set(
        monitor.versions()
    )
