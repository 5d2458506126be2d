"""A component's folder whose weights lie in a file elsewhere, in another layout or precision.

The folder holds config.json, as every component's does, and ``source.json`` with the file's path instead of weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_runner.errors import UserError, one_line
from zimage_runner.outputs.parsed import from_json

if TYPE_CHECKING:
    from zimage_runner.weights.formats.checkpoint_file import Component

SOURCE = "source.json"
_REMEDY = "delete {}, and it is made again"


def source_file(folder: Path) -> Path | None:
    """The file that holds the weights of a component's folder; None where they lie in the folder itself."""
    if not (folder / SOURCE).is_file():
        return None
    content = _json(folder / SOURCE)
    if not isinstance(content.get("file"), str):
        raise UserError(f"{folder / SOURCE} names no file: {_REMEDY.format(folder.parent)}")
    return Path(content["file"])


def source_component(folder: Path) -> Component | None:
    """The component itself; None where its weights lie in the folder. Raises UserError, as open_checkpoint_file does.

    ``folder`` is named as its component is.
    """
    file = source_file(folder)
    if file is None:
        return None
    from zimage_runner.weights.formats.checkpoint_file import open_component

    return open_component(file, folder.name, _json(folder / "config.json"))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = from_json(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = one_line(str(error), 100)
        raise UserError(f"{path} cannot be read ({reason}): {_REMEDY.format(path.parent.parent)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: {_REMEDY.format(path.parent.parent)}")
    return content
