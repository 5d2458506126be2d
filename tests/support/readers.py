"""Every reader of files, each with files that it reads well: what is changed in them costs the item or is refused."""

from __future__ import annotations

import io
import json
import random
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tests.support.made_runs import MadeRun
from zimage_runner.errors import UserError
from zimage_runner.outputs.ledger import Entry, Ledger, record_head, records, with_checksum
from zimage_runner.weights.prepared.prepared import UnusablePrepared, read_manifest

REFUSALS = (UserError,)
"""What a reader may raise: one line for the user."""


@dataclass(frozen=True)
class Reader:
    """``write`` leaves good files in an empty folder; ``read`` reads them, changed or not, and checks what it gets."""

    write: Callable[[Path], object]
    files: tuple[str, ...]
    """Those of ``write`` that are changed, one at a time."""
    read: Callable[[Path], Any]
    refusals: tuple[type[Exception], ...] = REFUSALS
    words: tuple[bytes, ...] = ()
    """What is put into them beside noise."""

    def try_one(self, folder: Path, good: Path, name: str, data: bytes) -> bool:
        """Read with the file ``name`` changed to ``data``; whether it was taken. Raises what no reader may raise."""
        if folder.exists():
            shutil.rmtree(folder)
        shutil.copytree(good, folder)
        (folder / name).write_bytes(data)
        try:
            self.read(folder)
        except self.refusals as error:
            if "\n" in str(error):
                raise AssertionError(f"more than a line: {error}") from error
            return False
        return True


WORDS = (
    b"", b"\0", b"\n", b"\r\n", b'"', b"{", b"}", b"[", b"]" * 9, b"[" * 5000, b'{"a":' * 5000, b",", b":", b"null",
    b"true", b"-1", b"1e999", b"NaN", b"9" * 25, b"9" * 5000, b"\xff\xfe", b"\xef\xbb\xbf", b"\\ud800", b"\\u0000",
    b"../../x", b"/etc/passwd", b"\xff" * 8, b"\0" * 64, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"a" * 3000,
)  # fmt: skip


def changed(data: bytes, chance: random.Random, words: tuple[bytes, ...] = ()) -> bytes:
    """A few edits, most often one: a bit, a byte, a piece that is gone, doubled, moved or put in, an end cut off."""
    out = bytearray(data)
    for _ in range(1 if chance.random() < 0.6 else chance.randrange(2, 6)):
        at = chance.randrange(len(out) + 1)
        if chance.random() < 0.5:
            at = min(at, chance.randrange(200))  # headers come first
        length = min(len(out) - at, int(chance.expovariate(1 / 12)))
        match chance.randrange(8):
            case 0 if at < len(out):
                out[at] ^= 1 << chance.randrange(8)
            case 1 if at < len(out):
                out[at] = chance.randrange(256)
            case 2:
                del out[at : at + length]
            case 3:
                out[at:at] = out[at : at + length]
            case 4 | 5:
                out[at : at + length] = chance.choice(WORDS + words)
            case 6:
                del out[at:]
            case 7:
                place = chance.randrange(len(out) + 1)
                out[place:place] = out[at : at + length]
    return bytes(out)


# Ledgers: what is read must be what was written.

LINES = 5


def _line(n: int) -> dict[str, Any]:
    head = record_head(
        f"items/{n:05d}_a/seed_{n}", "ok" if n else "failed", n, n, f"{n:016x}", image="image.png", sha256=f"{n:064x}",
        bytes=100 + n,
    )  # fmt: skip
    return head | {"written": "2026-11-28T22:00:00.000+00:00"}


def _write_ledger(folder: Path) -> None:
    lines = [with_checksum(json.dumps(_line(n), separators=(",", ":")).encode()) for n in range(LINES)]
    (folder / "records.jsonl").write_bytes(b"".join(lines))


ENTRIES = {
    _line(n)["item"]: Entry(n > 0, f"{n:064x}" if n else "", 100 + n if n else 0, f"{n:016x}") for n in range(LINES)
}


def _read_ledger(folder: Path) -> None:
    ledger = Ledger.load(folder / "records.jsonl")
    data = (folder / "records.jsonl").read_bytes()
    told = records(data[: data.rfind(b"\n") + 1])
    assert {record["item"] for record in told} == ledger.entries.keys(), "two readers, two answers"
    lines = data.split(b"\n")
    for item, entry in ledger.entries.items():
        # Several edits may take a checksum away as a whole; such a line is one of an earlier version.
        assert ENTRIES.get(item) == entry or any(item.encode() in line and b',"crc32":"' not in line for line in lines)


# Runs, as the gallery, status, collect and the sweep's report read them.


def _write_run(folder: Path) -> None:
    run = MadeRun(folder / "sweep/0", ["a cat", "two"], [1, 2], overrides=["sampling.height=48", "prompt=a"])
    run.add_all(failed=[(1, 2)]).finish(stopped="x", session={"gpu_memory": {"peak_reserved_gb": 1.0}})
    (folder / "sweep/multirun.yaml").write_text("hydra: {sweep: {dir: x}}\n")
    (run.folder / "stars.json").write_text('{"starred": ["items/00000_p/seed_1"], "rejected": []}')
    (run.folder / ".lock").write_text('{"pid": 1, "host": "other", "boot": "x", "started": "1"}')
    (run.folder / "run.log").write_text("2026-11-28 22:00:00,000 INFO zimage_runner: begun\n")


OF_A_RUN = tuple(
    f"sweep/0/{name}"
    for name in (
        "records.jsonl", "prompts.jsonl", "summary.json", "stars.json", ".lock", "run.log", ".hydra/config.yaml",
        ".hydra/overrides.yaml", "items/00000_p/seed_1/record.json", "items/00000_p/seed_1/image.png",
    )
)  # fmt: skip


def _status(folder: Path) -> None:
    from zimage_runner.view.status import status_of

    told = status_of([str(folder)])
    json.dumps(told, allow_nan=False)
    assert len(told["runs"]) == 1


def _report(folder: Path) -> None:
    from zimage_runner.view.report import write_report

    text = write_report(folder / "sweep/0").read_bytes()
    assert text.endswith(b"</html>\n")


def _index(folder: Path) -> None:
    """The gallery's own file, left by an earlier process."""
    from zimage_runner.view.folder import Folder
    from zimage_runner.view.index import Index
    from zimage_runner.view.watch import Watcher

    with Folder(folder) as opened:
        index = Index(opened, folder / "index.sqlite")
        try:
            watcher = Watcher(str(folder), opened, index)
            watcher.look()
            assert len(watcher.overview()["runs"]) == 1  # a changed cell that is a text still is not noticed
        finally:
            index.close()


def _write_index(folder: Path) -> None:
    _write_run(folder)
    _index(folder)
    with sqlite3.connect(folder / "index.sqlite") as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _collect(folder: Path) -> None:
    from zimage_runner.collect.contact_sheet import Layout, draw_sheets
    from zimage_runner.collect.folder import NAME, collect_into
    from zimage_runner.collect.pictures import find_runs, pictures_of

    pictures = list(pictures_of(find_runs([folder])))
    if pictures:
        collect_into(folder / "all", pictures, NAME)
        list(draw_sheets(folder / "sheet.png", pictures, Layout()))


def _sweep(folder: Path) -> None:
    from zimage_runner.cli.sweep.report import csv_table, markdown_table, read_job
    from zimage_runner.collect.grid import write_grids
    from zimage_runner.collect.overrides import varying_fields

    jobs = [read_job(folder / "sweep/0")]
    fields = varying_fields(job.overrides for job in jobs)
    csv_table(jobs, fields), markdown_table(jobs, fields)
    assert isinstance(jobs[0].code, int)
    write_grids(folder / "sweep", jobs, ["sampling.height"], tile=32)


# Prompts.


def _prompts(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    from zimage_runner.prompts import read_prompts

    def read(folder: Path) -> None:
        for prompt in read_prompts(make(folder)):
            assert prompt.text
            prompt.text.encode()

    return read


def _write_parquet(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    table = pa.table({"text": ["a cat", "b"], "seed": [1, 2], "width": [128.0, 256.0], "tag": [["x"], None]})
    pyarrow.parquet.write_table(table, folder / "p.parquet")


def _write_dataset(folder: Path) -> None:
    from tests.support.prompt_inputs import save_dataset

    save_dataset(folder / "set", {"text": ["a cat", "b"], "seed": [1, 2]})


def _source(name: str, file: str, **options: Any) -> Callable[[Path], Any]:
    def make(folder: Path) -> Any:
        from zimage_runner.config.registry import SCHEMAS

        return SCHEMAS["prompts"][name](path=str(folder / file), **options)

    return make


def _wildcards(folder: Path) -> None:
    from zimage_runner.prompts.wildcards import find_lists

    for found in find_lists(folder / "w").values():
        for value in found.values():
            assert value.text
            assert 0 < value.weight < 1e9


def _write_wildcards(folder: Path) -> None:
    (folder / "w").mkdir()
    (folder / "w/a.txt").write_text("red\n# no\nblue\n")
    (folder / "w/b.yaml").write_text("deep: {colour: [red, 2::blue, {text: x, weight: 2}]}\nb: &x [1]\nc: *x\n")
    (folder / "w/c.json").write_text('{"a": ["x", {"text": "y", "weight": 3}]}')


# Pictures and weights.


def _write_pictures(folder: Path) -> None:
    import numpy as np

    from zimage_runner.outputs.config import Format, Output
    from zimage_runner.outputs.encoders import encode

    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    recipe = {"prompt": "a 猫", "seed": 1, "params": {"width": 16, "height": 16}}
    for format in Format:
        (folder / f"p{format.suffix}").write_bytes(encode(pixels, recipe, Output(format=format)))


def _metadata(folder: Path) -> None:
    from zimage_runner.outputs.metadata import read_metadata

    for path in folder.iterdir():
        said = read_metadata(path)
        assert said.recipe is None or isinstance(said.recipe, dict)


def _thumbnail(folder: Path) -> None:
    from zimage_runner.view.thumbs import thumbnail

    for path in folder.iterdir():
        data = thumbnail(path.read_bytes(), 160)
        assert Image.open(io.BytesIO(data)).format == "WEBP"


def _write_manifest(folder: Path) -> None:
    component = {"file": "x", "size": 1, "sha256": "0" * 64, "sampled_sha256": "0" * 64}
    manifest = {
        "format": "x", "version": 1, "source": {"digest": "d", "files": {}}, "lossless": True, "packed": False,
        "config_files": ["scheduler/scheduler_config.json"], "components": {"vae": component},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _manifest(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest["source"]["digest"] != 0
    for component in manifest["components"].values():
        component.get("sha256")
    for name in manifest["config_files"]:
        assert (folder / name).resolve().is_relative_to(folder.resolve())


def _write_safetensors(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {"layers.0.attention.to_q.weight": torch.zeros(4, 4), "b": torch.zeros(3, dtype=torch.bfloat16)}
    save_file(tensors, folder / "x.safetensors", {"format": "pt", "modelspec.title": "x"})


def _write_adapter(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    name = "diffusion_model.layers.0.attention.to_q"
    tensors = {f"{name}.lora_A.weight": torch.zeros(2, 8), f"{name}.lora_B.weight": torch.zeros(8, 2)}
    save_file(tensors | {f"{name}.alpha": torch.tensor(2.0)}, folder / "x.safetensors", {"format": "pt"})


def _write_gguf(folder: Path) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(folder / "x.gguf", "lumina2")
    writer.add_name("x")
    writer.add_array("list", [1, 2, 3])
    writer.add_tensor("layers.0.attention.qkv.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _stored(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        from zimage_runner.weights.formats.checkpoint_file import open_checkpoint_file
        from zimage_runner.weights.formats.files import open_stored

        stored = open_stored(folder / name)
        for info in stored.tensors.values():
            assert 0 <= info.start <= info.start + info.nbytes <= stored.size
            assert all(side >= 0 for side in info.shape)
        open_checkpoint_file(folder / name)

    return read


def _adapter(folder: Path) -> None:
    from zimage_runner.weights.adapters.reader import describe_adapter, read_adapter

    assert describe_adapter(folder / "x.safetensors")
    read_adapter(folder / "x.safetensors")


READERS: dict[str, Reader] = {
    "ledger": Reader(_write_ledger, ("records.jsonl",), _read_ledger, words=(b',"crc32":"00000000"}\n', b'"ok"')),
    "status": Reader(_write_run, OF_A_RUN, _status, words=(b"hydra:", b"&a [*a]", b"!!bool 3", b"- ")),
    "report": Reader(_write_run, OF_A_RUN, _report),
    "collect": Reader(_write_run, OF_A_RUN, _collect),
    "sweep": Reader(_write_run, OF_A_RUN, _sweep),
    "gallery's index": Reader(_write_index, ("index.sqlite",), _index),
    "csv": Reader(
        lambda folder: (folder / "p.csv").write_text('text,seed,width\n"a, cat",1,128\nb,,\n') and None,
        ("p.csv",), _prompts(_source("csv", "p.csv")), words=(b"sep=;\n", b";", b"\t", b'"', b"prompt"),
    ),
    "jsonl": Reader(
        lambda folder: (folder / "p.jsonl").write_text('{"text": "a", "seed": 1}\n{"text": "b"}\n') and None,
        ("p.jsonl",), _prompts(_source("jsonl", "p.jsonl")), words=(b'"metadata":{"a":1},', b'"width":128,'),
    ),
    "snapshot": Reader(
        lambda folder: (folder / "prompts.jsonl").write_text('{"index":0,"text":"a","source":"x:1"}\n') and None,
        ("prompts.jsonl",), _prompts(lambda folder: _snapshot(folder)),
    ),
    "text": Reader(
        lambda folder: (folder / "p.txt").write_text("a cat --seed 7\n一只猫\n# b\n") and None,
        ("p.txt",), _prompts(_source("text_file", "p.txt")), words=(b" --w 128", b" --seed=", b"{a|b}"),
    ),
    "parquet": Reader(_write_parquet, ("p.parquet",), _prompts(_source("parquet", "p.parquet"))),
    "dataset": Reader(
        _write_dataset, ("set/state.json", "set/data-00000-of-00001.arrow"), _prompts(_source("hf_dataset", "set"))
    ),
    "wildcards": Reader(_write_wildcards, ("w/a.txt", "w/b.yaml", "w/c.json"), _wildcards, words=(b"&a [*a]", b"::")),
    "metadata": Reader(_write_pictures, ("p.png", "p.jpg", "p.webp"), _metadata),
    "thumbnail": Reader(_write_pictures, ("p.png", "p.jpg", "p.webp"), _thumbnail, (*REFUSALS, OSError)),
    "manifest": Reader(_write_manifest, ("manifest.json",), _manifest, (UnusablePrepared,), words=(b"null", b"[]")),
    "safetensors": Reader(_write_safetensors, ("x.safetensors",), _stored("x.safetensors")),
    "adapter": Reader(_write_adapter, ("x.safetensors",), _adapter),
    "gguf": Reader(_write_gguf, ("x.gguf",), _stored("x.gguf")),
}  # fmt: skip


def _snapshot(folder: Path) -> Any:
    from zimage_runner.prompts.snapshot import Snapshot

    return Snapshot(path=str(folder / "prompts.jsonl"))
