"""Tile the pictures of a run, in the order of its items: `python -m training.sheet RUN_DIR OUT.png [COLUMNS]`."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image


def tile(pictures: list[Path], columns: int) -> Image.Image:
    """All pictures, of one size, row by row."""
    images = [Image.open(p).convert("RGB") for p in pictures]
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def main(run: str, out: str, columns: str = "4") -> None:
    """Write the sheet."""
    pictures = sorted(Path(run).glob("items/*/seed_*/image.png"))
    if not pictures:
        sys.exit(f"{run}: no items/*/seed_*/image.png there; give a run directory")
    tile(pictures, int(columns)).save(out, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
