"""Runs as the runner leaves them, made without drawing: for the gallery's tests and its benchmark."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from PIL import Image

from zimage_runner.outputs.lock import RunLock

START = datetime(2026, 11, 28, 22, 0, tzinfo=UTC)
PARAMS = {"height": 48, "width": 64, "num_inference_steps": 8, "guidance_scale": 0.0, "negative_prompt": ""}
HOSTILE = (
    '<img src=x onerror="window.pwned=1">',
    '"><script>window.pwned=1</script>',
    "</title></style><svg onload=window.pwned=1>",
    "\u202eevil\u202c javascript:window.pwned=1 \u0000 &lt;b&gt;",
)


class MadeRun:
    """A run directory that can be added to, as its process would."""

    def __init__(
        self, folder: Path, prompts: Sequence[str], seeds: Sequence[int], params: Mapping[str, Any] = PARAMS,
        overrides: Sequence[str] = (), settings: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.prompts, self.seeds = folder, list(prompts), list(seeds)
        self.params = dict(params)
        self._count = 0
        (folder / ".hydra").mkdir(parents=True)
        rows = [{"index": n, "text": text, "source": f"prompts[{n}]"} for n, text in enumerate(prompts)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = {"seeds": self.seeds, "sampling": self.params, "model": {"name": "zimage_nano", "recommended": {}}}
        (folder / ".hydra" / "config.yaml").write_text(json.dumps(config | dict(settings or {})), encoding="utf-8")
        (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(list(overrides)), encoding="utf-8")

    def item(self, index: int, seed: int) -> str:
        return f"items/{index:05d}_p/seed_{seed}"

    def add(self, index: int, seed: int, error: str | None = None, color: tuple[int, int, int] | None = None) -> Path:
        """One more item: its picture, record and ledger line. The picture's path."""
        item = self.item(index, seed)
        place = self.folder / item
        place.mkdir(parents=True, exist_ok=True)
        self._count += 1
        written = (START + timedelta(seconds=self._count)).isoformat(timespec="milliseconds")
        head: dict[str, Any] = {"item": item, "status": "ok", "index": index, "seed": seed, "fingerprint": "f"}
        if error is None:
            color = color or (40 + 53 * index % 200, 40 + 91 * seed % 200, 90)
            image = Image.new("RGB", (self.params["width"], self.params["height"]), color)
            image.paste((250, 250, 250), (4, 4, 10, 10))
            image.save(place / "image.png")
            size = (place / "image.png").stat().st_size
            head |= {"image": "image.png", "sha256": "0" * 64, "bytes": size, "seconds": 0.5}
        else:
            head |= {"status": "failed", "error": error}
        record = {
            **head, "prompt": self.prompts[index], "params": self.params,
            "model": {"name": "zimage_nano", "digest": "d"}, "numerics": {"engine": "native", "dtype": "float32"},
            "written": written,
        }  # fmt: skip
        (place / "record.json").write_text(json.dumps(record), encoding="utf-8")
        with (self.folder / "records.jsonl").open("a", encoding="utf-8") as ledger:
            ledger.write(json.dumps({**head, "written": written}, separators=(",", ":")) + "\n")
        return place / "image.png"

    def add_all(self, failed: Iterable[tuple[int, int]] = ()) -> MadeRun:
        failing = set(failed)
        for index in range(len(self.prompts)):
            for seed in self.seeds:
                self.add(index, seed, "BadPictureError: all black" if (index, seed) in failing else None)
        return self

    def finish(self, **more: Any) -> MadeRun:
        images = {"first_seconds": 1.0, "mean_seconds": 0.5, "images_per_second": 2.0}
        summary = {"status": "complete", "items": {}, "images": images, "total_seconds": 9.5,
                   "session": {"peak_host_gb": 1.5}, **more}  # fmt: skip
        (self.folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        return self

    def hold(self) -> RunLock:
        """Hold its lock as a running process does."""
        lock = RunLock(self.folder, os.open(self.folder, os.O_RDONLY))
        lock.acquire()
        return lock


def many_lines(folder: Path, count: int, seeds: int = 1, picture: Image.Image | None = None) -> None:
    """A run of ``count`` pictures. Only prompts and ledger exist, or ``picture`` is the file of each as well."""
    folder.mkdir(parents=True)
    if picture is not None:
        picture.save(folder / "one.png")
    (folder / ".hydra").mkdir()
    params = {**PARAMS, "width": 1024, "height": 1024}
    config = {"seeds": list(range(seeds)), "sampling": params, "model": {"name": "m", "recommended": {}}}
    (folder / ".hydra" / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    subjects = ("a lighthouse", "an old fisherman", "a fox in snow", "a clay kitchen", "a dew drop", "a neon street")
    with (
        (folder / "prompts.jsonl").open("w", encoding="utf-8") as prompts,
        (folder / "records.jsonl").open("w", encoding="utf-8") as ledger,
    ):
        for index in range(count // seeds):
            text = f"{subjects[index % 6]} at hour {index % 24}, number {index}, watercolour on paper"
            row = {"index": index, "text": text, "source": f"p.jsonl:{index + 1}"}
            prompts.write(json.dumps(row | ({"width": 768} if index % 3 == 0 else {})) + "\n")
            for seed in range(seeds):
                if picture is not None:
                    place = folder / f"items/{index:05d}_{subjects[index % 6].replace(' ', '_')}/seed_{seed}"
                    place.mkdir(parents=True)
                    os.link(folder / "one.png", place / "image.png")
                written = (START + timedelta(seconds=index * seeds + seed)).isoformat(timespec="milliseconds")
                ledger.write(
                    f'{{"item":"items/{index:05d}_{subjects[index % 6].replace(" ", "_")}/seed_{seed}","status":"ok",'
                    f'"index":{index},"seed":{seed},"fingerprint":"{index:064x}","image":"image.png",'
                    f'"sha256":"{index:064x}","bytes":1234567,"pixels_sha256":"{index:064x}","seconds":0.77,'
                    f'"timings":{{"encode":0.01,"denoise":0.7,"decode":0.06}},"written":"{written}"}}\n'
                )


def is_held(folder: Path) -> bool:
    """Whether someone has the kernel's lock on a run."""
    with (folder / ".lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
