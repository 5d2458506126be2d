"""torch's shared libraries, opened in the background while the command line composes its config.

Most of the time of ``import torch._C`` is the dynamic linker's: half a gigabyte of libtorch, and CUDA's libraries
before it. Importing them holds the interpreter's lock for all of it; here a thread calls ``dlopen`` without that
lock, on the same files, with the same flags and in the same order as ``torch/__init__.py``, so that the import later
finds them open. libtorch_python, which uses the interpreter while it is opened, is left to the import.

Anything unexpected is left to the import too, which then does, and reports, what it always does.
"""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

PLAIN_IMPORT = "ZIMAGE_RUNNER_PLAIN_IMPORT"
"""Environment variable: 1 makes every import of torch a plain one."""

VERIFIED = ("2.11.", "2.13.")
"""Versions of torch whose import was read, line by line. Any other is imported plainly."""

CUDA_LIBRARIES = (
    ("cublas", "libcublasLt.so.*[0-9]"),
    ("cublas", "libcublas.so.*[0-9]"),
    ("cudnn", "libcudnn.so.*[0-9]"),
    ("cuda_nvrtc", "libnvrtc.so.*[0-9]"),
    ("cuda_nvrtc", "libnvrtc-builtins.so.*[0-9]"),
    ("cuda_runtime", "libcudart.so.*[0-9]"),
    ("cuda_cupti", "libcupti.so.*[0-9]"),
    ("cufft", "libcufft.so.*[0-9]"),
    ("curand", "libcurand.so.*[0-9]"),
    ("nvjitlink", "libnvJitLink.so.*[0-9]"),
    ("cusparse", "libcusparse.so.*[0-9]"),
    ("cusparselt", "libcusparseLt.so.*[0-9]"),
    ("cusolver", "libcusolver.so.*[0-9]"),
    ("nccl", "libnccl.so.*[0-9]"),
    ("nvshmem", "libnvshmem_host.so.*[0-9]"),
    ("cufile", "libcufile.so.*[0-9]"),
    ("nvtx", "libnvToolsExt.so.*[0-9]"),
)
"""Folder and file of what torch opens before libtorch where libtorch_global_deps brought CUDA's runtime."""

Open = Callable[[str, int], bool]
"""(file, flags) -> whether ``dlopen`` succeeded."""

_loading: threading.Thread | None = None


def spin_little() -> None:
    """Threads that wait for work must not spin for long: on a machine that is busy with anything else, OpenMP's default
    made the embedded model twenty times slower. This little keeps the speed of an idle one. Both variables are read
    when the library is opened; the user's own settings stand."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def begin() -> None:
    """Start opening them. Does nothing where torch is imported already or that is not known to be the same.

    What torch reads from the environment at this point has to be settled: ``PYTORCH_ALLOC_CONF`` and OpenMP's.
    """
    global _loading
    if _loading is not None or "torch" in sys.modules or sys.platform != "linux" or _is_switched_off():
        return
    package = _torch_directory()
    if package is None or not _version(package).startswith(VERIFIED):
        return
    spin_little()
    _loading = threading.Thread(target=_load, args=(package,), name="torch-libraries", daemon=True)
    _loading.start()


def is_loading() -> bool:
    """Whether the linker is at work: a process that ends now had better not wait for it."""
    return _loading is not None and _loading.is_alive()


def wait() -> None:
    """Return when ``import torch`` will find them open, or at once if they were never asked for.

    Without this the import would wait inside ``dlopen``, and every other thread for the interpreter's lock.
    """
    if _loading is not None:
        _loading.join()


def _is_switched_off() -> bool:
    return os.environ.get(PLAIN_IMPORT, "") not in ("", "0") or "TORCH_USE_RTLD_GLOBAL" in os.environ


def _torch_directory() -> Path | None:
    spec = importlib.util.find_spec("torch")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _version(package: Path) -> str:
    return _assigned(package, "__version__") or ""


def _assigned(package: Path, name: str) -> str | None:
    """A string of torch/version.py, which would import torch."""
    try:
        text = (package / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(rf"^{name}\s*(?::[^=]*)?=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return found and found[1]


def _load(package: Path) -> None:
    try:
        open_libraries(package, sys.path, _dlopen())
    except (OSError, AttributeError, ValueError):
        return


def open_libraries(package: Path, search_path: Sequence[str], open_library: Open) -> None:
    """What ``_load_global_deps`` of torch/__init__.py opens, then libtorch; ends at the first that cannot be opened."""
    if not open_library(str(package / "lib" / "libtorch_global_deps.so"), os.RTLD_NOW | os.RTLD_GLOBAL):
        return
    if "libcudart.so" in Path("/proc/self/maps").read_text(errors="replace"):
        for path in _cuda_libraries(search_path, _assigned(package, "cuda")):
            if not open_library(path, os.RTLD_NOW):
                break  # torch ends its list there and goes on with libtorch, too
    open_library(str(package / "lib" / "libtorch.so"), os.RTLD_NOW)


def _cuda_libraries(search_path: Sequence[str], cuda_version: str | None) -> Iterator[str]:
    for folder, name in CUDA_LIBRARIES:
        found = next((path for root in search_path for path in _candidates(root, folder, name, cuda_version)), None)
        if found is None:
            return
        yield found


def _candidates(root: str, folder: str, name: str, cuda_version: str | None) -> list[str]:
    paths = glob.glob(os.path.join(root, "nvidia", folder, "lib", name))
    if cuda_version is not None:
        paths += glob.glob(os.path.join(root, "nvidia", f"cu{cuda_version.split('.')[0]}", "lib", name))
    return paths + glob.glob(os.path.join(root, folder, "lib", name))


def _dlopen() -> Open:
    """``dlopen`` as a function of the C library: called through ctypes it leaves the interpreter's lock to others."""
    function = ctypes.CDLL(None).dlopen
    function.argtypes, function.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
    return lambda path, flags: function(os.fsencode(path), flags) is not None
