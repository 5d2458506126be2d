"""Text as it comes in: lines of a file with their numbers, and what a prompt's text may be."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from zimage_runner.errors import UserError

MAX_PROMPT_CHARACTERS = 32_768
"""The model reads at most 1024 tokens; anything near this length is a file pasted by mistake."""
MAX_LINE_BYTES = 8 * 2**20
_BOM = b"\xef\xbb\xbf"


def check_text(text: str, where: str) -> str:
    """The prompt's text without surrounding white space; UserError when it cannot be one."""
    if not isinstance(text, str):
        raise UserError(f"{where}: {text!r} is no text: put a prompt that holds a colon in quotation marks")
    text = text.strip()
    if not text:
        raise UserError(f"{where}: the prompt is empty: write what the picture should show, or remove it")
    check_characters(text, where)
    return text


def check_characters(text: str, where: str) -> None:
    """Refuse what no text encoder or file can hold: NUL, half of a surrogate pair, a megabyte."""
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise UserError(
            f"{where}: the prompt has {len(text):,} characters: use at most {MAX_PROMPT_CHARACTERS:,} "
            "(the model reads at most 1024 tokens)"
        )
    if "\0" in text:
        raise UserError(f"{where}: the prompt holds a NUL character at position {text.index(chr(0)) + 1}: remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: the prompt holds half of a surrogate pair (U+{ord(text[error.start]):04X}) at position "
            f"{error.start + 1}: write the whole character"
        ) from None


def input_path(path: str | None, option: str) -> Path:
    """``prompts.path`` as a readable file; relative paths start where the program was started."""
    if not path:
        raise UserError(f"prompts.path is not set: prompts={option} needs prompts.path=FILE")
    file = Path(path).expanduser()
    if file.is_dir():
        raise UserError(f"prompts.path={path} is a directory: name a file in it")
    return file


@contextmanager
def open_input(file: Path) -> Iterator[BinaryIO]:
    """Open for reading; a missing or unreadable file becomes a UserError."""
    try:
        stream = file.open("rb")
    except FileNotFoundError:
        raise UserError(f"prompts.path={file} does not exist (looked for {file.absolute()})") from None
    except OSError as error:
        raise UserError(f"prompts.path={file} cannot be read: {error.strerror}") from None
    with stream:
        yield stream


def read_lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of each line, without its ending; UTF-8, a byte order mark and CRLF are fine."""
    number, start = 0, 0
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) > MAX_LINE_BYTES:
            raise UserError(
                f"{name}:{number}: the line is longer than {MAX_LINE_BYTES:,} bytes: is this a prompt file?"
            )
        yield number, _decode(raw, name, number, start).rstrip("\r\n")
        start += len(raw)


def _decode(raw: bytes, name: str, number: int, start: int) -> str:
    if start == 0:
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{name}:1: byte 0 starts UTF-16 text: save the file as UTF-8")
        raw = raw.removeprefix(_BOM)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        at = start + error.start + (len(_BOM) if start == 0 and raw is not error.object else 0)
        raise UserError(
            f"{name}:{number}: byte {at} (0x{raw[error.start]:02x}) is not UTF-8: save the file as UTF-8"
        ) from None


def file_lines(file: Path) -> Iterator[tuple[int, str]]:
    """``read_lines`` of a file, which must not be empty."""
    with open_input(file) as stream:
        empty = True
        for number, line in read_lines(stream, str(file)):
            empty = False
            yield number, line
    if empty:
        raise UserError(f"prompts.path={file} is empty: put at least one prompt in it")


def decode_whole(file: Path) -> str:
    """The whole file as text."""
    with open_input(file) as stream:
        raw = stream.read(MAX_LINE_BYTES + 1)
    if len(raw) > MAX_LINE_BYTES:
        raise UserError(f"{file}: larger than {MAX_LINE_BYTES:,} bytes: is this a prompt?")
    return "\n".join(line for _, line in read_lines(io.BytesIO(raw), str(file)))
