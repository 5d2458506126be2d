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

TYPE_CHECKING = False
if TYPE_CHECKING:  # every command calls this, and few find something to do
    from pathlib import Path


def keep_bytecode(*, warns: bool = True) -> Path | None:
    """Use a bytecode folder from here on, for the whole process. Returns it; None where none is needed or possible.

    ``warns``: say in a line that the folder is not used because others could write to it.
    """
    if sys.pycache_prefix is not None or not hasattr(os, "getuid"):
        return None
    package = _package_without_bytecode()
    if package is None:
        return None
    from pathlib import Path

    from zimage_runner.weights.cache import code_folder, make_trusted_folder

    try:
        folder = code_folder("bytecode") / _installation(Path(package).parent)
    except (OSError, RuntimeError):  # no such home
        return None
    if not make_trusted_folder(folder):
        if warns and folder.is_dir():
            _warn(folder)
        return None
    # Python will look for this path by its name. It may: see trusted_folder.
    sys.pycache_prefix = str(folder)
    sys.dont_write_bytecode = False
    return folder


def _package_without_bytecode() -> str | None:
    """torch's folder, if Python finds no bytecode of it and will not write any beside it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None or spec.cached is None or os.path.exists(spec.cached):
        return None
    package = os.path.dirname(spec.origin)
    return package if sys.dont_write_bytecode or not os.access(package, os.W_OK) else None


def _installation(site_packages: Path) -> str:
    """Names the set of installed versions: images may give every file, of any version, the same time."""
    import zlib

    installed = sorted(name for name in os.listdir(site_packages) if name.endswith(".dist-info"))
    return f"{zlib.crc32('/'.join([sys.version, str(site_packages), *installed]).encode()):08x}"


def _warn(folder: Path) -> None:
    from zimage_runner.logs import say

    say(
        f"zimage_runner: no bytecode is kept in {folder}, so this starts slower: other users can write to it or to a "
        "folder above it; set ZIMAGE_RUNNER_CACHE to a folder that only you can write to"
    )
