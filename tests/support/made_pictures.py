"""Runs of made-up pictures, as the runner leaves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

ENTRY = {"status": "ok", "fingerprint": "f", "sha256": "0" * 64}


def write_run(folder: Path, items: dict[tuple[str, int], dict[str, Any]]) -> Path:
    """A run as the runner leaves it: a picture, a record and a ledger line each."""
    folder.mkdir(parents=True)
    for number, ((name, seed), more) in enumerate(items.items()):
        item = f"items/{name}/seed_{seed}"
        (folder / item).mkdir(parents=True)
        Image.new("RGB", (32, 16), (number, 0, seed)).save(folder / item / "image.png")
        record = {"prompt": name[6:].replace("_", " "), "seed": seed, "params": {"width": 32, "height": 16}, **more}
        (folder / item / "record.json").write_text(json.dumps(record), encoding="utf-8")
        with (folder / "records.jsonl").open("a", encoding="utf-8") as ledger:
            size = (folder / item / "image.png").stat().st_size
            ledger.write(json.dumps({"item": item, **ENTRY, "bytes": size}) + "\n")
    return folder
