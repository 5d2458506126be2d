"""Pictures that are sent to be edited: a form's files, bounded, and kept in the service's own folder meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request

from zimage_runner.errors import UserError, one_line
from zimage_runner.pictures.opened import size_in_header, white_where_transparent
from zimage_runner.sampling import PICTURE_FILES
from zimage_runner.serve.config import Server
from zimage_runner.serve.errors import ApiError
from zimage_runner.serve.fields import Edit, Planned, parse, plan_generation
from zimage_runner.serve.guard import FORM, read_body
from zimage_runner.serve.settings import Settings

MOST_PARTS = 64


@dataclass(frozen=True, slots=True)
class Upload:
    """A picture's file as it was sent."""

    name: str
    data: bytes


async def read_edit(request: Request, server: Server) -> tuple[Edit, dict[str, Upload]]:
    """Fields and files of a request. Raises ApiError."""
    body = await read_body(request, server)
    texts, uploads = await asyncio.to_thread(read_form, body, request.headers["content-type"])
    for name in Edit.files:
        if name in texts:
            raise ApiError(400, f"{name}: send the picture itself as a file: no name or URL is opened", param=name)
    for name in uploads:
        if name not in Edit.files:
            raise ApiError(400, f"{name}: files here are {', '.join(Edit.files)}", param=name)
    if not uploads.keys() & {"image", "control_image"}:
        raise ApiError(400, "image: send the picture to start from, or a control_image to follow", param="image")
    return parse(Edit, texts), uploads


def read_form(body: bytes, content_type: str) -> tuple[dict[str, str], dict[str, Upload]]:
    """A form's texts and its files, by name. Raises ApiError."""
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import FormParser, parse_options_header

    parts: list[Any] = []
    ended: list[bool] = []

    def take(part: Any) -> None:
        parts.append(part)
        if len(parts) > MOST_PARTS:
            raise FormParserError(f"it has more than {MOST_PARTS} parts")

    try:
        parser = FormParser(
            FORM,
            take,
            take,
            lambda: ended.append(True),
            boundary=parse_options_header(content_type)[1].get(b"boundary"),
            config={"MAX_MEMORY_FILE_SIZE": len(body) + 1},  # nothing of it goes to another folder
        )
        parser.write(body)
        parser.finalize()
        if not ended:
            raise FormParserError("it ends early")
        return _by_name(parts)
    except FormParserError as error:
        raise ApiError(400, f"the body is no form: {one_line(str(error), 200)}") from None
    except UnicodeDecodeError:
        raise ApiError(400, "the form's texts are not UTF-8") from None


def _by_name(parts: list[Any]) -> tuple[dict[str, str], dict[str, Upload]]:
    texts: dict[str, str] = {}
    uploads: dict[str, Upload] = {}
    for part in parts:
        name = part.field_name.decode().removesuffix("[]")  # as OpenAI's client names each of a list
        if name in texts or name in uploads:
            raise ApiError(400, f"{name:.80}: sent more than once: one is taken", param=name)
        if hasattr(part, "file_object"):
            part.file_object.seek(0)
            called = part.file_name.decode(errors="replace").replace("\\", "/")
            uploads[name] = Upload(one_line(os.path.basename(called), 200) or name, part.file_object.read())
        else:
            texts[name] = part.value.decode()
    return texts, uploads


@contextlib.contextmanager
def private_folder(where: Path) -> Iterator[str]:
    """A new folder that nobody else can read, gone in the end with what is in it. Raises ApiError."""
    try:
        folder = tempfile.TemporaryDirectory(dir=where, ignore_cleanup_errors=True)
    except OSError as error:
        raise _no_room(error) from None
    with folder:
        yield folder.name


def plan_edit(asked: Edit, uploads: Mapping[str, Upload], folder: str, settings: Settings) -> Planned:
    """Keep the files in ``folder`` and plan what is drawn from them. Raises ApiError."""
    values: dict[str, Any] = {**dict.fromkeys(PICTURE_FILES), **asked.of_pictures()}
    for name, upload in uploads.items():
        data, path = _checked(name, upload.data, settings.server), Path(folder, name)
        try:
            path.write_bytes(data)
        except OSError as error:
            raise _no_room(error) from None
        values[name] = str(path)
    try:
        spec, output = plan_generation(asked, settings, **values)
    except ApiError as error:  # whoever asks knows the pictures by their fields
        error.message = re.sub(rf"(\w+)={re.escape(folder)}/\w+", r"\1", error.message)
        raise
    most = settings.server.max_upload_megapixels
    for params in spec.plan.params():
        width, height = params.inputs.canvas if params.inputs else (0, 0)
        if width * height > most * 1e6:
            message = f"outpaint makes the picture {width}x{height} pixels: ask for at most {most:g} million"
            raise ApiError(413, message, param="outpaint")
    return spec, output


def _checked(name: str, data: bytes, server: Server) -> bytes:
    """A picture that is small enough to be decoded; a mask is white where it was transparent. Raises ApiError."""
    most = server.max_upload_megapixels
    try:
        width, height = size_in_header(data)
        if width * height > most * 1e6:
            raise ApiError(413, f"{name} has {width}x{height} pixels: send at most {most:g} million", param=name)
        return white_where_transparent(data) if name == "mask" else data
    except UserError as error:
        raise ApiError(400, f"{name} {error}", param=name) from None


def _no_room(error: OSError) -> ApiError:
    return ApiError(507, f"the pictures cannot be kept on disk: {error.strerror}")
