"""torch's libraries opened early: without the interpreter's lock, found open by its import, no reason to fail."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from zimage_runner import libraries
from zimage_runner.libraries import CUDNN_PARTS, LIBRARIES, cudnn_parts, open_early, open_library, torch_libraries

IMPORT = """
import sys
from zimage_runner.libraries import open_early
thread = open_early()
thread.join()
assert "torch" not in sys.modules
mapped = open("/proc/self/maps").read()
assert "libtorch_cpu" in mapped and "libtorch_python" not in mapped
from zimage_runner.torch_import import import_torch_lean
torch = import_torch_lean()
assert "torch._dynamo" not in sys.modules
assert torch.arange(4.0).view(2, 2).mm(torch.eye(2)).sum().item() == 6
assert open_early() is None
print("drawn")
"""
WAITS = """
#include <fcntl.h>
#include <unistd.h>
#include <stdlib.h>
int late = 1;
__attribute__((constructor)) static void wait_for_file(void) {
    close(open(getenv("BEGUN"), O_CREAT | O_WRONLY, 0600));
    for (int i = 0; i < 3000 && late; i++) { late = access(getenv("WAITED_FOR"), F_OK); usleep(1000); }
}
"""


@pytest.mark.parametrize("switch", ["1", "cudnn"])
def test_torchs_import_finds_them_open(switch: str) -> None:
    environment = os.environ | {LIBRARIES: switch}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "drawn\n"), done.stderr


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_others_run_python_while_a_library_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, library, file = tmp_path / "waits.c", tmp_path / "waits.so", tmp_path / "file"
    source.write_text(WAITS)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    monkeypatch.setenv("WAITED_FOR", str(file))
    monkeypatch.setenv("BEGUN", str(tmp_path / "begun"))
    thread = threading.Thread(target=open_library, args=(library, os.RTLD_NOW))
    thread.start()
    while not (tmp_path / "begun").exists():
        time.sleep(0.001)
    file.touch()  # with the interpreter's lock held, not before the library has given up
    thread.join()
    assert ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "late").value == 0


def test_what_cannot_be_opened_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("no library")
    assert not open_library(tmp_path / "text.so", os.RTLD_NOW)
    assert not open_library(tmp_path / "missing.so", os.RTLD_NOW)


@pytest.mark.parametrize("opens", [True, False])
def test_what_torch_finds_elsewhere_is_left_to_its_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opens: bool
) -> None:
    """Its import opens CUDA's libraries from other folders where libtorch_global_deps.so does not find them."""
    tried: list[str] = []
    monkeypatch.setattr(libraries, "open_library", lambda path, flags: tried.append(path.name) or opens)
    libraries._open_all(tmp_path, cudnn=False)
    assert tried == ["libtorch_global_deps.so", "libtorch.so"][: 2 if opens else 1]


@pytest.mark.parametrize("switch", [None, "", "0"])
def test_it_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch, switch: str | None) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.delenv(LIBRARIES, raising=False)
    if switch is not None:
        monkeypatch.setenv(LIBRARIES, switch)
    assert open_early() is None


def test_without_torch_there_is_nothing_to_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zimage_runner.libraries.importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setenv(LIBRARIES, "1")
    assert torch_libraries() is None
    assert open_early() is None


def test_cudnns_parts_lie_beside_it() -> None:
    maps = [
        "7f00-7f01 r--p 00000000 00:01 7    /opt/lib/libcublas.so.12",
        "7f01-7f02 rw-p 00000000 00:00 0 ",
        "7f02-7f03 r-xp 00001000 00:01 8    /opt/with space/libcudnn.so.9",
        "7f03-7f04 r--p 00000000 00:01 9    /opt/with space/libcudnn_graph.so.9",
    ]
    assert cudnn_parts(maps) == [Path(f"/opt/with space/libcudnn_{part}.so.9") for part in CUDNN_PARTS]
    assert cudnn_parts(maps[:2]) == cudnn_parts([]) == []
