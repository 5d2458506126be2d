"""The files that a finished picture started from, found again by what its record says of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Set
from typing import Any

from zimage_runner.errors import UserError, one_line
from zimage_runner.model import EMBEDDED_CONTROLNET, EMBEDDED_CONTROLNET_FILE, Convention
from zimage_runner.outputs.digest import sha256_of
from zimage_runner.sampling import PICTURE_FIELDS, PICTURE_FILES


def recorded_values(
    record: object, picture: str, replaced: frozenset[str] = frozenset(), moved: Set[str] = frozenset()
) -> dict[str, Any]:
    """Return values for ``sampling.PICTURE_FIELDS`` of what ``Inputs.record`` said, read from a file of anybody's.

    ``replaced``: fields that are given anew, and left out here. ``moved``: fields whose files need not be there, since
    what is said of them here gives way. Raises UserError if another file is gone or another one now.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"{picture}: what its metadata says of the pictures it started from cannot be read")
    found: dict[str, Any] = {}
    for name, value in record.items():
        if name not in PICTURE_FIELDS or name in replaced:
            continue
        if name in PICTURE_FILES:
            found[name] = _file(value, name, picture, moved=name in moved)
        else:
            found[name] = ",".join(map(str, value)) if isinstance(value, list) else value
    neutral = _neutral({*found, *replaced})
    return {name: value for name, value in neutral.items() if name not in replaced} | found


def recorded_controlnet(record: object, picture: str) -> tuple[str, Convention]:
    """Return the path and the convention of the ControlNet that a picture was drawn with. Raises UserError."""
    said = record.get("controlnet") if isinstance(record, Mapping) else None
    if not isinstance(said, Mapping) or not isinstance(said.get("path"), str):
        raise UserError(f"{picture}: its metadata says of no ControlNet: name one with model.controlnet=FILE")
    if said.get("convention") not in Convention.__members__:
        raise UserError(f"{picture}: what its metadata says of its ControlNet cannot be read")
    path = said["path"]
    if os.path.basename(path) == EMBEDDED_CONTROLNET_FILE:  # wherever this package was installed when it drew
        path = EMBEDDED_CONTROLNET
    elif not os.path.exists(path):
        raise UserError(
            f"{picture}: drawn with the ControlNet {one_line(path, 200)}, which is not there: "
            "model.controlnet=FILE says where it is now"
        )
    return path, Convention[said["convention"]]


def _neutral(said: set[str]) -> dict[str, Any]:
    """What is left out of a record because it is neutral, where something else holds if nothing is said."""
    return {
        **({"strength": 1.0, "tile": 0} if "image" in said else {}),
        **({"mask_blur": 0} if said & {"mask", "outpaint"} else {}),
        **({"variation": 1.0} if "variation_seed" in said else {}),
    }


def _file(said: Any, name: str, picture: str, *, moved: bool) -> str:
    if not isinstance(said, Mapping) or not all(isinstance(said.get(key), str) for key in ("path", "digest")):
        raise UserError(f"{picture}: what its metadata says of its {name} cannot be read")
    path, digest = said["path"], said["digest"]
    if moved or (there := _sha256(path)) == digest:
        return path
    what = "has changed since" if there else "is not there"
    raise UserError(
        f"{picture}: drawn from {name} {one_line(path, 200)} (sha256 {one_line(digest, 13)}), which {what}: "
        f"sampling.{name}=FILE says where it is now"
    )


def _sha256(path: str) -> str:
    """Digest of a plain file; empty where there is none."""
    try:
        return sha256_of(path) if os.path.isfile(path) else ""
    except OSError:
        return ""
