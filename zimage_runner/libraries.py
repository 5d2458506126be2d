"""torch's shared libraries, opened beside the imports that come before it.

``import torch`` begins with one call of the dynamic linker that relocates its libraries and runs what registers their
operators, 0.2 s of computing (torch 2.13 without CUDA), and holds the interpreter's lock meanwhile, as ``ctypes.CDLL``
does. ``dlopen`` itself, called as a foreign function, holds none: a thread may open them while others import modules.

The linker serves one caller at a time. An extension module that is imported meanwhile would wait for torch's libraries,
and hold the interpreter's lock while it does; so those that the runner needs are imported before.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

log = logging.getLogger(__name__)

LIBRARIES = "ZIMAGE_RUNNER_LIBRARIES"
"""Environment variable: 1 opens torch's libraries early, ``cudnn`` those that cuDNN opens when it is first used too."""
EXTENSIONS = (
    "_bisect", "_blake2", "_bz2", "_csv", "_datetime", "_decimal", "_hashlib", "_heapq", "_json", "_lzma", "_opcode",
    "_queue", "_random", "_sha512", "_socket", "_statistics", "_struct", "_typing", "_uuid", "array", "binascii",
    "fcntl", "math", "select", "unicodedata", "zlib", "tokenizers", "PIL._imaging", "yaml",
)  # fmt: skip
"""What the runner imports that may come as a shared library; Pythons differ in what is built in."""
CUDNN_PARTS = ("graph", "ops", "heuristic", "engines_runtime_compiled", "engines_precompiled", "cnn")
"""libcudnn_<part>.so (NVIDIA's cuDNN 9 documentation, "Library structure")."""


def open_early() -> threading.Thread | None:
    """Begin, where that is switched on; the thread that does it. What fails is left for ``import torch`` to tell."""
    switch = os.environ.get(LIBRARIES, "")
    if switch in ("", "0") or "torch" in sys.modules or not sys.platform.startswith("linux"):
        return None
    folder = torch_libraries()
    if folder is None:
        return None
    for name in EXTENSIONS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    thread = threading.Thread(target=_open_all, args=(folder, switch == "cudnn"), name="libraries", daemon=True)
    thread.start()
    return thread


def torch_libraries() -> Path | None:
    """The folder of torch's shared libraries, without importing it."""
    spec = importlib.util.find_spec("torch")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return next((Path(folder) / "lib" for folder in folders if (Path(folder) / "lib").is_dir()), None)


def _open_all(folder: Path, cudnn: bool) -> None:
    # In the order and with the flags of torch's own import, which then finds them open.
    if not open_library(folder / "libtorch_global_deps.so", os.RTLD_NOW | os.RTLD_GLOBAL):
        return  # torch's import looks elsewhere for what this one needs, and opens that first
    open_library(folder / "libtorch.so", os.RTLD_NOW)
    if cudnn:
        for path in cudnn_parts(Path("/proc/self/maps").read_text().splitlines()):
            open_library(path, os.RTLD_NOW)


def open_library(path: Path, flags: int) -> bool:
    """``dlopen`` without holding the interpreter's lock; whether it worked. It stays open."""
    if not path.is_file():
        return False
    dlopen = ctypes.CDLL(None).dlopen
    dlopen.argtypes, dlopen.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
    is_open = dlopen(os.fsencode(path), flags) is not None
    log.debug("libraries: %s %s", path.name, "is open" if is_open else "could not be opened")
    return is_open


def cudnn_parts(maps: Iterable[str]) -> list[Path]:
    """Files of cuDNN's parts beside the libcudnn that a process has mapped; ``maps`` are lines of /proc/self/maps."""
    for line in maps:
        path = Path(line.split(maxsplit=5)[-1])
        if path.name.startswith("libcudnn.so"):
            version = path.name.removeprefix("libcudnn")
            return [path.with_name(f"libcudnn_{part}{version}") for part in CUDNN_PARTS]
    return []
