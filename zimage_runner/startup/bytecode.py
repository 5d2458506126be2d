"""Keep compiled Python where the installation has none, so that imports compile nothing.

Many containers are built with ``PYTHONDONTWRITEBYTECODE=1``, or their site-packages are read-only and were installed
without compiling. There every process compiles every module that it imports anew: more than half of the time of
``import torch``. Python's own cache of bytecode, checked against each source's time and size as always, is then kept
in a folder of the runner's cache. Where bytecode lies beside the sources, or Python will put it there, nothing changes.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import zlib
from pathlib import Path

SWITCH = "ZIMAGE_RUNNER_BYTECODE"
"""Environment variable: 0 keeps none."""


def keep_bytecode() -> Path | None:
    """Use a bytecode folder from here on, for the whole process. Its path; None where none is needed or possible."""
    if os.environ.get(SWITCH, "") == "0" or sys.pycache_prefix is not None:
        return None
    package = _package_without_bytecode()
    if package is None:
        return None
    from zimage_runner.weights.cache import cache_root

    try:
        folder = cache_root() / "bytecode" / _installation(package.parent)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours_alone(folder):
            return None
    except (OSError, RuntimeError):  # no such home, a read-only disk
        return None
    sys.pycache_prefix = str(folder)
    sys.dont_write_bytecode = False
    return folder


def _package_without_bytecode() -> Path | None:
    """torch's folder, if Python finds no bytecode of it and will not write any beside it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None or spec.cached is None or os.path.exists(spec.cached):
        return None
    package = Path(spec.origin).parent
    return package if sys.dont_write_bytecode or not os.access(package, os.W_OK) else None


def _installation(site_packages: Path) -> str:
    """Names the set of installed versions: images may give every file, of any version, the same time."""
    installed = sorted(name for name in os.listdir(site_packages) if name.endswith(".dist-info"))
    return f"{zlib.crc32('/'.join([sys.version, str(site_packages), *installed]).encode()):08x}"


def _is_ours_alone(folder: Path) -> bool:
    """What is read there is run: nobody else may write it."""
    if not hasattr(os, "getuid"):
        return os.access(folder, os.W_OK)
    status = folder.stat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK)
