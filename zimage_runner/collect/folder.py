"""Pictures of many folders as files of one, under names of the user's choice, with a table of what each shows."""

from __future__ import annotations

import contextlib
import os
import string
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from zimage_runner.collect.pictures import Picture
from zimage_runner.errors import UserError
from zimage_runner.outputs import atomic
from zimage_runner.outputs.beneath import unfit_target
from zimage_runner.outputs.config import Output
from zimage_runner.outputs.encoders import convert
from zimage_runner.outputs.json_text import compact_json
from zimage_runner.outputs.lock import RunLock
from zimage_runner.outputs.parsed import from_json
from zimage_runner.plan.items import slug

NAME = "{index:05d}_{slug}_seed_{seed}"
TABLE = "metadata.jsonl"
"""The name and form that Hugging Face's imagefolder reads."""
LOCK = ".zimage_runner.lock"
"""Not a run's: the gallery would take the folder for one."""
LONGEST = 200
"""Bytes of a name; file systems allow 255 at most."""
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_BLOCK = 1 << 20


def collect_into(
    folder: Path, pictures: Sequence[Picture], name: str, *, overwrite: bool = False, output: Output | None = None
) -> tuple[Path, int]:
    """Link, copy or convert each picture into ``folder`` as ``name`` says, and write the table.

    Return the table's path and how many pictures were collected; a file that several runs share is one picture. Rows
    of other pictures, which earlier calls brought and which are there still, are kept.

    output: the format that pictures of other formats are converted to; None keeps them as they are.

    What is there already and the same is left; something else of that name is an error unless ``overwrite``.
    """
    rows = [row_of(picture, name, suffix_of(picture, output)) for picture in pictures]
    pictures, rows = each_once(pictures, rows)
    _check_unique(pictures, [row["file_name"] for row in rows], name)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"into={folder} is a file: name a folder")
    if folder.suffix.lower() in ARCHIVES and not folder.exists():
        raise UserError(
            f"into={folder}: pictures are collected in a folder, not an archive: use into={folder.with_suffix('')}, "
            f"then pack that"
        )
    with held(folder):
        _check_fit(folder / TABLE)
        before, after = _kept_rows(folder, {row["file_name"] for row in rows})
        jobs = [
            (conversion_of(picture, output), picture, folder / row["file_name"])
            for picture, row in zip(pictures, rows, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            # A refusal leaves nothing behind.
            done = list(pool.map(lambda job: _is_done(*job, overwrite=overwrite), jobs))
            _check_conversion([job for job, is_done in zip(jobs, done, strict=True) if is_done])
            missing = [job for job, is_done in zip(jobs, done, strict=True) if not is_done]
            list(pool.map(lambda job: _put(*job), missing))
        lines = [*before, *map(compact_json, rows), *after]
        atomic.replace_file(folder / TABLE, "".join(f"{line}\n" for line in lines).encode())
    return folder / TABLE, len(rows)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make a folder, and let nobody else collect into it meanwhile. Raises UserError if somebody does, and OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic.directory(folder) as dir_fd:
        lock = RunLock(folder, dir_fd, LOCK)
        with atomic.naming(lock.path):
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def _kept_rows(folder: Path, names: Set[str]) -> tuple[list[str], list[str]]:
    """The table's rows of pictures that are there and are not among ``names``: before the first that is, and after.

    Raises UserError for a table that cannot be read.
    """
    table = folder / TABLE
    before: list[str] = []
    after: list[str] = []
    kept = before
    for number, data in enumerate(table.read_bytes().split(b"\n") if table.exists() else (), 1):
        if not data.strip():
            continue
        try:
            line = data.strip().decode()
            row = from_json(line)
        except ValueError:
            line, row = "", None
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str):
            raise UserError(f"{table}, line {number}: no row of a picture: remove the table, or use another folder")
        if name in names:
            kept = after
        elif (folder / name).is_file():
            kept.append(line)
    return before, after


def conversion_of(picture: Picture, output: Output | None) -> Output | None:
    """How a picture is converted; None for one that has the format already."""
    if output is None or (not output.format.has_quality and picture.path.suffix == output.format.suffix):
        return None
    return output


def suffix_of(picture: Picture, output: Output | None) -> str:
    """Of its file, once converted."""
    return picture.path.suffix if output is None else output.format.suffix


def row_of(picture: Picture, name: str, suffix: str) -> dict[str, Any]:
    """What the table says of a picture; ``file_name`` is ``name`` with its blanks filled. Raises UserError."""
    record = picture.record()
    values = {
        "index": picture.index,
        "slug": picture.slug,
        "seed": record.get("seed"),
        "id": record.get("id"),
        "run": picture.run.parent.name,
        "job": picture.run.name,
        "text": record.get("prompt", ""),
        **record.get("params", {}),
    }
    file_name = f"{_filled(name, values).removesuffix(suffix)}{suffix}"
    row = {"file_name": file_name, "text": record.get("prompt", ""), "seed": record.get("seed")}
    row |= {"id": record["id"]} if "id" in record else {}
    row |= record.get("params", {})
    row |= {"model": record.get("model", {}).get("name"), "source": str(picture.path)}
    row |= {"inputs": record["inputs"]} if "inputs" in record else {}
    return row | ({"metadata": record["metadata"]} if "metadata" in record else {})


def _filled(name: str, values: dict[str, Any]) -> str:
    """``name`` with its blanks filled; free text becomes what a file can be called."""
    texts = {key: slug(value) if key in ("id", "text") and value else value for key, value in values.items()}
    try:
        used = [field for _, field, _, _ in string.Formatter().parse(name) if field is not None]
        unknown = [field for field in used if field not in texts]
        if unknown:
            raise UserError(f"name={name}: no such blank {{{unknown[0]}}}; there are {', '.join(texts)}")
        if missing := [field for field in used if texts[field] is None]:
            raise UserError(f"name={name}: a picture has no {missing[0]}: use {{index}} or {{slug}}")
        filled = name.format(**texts)
    except (ValueError, TypeError, AttributeError, IndexError, OverflowError, MemoryError) as error:
        raise UserError(f"name={name}: {error or 'too long'}: write blanks as {NAME}") from None
    if (
        not filled.isprintable()
        or not filled.strip(". ")
        or "/" in filled
        or "\\" in filled
        or len(filled.encode()) > LONGEST
    ):
        raise UserError(
            f"name={name} gives {filled!r:.80}, which is no plain file name: leave folders out, keep it short"
        )
    return filled


def each_once(
    pictures: Sequence[Picture], rows: Sequence[dict[str, Any]]
) -> tuple[list[Picture], list[dict[str, Any]]]:
    """Leave out what an earlier run has under the same name already: the same file, which two runs share."""
    kept: dict[str, tuple[Picture, dict[str, Any]]] = {}
    others: list[tuple[Picture, dict[str, Any]]] = []
    for picture, row in zip(pictures, rows, strict=True):
        first = kept.setdefault(row["file_name"].lower(), (picture, row))
        if first[0] is not picture and not _is_one_file(first[0], picture):
            others.append((picture, row))  # refused below
    found = [*kept.values(), *others]
    return [picture for picture, _ in found], [row for _, row in found]


def _is_one_file(first: Picture, second: Picture) -> bool:
    if first.place is not None or second.place is not None:
        return (first.run, first.item) == (second.run, second.item)
    return os.path.samefile(first.path, second.path)


def _check_unique(pictures: Sequence[Picture], names: Sequence[str], name: str) -> None:
    first: dict[str, Picture] = {}
    for picture, file_name in zip(pictures, names, strict=True):
        other = first.setdefault(file_name.lower(), picture)
        if other is not picture:
            raise UserError(
                f"name={name} gives {file_name} to both {other.path} and {picture.path}: tell them apart, for example "
                f"name='{{job}}_{NAME}'"
            )


def _check_fit(target: Path) -> None:
    if (kind := unfit_target(target)) is not None:
        raise UserError(f"{target} is {kind}, which is left alone: remove it, or use another folder")


def _is_done(conversion: Output | None, picture: Picture, target: Path, *, overwrite: bool) -> bool:
    """Return whether ``target`` stays as it is. Raises UserError for one that must not be replaced."""
    _check_fit(target)
    if not target.exists():
        return False
    changed_ns = None if picture.place is None else _written_ns(picture)
    with picture.image.open() as opened:
        same = _is_there(opened, target, changed_ns, converted=conversion is not None)
        if not same and conversion is not None and convert(opened, conversion) == target.read_bytes():
            return False  # drawn again, to the same: made anew, it takes over the new time
    if not same and not overwrite:
        raise UserError(f"{target} is there already, and another picture: use another folder, or overwrite=true")
    return same and not (overwrite and conversion is not None)  # converted anew, perhaps to another quality


def _check_conversion(done: Sequence[tuple[Output | None, Picture, Path]]) -> None:
    """Raise UserError where an earlier call converted to another quality, by the first of its pictures."""
    for conversion, picture, target in done:
        if conversion is not None:
            with picture.image.open() as opened:
                if convert(opened, conversion) != target.read_bytes():
                    raise UserError(
                        f"{target} is there already, converted otherwise (quality): use another "
                        "folder, or overwrite=true"
                    )
            return


def _put(conversion: Output | None, picture: Picture, target: Path) -> None:
    source = picture.image
    changed_ns = None if picture.place is None else _written_ns(picture)
    with source.open() as opened:
        if conversion is not None:
            # It takes over the time of the last change, by which it is known again.
            if changed_ns is None:
                changed_ns = os.fstat(opened.fileno()).st_mtime_ns
            atomic.replace_file(target, convert(opened, conversion), changed_ns=changed_ns)
            return
        if changed_ns is not None:
            atomic.replace_file(target, opened.read(), changed_ns=changed_ns)
            return
    with (
        atomic.directory(source.root) as run,
        atomic.directory(str(PurePosixPath(source.relative).parent), run) as item,
        atomic.directory(target.parent) as folder,
        atomic.naming(target),
    ):
        atomic.link_or_copy(item, source.path.name, folder, target.name, tmp=atomic.own_temporary(target.name))


def _written_ns(picture: Picture) -> int:
    """When a picture of a shard was written, in nanoseconds; its file has no time of its own."""
    try:
        return round(datetime.fromisoformat(picture.record()["written"]).timestamp() * 1000) * 1_000_000
    except (KeyError, TypeError, ValueError, OverflowError):
        return 0


def _is_there(picture: BinaryIO, target: Path, changed_ns: int | None, *, converted: bool) -> bool:
    """Return whether ``target`` is this picture already; ``changed_ns``: when one of a shard was written."""
    there = target.stat()
    if changed_ns is None:
        source = os.fstat(picture.fileno())
        if os.path.samestat(source, there):
            return True
        changed_ns, size = source.st_mtime_ns, source.st_size
    else:
        size = picture.seek(0, os.SEEK_END)
        picture.seek(0)
    if converted:
        return there.st_mtime_ns == changed_ns
    if size != there.st_size:
        return False
    with open(target, "rb") as other:
        while block := picture.read(_BLOCK):
            if block != other.read(_BLOCK):
                return False
    return True
