"""What ``compare`` found of a copy in eight bits: kept in its manifest, or in the cache where there is no copy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zimage_runner.outputs.parsed import from_json
from zimage_runner.weights import cache
from zimage_runner.weights.prepared.prepared import BF16, MANIFEST, UnusablePrepared, is_read, read_manifest

FIELD = "likeness"
"""Of the manifest: the figures by what was drawn with, as engines.precision.likeness_key names it."""


def keep(run: Path, digest: str, key: str, found: dict[str, Any]) -> Path | None:
    """Keep figures of a run's pictures. Return the file that has them: the manifest of the copy that it drew with,
    if it did with one that was made of the weights with this digest, else one of the cache; None if neither can be
    written."""
    folder = _copy_of(run)
    manifest = _manifest(folder)
    if folder is not None and manifest is not None and manifest["source"]["digest"] == digest:
        kept = manifest.get(FIELD)
        manifest[FIELD] = (kept if isinstance(kept, dict) else {}) | {key: found}
        try:
            cache.write_json(folder / MANIFEST, manifest)
            # A copy that others may write to is not used.
            (folder / MANIFEST).chmod((folder / MANIFEST).stat().st_mode & ~cache.OTHERS_MAY_WRITE)
            return folder / MANIFEST
        except OSError:  # another user's copy: the cache is one's own
            pass
    return cache.entry_path(FIELD, key) if cache.write_entry(FIELD, key, found) else None


def known(copy: Path | None, key: str) -> dict[str, Any] | None:
    """The figures of what was drawn with the copy in this folder; None where there are none."""
    kept = (_manifest(copy) or {}).get(FIELD)
    found = kept.get(key) if isinstance(kept, dict) else None
    found = cache.read_entry(FIELD, key) if found is None else found
    return found if found is not None and _is_whole(found) else None


def of_copy(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All figures that a copy's manifest has."""
    kept = manifest.get(FIELD)
    return [found for found in kept.values() if _is_whole(found)] if isinstance(kept, dict) else []


def _copy_of(run: Path) -> Path | None:
    """Where the weights were that a run drew with; None where its summary does not say."""
    try:
        return Path(from_json((run / "summary.json").read_text(encoding="utf-8"))["session"]["weights"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _manifest(folder: Path | None) -> dict[str, Any] | None:
    """Of a copy in eight bits; None of anything else."""
    if folder is None or not (folder / MANIFEST).is_file():
        return None
    try:
        manifest = read_manifest(folder)
    except UnusablePrepared:
        return None
    return manifest if is_read(manifest) and manifest.get("precision", BF16) != BF16 else None


def _is_whole(found: Any) -> bool:
    """Whether figures are numbers in the places where a summary looks for them."""
    try:
        numbers = [found["likeness"][measure][kind] for measure in ("psnr", "flip") for kind in ("mean", "worst")]
        numbers += [found["pictures"], found["floor"]["psnr"]["mean"] if "floor" in found else 0]
        is_named = isinstance(found.get("numerics", {}), dict)
        return is_named and all(isinstance(number, int | float) and not math.isnan(number) for number in numbers)
    except (AttributeError, KeyError, TypeError):
        return False
