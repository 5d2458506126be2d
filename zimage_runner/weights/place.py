"""Where the runner's cache is, as text: for a command that imports next to nothing (resident/client.py)."""

from __future__ import annotations

import os


def cache_place() -> str:
    """``ZIMAGE_RUNNER_CACHE``, or a folder in the user's cache; without a home, one among the temporary files."""
    own = os.environ.get("ZIMAGE_RUNNER_CACHE")
    if own:
        return os.path.expanduser(own)
    caches = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if caches.startswith("~"):  # nobody knows this user
        import tempfile

        return os.path.join(tempfile.gettempdir(), f"zimage_runner-{os.getuid()}")
    return os.path.join(caches, "zimage_runner")


def own_folder(kind: str) -> str:
    """This user's own folder in the cache for ``kind``: a whole path."""
    return os.path.abspath(os.path.join(cache_place(), f"{kind}-{os.getuid()}"))
