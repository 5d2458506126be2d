"""Hugging Face's client, made to go on with a file where an earlier process stopped.

Version 1 of the client gives each attempt a file name of its own and begins again at byte 0: 10 GB lost by a kill at
the end, and what was there stays behind. Here a file's bytes are kept under one name, which its content's digest is
part of, below a lock; what a broken or killed download left is completed by the next.
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import logging
import os
import re
from pathlib import Path
from typing import Any

from zimage_runner.weights.cache import umask

log = logging.getLogger(__name__)

CHUNK = 64 * 1024
"""Bytes that a broken connection can cost. The client's own 10 MB were never complete where every answer is cut."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TAKES = {"destination_path", "url_to_download", "headers", "expected_size", "filename", "force_download", "etag"}
_original: Any = None


def keep_partial_files() -> None:
    """Have ``snapshot_download`` resume files. Nothing changes with a version of the client that is built otherwise."""
    global _original
    from huggingface_hub import constants, file_download

    theirs = getattr(file_download, "_download_to_tmp_and_move", None)
    if theirs is _resume or theirs is None:
        return
    if not inspect.signature(theirs).parameters.keys() >= _TAKES or not hasattr(file_download, "http_get"):
        log.debug("huggingface_hub is of an unknown version: interrupted files start again")
        return
    _original = theirs
    constants.DOWNLOAD_CHUNK_SIZE = CHUNK
    setattr(file_download, "_download_to_tmp_and_move", _resume)  # noqa: B010


def check_answers(repo: str) -> None:
    """Raise what the client's own connection raises where the hub says nothing within the time limit.

    The client tries for minutes.
    """
    from huggingface_hub import constants, get_session

    get_session().head(f"{constants.ENDPOINT}/api/models/{repo}", timeout=constants.HF_HUB_ETAG_TIMEOUT)


def _resume(**given: Any) -> None:
    """Download one file to ``destination_path``, from where the last attempt ended.

    Over plain HTTP, because the Xet protocol cannot go on. Raises what the client's ``http_get`` raises, and OSError
    when the whole file has another sha256 than the hub says.
    """
    destination, size = Path(given["destination_path"]), given["expected_size"]
    if given["force_download"] or size is None or not given["etag"]:
        return _original(**given)
    if destination.exists():
        return None
    partial = destination.with_name(f"{destination.name}.partial.incomplete")
    with partial.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another process is at it, on a disk where the client's own lock does not hold
            return _original(**given)
        if destination.exists():  # moved by who held the lock
            return None
        resumed = _complete(given, file, size)
        # One that came in one piece is hashed by ``model.verify`` as any other.
        if resumed and _SHA256.fullmatch(given["etag"]) and _sha256(file) != given["etag"]:
            partial.unlink()
            raise OSError(f"{given['filename']}: other bytes arrived than the hub's sha256 says")
        os.fchmod(file.fileno(), 0o666 & ~umask())
        os.replace(partial, destination)
    return None


def _complete(given: dict[str, Any], file: Any, size: int) -> bool:
    """Fetch what is missing of ``size`` bytes. Returns whether some of them were there already."""
    from huggingface_hub.file_download import http_get

    have = file.seek(0, os.SEEK_END)
    if have > size:
        file.truncate(0)
        have = file.seek(0)
    if have:
        log.info("going on with %s at byte %d of %d", given["filename"], have, size)
    http_get(
        given["url_to_download"],
        file,
        resume_size=have,
        headers=given["headers"],
        expected_size=size,
        tqdm_class=given.get("tqdm_class"),
    )
    file.flush()
    return have > 0


def _sha256(file: Any) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()
