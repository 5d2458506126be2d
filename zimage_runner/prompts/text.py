"""Text as it comes in: lines of a file with their numbers, and what a prompt's text may be."""

from __future__ import annotations

import glob
import io
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from zimage_runner.errors import UserError

MAX_PROMPT_CHARACTERS = 32_768
"""The model reads at most 1024 tokens; anything near this length is a file pasted by mistake."""
MAX_LINE_BYTES = 8 * 2**20
MARK = "\ufeff"
"""The byte order mark, and by its other name the zero-width no-break space."""
INVISIBLE = f"{MARK}\u200b\u2060"
"""What editors and web pages leave at the ends of a text, and nobody sees."""
_BOM = MARK.encode()
_LINE_END = re.compile(rb"\r\n|\n|\r")
_READ_AT_ONCE = 2**20
_OTHER_FILES = {
    b"\x1f\x8b": "is a gzip file: unpack it first, gunzip FILE",
    b"PK\x03\x04": "is a zip file or an Excel workbook: unpack it, or save the sheet as CSV (UTF-8)",
    b"\xd0\xcf\x11\xe0": "is an old Excel or Word file: save it as CSV (UTF-8) or plain text",
    b"PAR1": "is a Parquet table: use prompts=parquet",
    b"BZh": "is a bzip2 file: unpack it first, bunzip2 FILE",
    b"\xfd7zXZ": "is an xz file: unpack it first, unxz FILE",
    b"(\xb5/\xfd": "is a zstd file: unpack it first, unzstd FILE",
    b"%PDF-": "is a PDF: save its text as UTF-8",
    b"\x89PNG": "is a picture: prompts=images draws from what pictures say about themselves",
    b"\xff\xd8\xff": "is a picture: prompts=images draws from what pictures say about themselves",
}
"""First bytes of files that are often given instead."""


def check_text(text: str, where: str) -> str:
    """The prompt's text without surrounding white space; UserError when it cannot be one."""
    if not isinstance(text, str):
        raise UserError(f"{where}: {text!r} is no text: put a prompt that holds a colon in quotation marks")
    text = bare(text)
    if not text:
        raise UserError(f"{where}: the prompt is empty: write what the picture should show, or remove it")
    check_characters(text, where)
    return text


def bare(text: str) -> str:
    """``text`` without white space and invisible marks around it; empty when nothing of it can be seen."""
    kept = text.strip()
    while kept and (kept[0] in INVISIBLE or kept[-1] in INVISIBLE):
        kept = kept.strip(INVISIBLE).strip()
    seen = kept[:1].isascii() or any(not c.isspace() and unicodedata.category(c) != "Cf" for c in kept)
    return kept if seen else ""


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


def shown(path: str | os.PathLike[str]) -> str:
    r"""A file's name as text that can be written anywhere: bytes that are not UTF-8 appear as ``\xe9``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def is_there(place: str) -> bool:
    """Whether a name, or a pattern, is that of a file or folder."""
    place = os.path.expanduser(place)
    return os.path.exists(place) or any(glob.iglob(place, recursive=True))


def input_path(path: str | None, option: str) -> Path:
    """``prompts.path`` as a readable file; relative paths start where the program was started."""
    if not path:
        raise UserError(f"prompts.path is not set: prompts={option} needs prompts.path=FILE")
    file = Path(path).expanduser()
    if file.is_dir():
        raise UserError(f"prompts.path={path} is a directory: name a file in it")
    return file


@contextmanager
def open_input(file: Path, field: str = "prompts.path") -> Iterator[BinaryIO]:
    """Open for reading; a missing or unreadable file, or one that is none, becomes a UserError naming ``field``."""
    try:
        _check_is_file(file, field)
        stream = file.open("rb")
    except FileNotFoundError:
        raise UserError(f"{field}={shown(file)} does not exist (looked for {shown(file.absolute())})") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        problem = getattr(error, "strerror", None) or error
        raise UserError(f"{field}={shown(file)} cannot be read: {problem}") from None
    with stream:
        yield stream


def _check_is_file(file: Path, field: str) -> None:
    """Opening a named pipe waits for ever for its writer. A pipe of the shell's, ``<(command)``, has one."""
    mode = file.stat().st_mode
    if stat.S_ISREG(mode) or (stat.S_ISFIFO(mode) and not os.path.exists(os.path.realpath(file))):
        return
    if stat.S_ISFIFO(mode):
        remedy = f"read it with prompts=stdin < {shown(file)}" if field == "prompts.path" else "name a file"
        raise UserError(f"{field}={shown(file)} is a named pipe: {remedy}")
    what = "a directory: name a file in it" if stat.S_ISDIR(mode) else "no file, but a device or socket: name a file"
    raise UserError(f"{field}={shown(file)} is {what}")


def read_lines(stream: BinaryIO, name: str, limit: int = MAX_LINE_BYTES) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of each line, without its ending (LF, CRLF or CR) and a byte order mark before it.

    UTF-8. Files that ``cat`` joined have such marks further down.
    """
    start = 0
    for number, raw in enumerate(_raw_lines(stream, limit), start=1):
        if len(raw) > limit:
            raise UserError(f"{name}:{number}: the line is longer than {limit:,} bytes: is this a prompt file?")
        yield number, _decode(raw, name, number, start).removeprefix(MARK).rstrip("\r\n")
        start += len(raw)


def _raw_lines(stream: BinaryIO, limit: int) -> Iterator[bytes]:
    """Each line with its ending; the last, if longer than ``limit``, in part."""
    rest = b""
    while chunk := stream.read(_READ_AT_ONCE):
        rest += chunk
        start = 0
        for end in _LINE_END.finditer(rest):
            if end[0] == b"\r" and end.end() == len(rest):
                break  # the LF that belongs to it may come next
            yield rest[start : end.end()]
            start = end.end()
        rest = rest[start:]
        if len(rest) > limit:
            break
    if rest:
        yield rest


def _decode(raw: bytes, name: str, number: int, start: int) -> str:
    if start == 0:
        _check_first_bytes(raw, name)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}:{number}: byte {start + error.start} (0x{raw[error.start]:02x}) is not UTF-8: "
            "save the file as UTF-8"
        ) from None


def _check_first_bytes(raw: bytes, name: str) -> None:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in (raw[:1], raw[1:2]):
        raise UserError(f"{name}:1: byte 0 starts UTF-16 text: save the file as UTF-8")
    for first, told in _OTHER_FILES.items():
        if raw.startswith(first):
            raise UserError(f"{name} {told}")


def file_lines(file: Path, field: str = "prompts.path", limit: int = MAX_LINE_BYTES) -> Iterator[tuple[int, str]]:
    """``read_lines`` of a file, which must not be empty."""
    with open_input(file, field) as stream:
        empty = True
        for number, line in read_lines(stream, shown(file), limit):
            empty = False
            yield number, line
    if empty:
        raise UserError(f"{field}={shown(file)} is empty: put at least one prompt in it")


def decode_whole(file: Path) -> str:
    """The whole file as text."""
    with open_input(file) as stream:
        raw = stream.read(MAX_LINE_BYTES + 1)
    if len(raw) > MAX_LINE_BYTES:
        raise UserError(f"{shown(file)}: larger than {MAX_LINE_BYTES:,} bytes: is this a prompt?")
    return "\n".join(line for _, line in read_lines(io.BytesIO(raw), shown(file)))


def unquoted(value: str) -> str:
    """Return ``value`` without the one pair of quotation marks around it, if there is one."""
    return value[1:-1] if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'" else value
