"""The runner's own cache folder: file digests, resolved hub paths and prepared checkpoints. Never a model folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from zimage_runner.outputs.beneath import NotPlain, unfit_target

log = logging.getLogger(__name__)


def cache_root() -> Path:
    """``$ZIMAGE_RUNNER_CACHE``, else ``$XDG_CACHE_HOME/zimage_runner``, else ``~/.cache/zimage_runner``."""
    own = os.environ.get("ZIMAGE_RUNNER_CACHE")
    if own:
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg).expanduser() if xdg else Path.home() / ".cache") / "zimage_runner"


def is_writable() -> bool:
    """Whether entries can be kept; makes the folder."""
    try:
        cache_root().mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(cache_root(), os.W_OK)


def read_entry(kind: str, key: str) -> dict[str, Any] | None:
    """The entry stored under ``key``, or None; a damaged entry counts as none."""
    path = _entry_path(kind, key)
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("ignoring damaged cache entry %s: %s", path, error)
        return None
    return entry if isinstance(entry, dict) and entry.get("key") == key else None


def write_entry(kind: str, key: str, values: dict[str, Any]) -> bool:
    """Store ``values`` under ``key``, atomically. False where the cache cannot be written (it is only a cache)."""
    try:
        write_json(_entry_path(kind, key), {"key": key, **values})
    except OSError as error:
        log.warning("cannot write the runner's cache: %s (set ZIMAGE_RUNNER_CACHE to a writable folder)", error)
        return False
    return True


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that readers see the old one or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        if (kind := unfit_target(path)) is not None:
            raise NotPlain(str(path), kind)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _entry_path(kind: str, key: str) -> Path:
    return cache_root() / kind / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
