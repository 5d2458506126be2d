"""Parameters inside the PNG: the ``parameters`` text that image tools read, and JSON that reproduces the picture."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any, BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from zimage_runner.errors import UserError
from zimage_runner.outputs.json_text import compact_json

JSON_KEY = "zimage_runner"
TEXT_KEY = "parameters"


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a PNG says about itself."""

    parameters: str | None
    """Prompt, ``Negative prompt:`` and ``Steps: ..`` lines, as written by most image generators."""
    recipe: dict[str, Any] | None
    """This project's own chunk: everything needed to make the picture again."""


def png_info(recipe: dict[str, Any]) -> PngInfo:
    """Text chunks for a picture; text outside Latin-1 becomes an iTXt chunk. ``recipe`` is writer.WriteRequest's."""
    info = PngInfo()
    # A PNG text chunk may hold neither NUL nor text that is not valid Unicode; the JSON chunk keeps both, escaped.
    text = parameters_text(recipe).replace("\0", "").encode("utf-8", "replace").decode("utf-8")
    info.add_text(TEXT_KEY, text)
    info.add_text(JSON_KEY, compact_json(recipe))
    return info


def parameters_text(recipe: dict[str, Any]) -> str:
    """The convention of AUTOMATIC1111's web UI, which ComfyUI's and most galleries' readers understand."""
    params = recipe.get("params", {})
    lines = [recipe.get("prompt", "")]
    if params.get("negative_prompt"):
        lines.append(f"Negative prompt: {params['negative_prompt']}")
    fields = {
        "Steps": params.get("num_inference_steps"),
        "Sampler": recipe.get("sampler", "Euler"),
        "Schedule type": "Simple",
        "CFG scale": params.get("guidance_scale"),
        "Seed": recipe.get("seed"),
        "Size": f"{params['width']}x{params['height']}" if "width" in params else None,
        "Model hash": str(recipe.get("model", {}).get("digest") or "")[:10] or None,
        "Model": recipe.get("model", {}).get("name"),
        "Version": f"zimage_runner {recipe.get('versions', {}).get('zimage_runner', '')}".strip(),
    }
    lines.append(", ".join(f"{k}: {_quoted(v)}" for k, v in fields.items() if v is not None))
    return "\n".join(lines)


def _quoted(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:\n"') else text


def read_metadata(path: str | os.PathLike[str] | BinaryIO) -> Metadata:
    """The metadata of a PNG file, named or open. Raises UserError if the file is missing or no PNG."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # text chunks may follow the pixels
            text: dict[str, str] = dict(getattr(image, "text", {}))
    except (OSError, SyntaxError, ValueError) as error:
        name = path if isinstance(path, str | os.PathLike) else path.name
        raise UserError(f"{name} cannot be read as a PNG picture ({error})") from None
    try:
        recipe = json.loads(text[JSON_KEY]) if JSON_KEY in text else None
    except ValueError:
        recipe = None
    return Metadata(text.get(TEXT_KEY), recipe if isinstance(recipe, dict) else None)
