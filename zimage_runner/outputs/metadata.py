"""Parameters inside a picture: the ``parameters`` text that image tools read, and JSON to draw it again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from zimage_runner.errors import UserError, error_text, one_line
from zimage_runner.outputs.json_text import compact_json
from zimage_runner.outputs.parsed import from_json

JSON_KEY = "zimage_runner"
TEXT_KEY = "parameters"
COMFYUI_KEY = "prompt"
READABLE = ("PNG", "JPEG", "WEBP")
"""Pillow's names of the formats that are read; of other files nothing is parsed."""
IMAGE_DESCRIPTION, EXIF_POINTER, USER_COMMENT = 0x010E, 0x8769, 0x9286
"""Where image tools look for generation parameters in files that have no text chunks (EXIF 2.32, 4.6.3 to 4.6.5)."""
CAMERA_MODEL = 0x0110
"""Where ComfyUI puts its graph in such files."""
UNICODE, ASCII = b"UNICODE\0", b"ASCII\0\0\0"
SHAPES = {"prompt": str, "seed": int, "params": dict, "model": dict, "numerics": dict}
"""What a recipe holds at least."""
EXIF_ROOM = 60_000
"""Bytes of text that fit into a JPEG's EXIF data, which holds 64 kB."""


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a picture says about itself."""

    parameters: str | None
    """Prompt, ``Negative prompt:`` and ``Steps: ..`` lines, as written by most image generators."""
    recipe: dict[str, Any] | None
    """This project's own chunk: everything needed to make the picture again."""
    comfyui: str | None = None
    """ComfyUI's graph of the picture, as JSON."""


def png_info(said: Metadata) -> PngInfo:
    """Return text chunks for a PNG; text outside Latin-1 becomes an iTXt chunk."""
    info = PngInfo()
    # A PNG text chunk may hold neither NUL nor text that is not valid Unicode; the JSON chunk keeps both, escaped.
    if said.parameters is not None:
        info.add_text(TEXT_KEY, said.parameters.replace("\0", "").encode("utf-8", "replace").decode("utf-8"))
    if said.recipe is not None:
        info.add_text(JSON_KEY, compact_json(said.recipe))
    return info


def exif(said: Metadata | None) -> Image.Exif:
    """Return EXIF data for formats without text chunks: the text as user comment, the JSON as image description.

    JPEG has room for 64 kB: the comment is cut where the JSON leaves less, and JSON that is longer is left out.
    """
    data = Image.Exif()
    if said is None:
        return data
    room = EXIF_ROOM
    if said.recipe is not None and len(text := f"{JSON_KEY}:{compact_json(said.recipe)}") < room:
        data[IMAGE_DESCRIPTION] = text
        room -= len(text)
    if said.parameters:
        comment = said.parameters.encode("utf-16-be", "replace")[: room // 2 * 2]
        data.get_ifd(EXIF_POINTER)[USER_COMMENT] = UNICODE + comment
    return data


def parameters_text(recipe: dict[str, Any]) -> str:
    """The convention of AUTOMATIC1111's web UI, which ComfyUI's and most galleries' readers understand."""
    params = recipe.get("params", {})
    loras = recipe.get("loras", [])
    inputs = recipe.get("inputs", {})
    # Civitai takes an adapter's weight from the tag and finds the adapter by its hash.
    lines = [" ".join([recipe.get("prompt", ""), *(f"<lora:{lora['name']}:{lora['weight']:g}>" for lora in loras)])]
    if params.get("negative_prompt"):
        lines.append(f"Negative prompt: {params['negative_prompt']}")
    fields = {
        "Steps": params.get("num_inference_steps"),
        "Sampler": recipe.get("sampler", "Euler"),
        "Schedule type": "Simple",
        "CFG scale": params.get("guidance_scale"),
        "Seed": recipe.get("seed"),
        "Size": f"{params['width']}x{params['height']}" if "width" in params else None,
        "Denoising strength": inputs.get("strength", 1) if "image" in inputs else None,
        "Mask blur": inputs.get("mask_blur", 0) if "mask" in inputs else None,
        "ControlNet 0": _control_unit(inputs) if "control_image" in inputs else None,
        "Model hash": str(recipe.get("model", {}).get("digest") or "")[:10] or None,
        "Model": recipe.get("model", {}).get("name"),
        "Lora hashes": ", ".join(f"{lora['name']}: {lora['hash']}" for lora in loras) or None,
        "Version": f"zimage_runner {recipe.get('versions', {}).get('zimage_runner', '')}".strip(),
    }
    lines.append(", ".join(f"{k}: {_quoted(v)}" for k, v in fields.items() if v is not None))
    return "\n".join(lines)


def _control_unit(inputs: dict[str, Any]) -> str:
    """As sd-webui-controlnet writes one of its units. Its own hash of the model is left out."""
    path = str(inputs.get("controlnet", {}).get("path", ""))
    unit = {
        "Module": inputs.get("control_preprocess", "none"),
        "Model": os.path.basename(path).removesuffix(".safetensors"),
        "Weight": inputs.get("control_scale"),
        "Guidance Start": inputs.get("control_start", 0),
        "Guidance End": inputs.get("control_end", 1),
    }
    return ", ".join(f"{k}: {_quoted(v)}" for k, v in unit.items())


def _quoted(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:\n"') else text


def read_metadata(path: str | os.PathLike[str] | BinaryIO, *, pixels: bool = True) -> Metadata:
    """Return the metadata of a picture file, named or open. Raises UserError if it is missing or no such picture.

    pixels: read them too, which shows a file that was cut off; without, only where text may follow them.
    """
    if isinstance(path, str | os.PathLike) and os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is no plain file: name a picture file")  # a named pipe would be waited for
    try:
        with Image.open(path, formats=READABLE) as image:
            text = _texts(image, pixels)
    except Exception as error:  # Pillow has many more than its own for bytes that are no picture
        name = path if isinstance(path, str | os.PathLike) else path.name
        raise UserError(
            f"{name} cannot be read as a PNG, JPEG or WebP picture ({one_line(error_text(error), 200)})"
        ) from None
    try:
        recipe = from_json(text[JSON_KEY]) if JSON_KEY in text else None
    except ValueError:
        recipe = None
    return Metadata(text.get(TEXT_KEY), recipe if isinstance(recipe, dict) else None, text.get(COMFYUI_KEY))


def check_recipe(recipe: dict[str, Any], where: str, names: Iterable[str] = SHAPES) -> None:
    """Raise UserError if a part of a recipe is missing or no such part."""
    for name in names:
        if not isinstance(recipe.get(name), SHAPES[name]):
            raise UserError(f"{where}: its metadata has no {name}: it cannot be reproduced")


def _texts(image: Image.Image, pixels: bool) -> dict[str, str]:
    """Texts by name. A PNG's chunks may follow the pixels."""
    early = {str(name): text for name, text in image.info.items() if isinstance(text, str)}
    if pixels or (image.format == "PNG" and not {JSON_KEY, TEXT_KEY, COMFYUI_KEY} & early.keys()):
        image.load()
    if image.format != "PNG":
        return _of_exif(image.getexif())
    return early | {str(name): text for name, text in image.info.items() if isinstance(text, str)}


def _of_exif(data: Image.Exif) -> dict[str, str]:
    """The same texts as PNG's chunks."""
    found = {}
    described, graph = data.get(IMAGE_DESCRIPTION), data.get(CAMERA_MODEL)
    if isinstance(described, str) and described.startswith(f"{JSON_KEY}:"):
        found[JSON_KEY] = described.removeprefix(f"{JSON_KEY}:")
    if isinstance(graph, str) and graph.startswith(f"{COMFYUI_KEY}:"):
        found[COMFYUI_KEY] = graph.removeprefix(f"{COMFYUI_KEY}:")
    comment = data.get_ifd(EXIF_POINTER).get(USER_COMMENT)
    if isinstance(comment, bytes) and comment.startswith((UNICODE, ASCII)):
        found[TEXT_KEY] = _decoded(comment)
    return found


def _decoded(comment: bytes) -> str:
    """Text of a user comment: of either byte order, as the programs that write it do not agree."""
    words = comment[8:]
    if comment.startswith(ASCII):
        return words.decode("utf-8", "replace")
    is_little = words[1::2].count(0) > words[::2].count(0)
    return words.decode("utf-16-le" if is_little else "utf-16-be", "replace")
