"""Small WebP copies of pictures: made when they are asked for, kept in the cache folder, the oldest removed."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import threading
from pathlib import Path

from PIL import Image

from zimage_runner.view.folder import Folder
from zimage_runner.view.stored import Stored

SIZES = (160, 320, 640)
"""Pixels of the longer side."""
QUALITY = 80
LARGEST_PICTURE = 256 << 20
MOST_PIXELS = 64_000_000
AT_ONCE = max(2, (os.cpu_count() or 2) // 2)
FORMATS = ("PNG", "JPEG", "WEBP")
LEFT_SHARE = 0.8
"""Of the bound, after the oldest were removed."""


class Thumbnails:
    """Thumbnails of pictures below ``folder``, at most ``limit`` bytes of them on disk."""

    def __init__(self, folder: Folder, cache: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._cache: Path | None = cache / "view" / "thumbnails"
        self._room = threading.Semaphore(AT_ONCE)
        self._lock = threading.Lock()
        self._bytes: int | None = None

    def get(self, picture: Stored, key: str, size: int) -> bytes:
        """WebP of a picture; another ``key`` means another picture. Raises OSError if there is none."""
        place = self._place(f"{picture.name}\0{key}\0{size}")
        if place is not None:
            try:
                return place.read_bytes()
            except OSError:
                pass
        with self._room:
            data = thumbnail(picture.read(self._folder, LARGEST_PICTURE), size)
        if place is not None:
            self._keep(place, data)
        return data

    def _place(self, key: str) -> Path | None:
        digest = hashlib.sha256(key.encode()).hexdigest()
        return self._cache / digest[:2] / f"{digest[2:40]}.webp" if self._cache else None

    def _keep(self, place: Path, data: bytes) -> None:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=place.parent, suffix=".tmp")
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, place)
        except OSError:
            self._cache = None  # full or not writable: go on without
            return
        with self._lock:
            if self._bytes is None:
                self._bytes = sum(size for _, size, _ in self._files())
            else:
                self._bytes += len(data)
            if self._bytes > self._limit:
                self._bytes = self._shrink()

    def _files(self) -> list[tuple[float, int, Path]]:
        found = []
        for path in self._cache.glob("*/*") if self._cache else ():
            try:
                stat = path.stat()
            except OSError:
                continue
            found.append((stat.st_mtime, stat.st_size, path))
        return found

    def _shrink(self) -> int:
        """Remove the oldest; the bytes that are left."""
        files = sorted(self._files())
        left = sum(size for _, size, _ in files)
        for _, size, path in files:
            if left <= LEFT_SHARE * self._limit:
                break
            path.unlink(missing_ok=True)
            left -= size
        return left


def thumbnail(data: bytes, size: int, quality: int = QUALITY) -> bytes:
    """A picture's bytes as WebP of at most ``size`` x ``size`` pixels. Raises OSError for what is no picture."""
    image = shrunk(data, size)
    out = io.BytesIO()
    image.save(out, "WEBP", quality=quality, method=2)
    return out.getvalue()


def shrunk(data: bytes, size: int) -> Image.Image:
    """A picture of at most ``size`` x ``size`` pixels. Raises OSError for what is no picture."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise OSError(f"{image.width} x {image.height} pixels are too many")
            image.thumbnail((size, size), Image.Resampling.LANCZOS, reducing_gap=2.0)
            return image.convert("RGB")
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"not a picture: {error}") from None
