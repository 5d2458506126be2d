"""output=shards: what is written, what a dead writer leaves, and that everything that reads runs reads it."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from tests.support.shards import Process, check_shards, digests, item, names, process, shards
from tests.support.written_runs import noise_pictures, request
from zimage_runner.errors import RunStopped, UserError
from zimage_runner.outputs import atomic
from zimage_runner.outputs.config import Format, Layout, Output, Shards
from zimage_runner.outputs.finished import Finished, open_picture, shared_picture
from zimage_runner.outputs.ledger import Ledger
from zimage_runner.outputs.run_dir import RunDirectory
from zimage_runner.outputs.shard_files import ShardFiles
from zimage_runner.outputs.survey import Pictures


@pytest.mark.parametrize("format", list(Format))
def test_webdataset_reads_the_shards(tmp_path: Path, format: Format) -> None:
    webdataset = pytest.importorskip("webdataset")
    run = tmp_path / "run"
    with process(run, shards(format=format)) as drawn:
        drawn.draw(range(7), prompt="a cat, 一只猫")
    assert names(run) == [f"{n:05d}.{kind}" for n in range(3) for kind in ("parquet", "tar")]
    check_shards(run)
    urls = [str(run / "shards" / name) for name in names(run) if name.endswith(".tar")]
    suffix = format.suffix[1:]
    samples = list(
        webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("__key__", suffix, "txt", "json")
    )
    assert [key for key, *_ in samples] == [f"{n // 3:05d}{n % 3:04d}" for n in range(7)]
    ledger = Ledger.load(run / "records.jsonl")
    for key, picture, text, record in samples:
        assert text == "a cat, 一只猫"
        assert (record["key"], record["caption"], record["status"]) == (key, text, "success")
        assert (record["width"], record["height"], record["original_width"]) == (48, 32, 48)
        seed, own = record["seed"], record["record"]
        assert own["sha256"] == ledger.entries[own["item"]].sha256
        if format is Format.png:
            assert np.array_equal(picture, noise_pictures(seed=seed)[0])
    table = pyarrow.parquet.read_table(run / "shards/00001.parquet").to_pylist()
    for row, (_, _, _, record) in zip(table, samples[3:6], strict=True):
        assert json.loads(row.pop("record")) == record.pop("record")
        assert row == record


def test_tables_have_the_columns_of_img2dataset(tmp_path: Path) -> None:
    with process(tmp_path / "run", shards()) as drawn:
        drawn.draw(range(1))
    columns = set(pyarrow.parquet.read_schema(tmp_path / "run/shards/00000.parquet").names)
    theirs = "url caption key status error_message width height original_width original_height exif"
    assert columns >= set(theirs.split())


def test_parquet_is_what_the_hub_shows_as_pictures(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with process(run, shards(layout=Layout.parquet)) as drawn:
        drawn.draw(range(7))
    assert names(run) == [f"train-{n:05d}.parquet" for n in range(3)]
    check_shards(run)
    schema = pyarrow.parquet.read_schema(run / "shards/train-00000.parquet")
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert features.keys() == set(schema.names)
    for name in names(run):
        for row in pyarrow.parquet.read_table(run / "shards" / name).to_pylist():
            pixels = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
            assert np.array_equal(pixels, noise_pictures(seed=row["seed"])[0])
            assert json.loads(row["record"])["item"] == row["source"]


def test_a_shard_is_bounded_by_its_bytes(tmp_path: Path) -> None:
    with process(tmp_path / "run", shards(shard_pictures=10_000, shard_mb=0.02)) as drawn:
        drawn.draw(range(8))
    sizes = [(tmp_path / "run/shards" / n).stat().st_size for n in names(tmp_path / "run") if n.endswith(".tar")]
    assert len(sizes) > 1
    assert max(sizes) <= 20_000 + tarfile.RECORDSIZE
    check_shards(tmp_path / "run")


def test_a_run_that_goes_on_fills_the_shard_that_has_room(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with process(run, shards(), complete=False) as drawn:
        drawn.draw(range(4))
    check_shards(run)  # it can be read while the run pauses
    with process(run, shards()) as drawn:
        drawn.draw(range(4, 9))
    assert [name for name in names(run) if name.endswith(".tar")] == ["00000.tar", "00001.tar", "00002.tar"]
    check_shards(run)


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("tail", [b"\0", b"x" * 700, bytes(100_000)])
def test_what_a_killed_process_left_behind_the_last_sample_is_cut_off(
    tmp_path: Path, layout: Layout, tail: bytes
) -> None:
    run = tmp_path / "run"
    drawn = Process(run, shards(layout=layout))
    drawn.draw(range(2))
    drawn.leave()
    with open(run / "shards/00000.tar", "ab") as file:
        file.write(tail)
    (run / "shards/00007.tar").write_bytes(tail)  # of a worker that no line tells of
    (run / "shards/train-00003.parquet.tmp").write_bytes(tail)
    with process(run, shards(layout=layout)) as drawn:
        drawn.draw(range(2, 4))
    assert "00007.tar" not in names(run)
    assert not [name for name in names(run) if name.endswith(".tmp")]
    check_shards(run)


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("finished", [False, True])
def test_a_picture_that_was_damaged_is_in_the_shards_once(tmp_path: Path, layout: Layout, finished: bool) -> None:
    run = tmp_path / "run"
    drawn = Process(run, shards(layout=layout))
    drawn.draw(range(3))
    if finished:
        drawn.writer.settle(complete=True)
    drawn.leave()
    ledger = Ledger.load(run / "records.jsonl")
    place = ledger.entries[item(1)].place
    assert place is not None
    with open(run / place.shard, "r+b") as file:
        file.seek(place.offset + 100)
        file.write(b"!" * 16)
    with atomic.directory(run) as fd:
        found = {name: Pictures(fd).damage(name, entry, True) for name, entry in ledger.entries.items()}
        assert Pictures(fd).damage(item(1), ledger.entries[item(1)], False) is None
    assert found == {item(0): None, item(1): "its bytes changed", item(2): None}
    again = Process(run, shards(layout=layout), {item(1): "its bytes changed"})
    lost = Ledger.load(run / "records.jsonl").entries[item(1)]
    assert not lost.ok  # its place may be taken: were this process killed now, nobody reads it
    again.draw(range(1, 2))
    again.writer.settle(complete=True)
    again.leave()
    check_shards(run)
    assert len(digests(run)) == 3


def test_a_shard_that_was_cut_off_or_removed_is_noticed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with process(run, shards()) as drawn:
        drawn.draw(range(5))
    entries = Ledger.load(run / "records.jsonl").entries
    os.truncate(run / "shards/00000.tar", 12_000)
    os.remove(run / "shards/00001.tar")
    with atomic.directory(run) as fd:
        pictures = Pictures(fd)
        reasons = {entry.place.shard[7:12] + str(pictures.damage(name, entry, False)) for name, entry in entries.items()
                   if entry.place is not None}  # fmt: skip
    assert reasons == {"00000None", "00000shards/00000.tar was cut off", "00001deleted"}


def test_workers_have_shards_of_their_own(tmp_path: Path) -> None:
    run = tmp_path / "run"
    drawn = Process(run, shards(shard_pictures=2))
    token = drawn.dir.admit_workers()
    lines = []
    workers = [RunDirectory.join(run, token) for _ in range(3)]
    files = [ShardFiles(worker, shards(shard_pictures=2)) for worker in workers]
    for seed in range(9):
        one = files[seed % 3].picture(request(seed), noise_pictures(seed=seed)[0], 0.0)
        if seed != 7:  # that worker dies before it can tell
            lines.append(one)
    drawn.writer.record([request(seed) for seed in range(9) if seed != 7], lines)
    drawn.writer.flush()
    assert {line.line["shard"] for line in lines} == {f"shards/{n:05d}.tar" for n in range(6)} - {"shards/00004.tar"}
    drawn.writer.settle(complete=False)
    drawn.leave()
    check_shards(run)
    assert "00004.tar" not in names(run)


def test_a_full_shard_is_finished_while_the_run_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    drawn = Process(run, shards(layout=Layout.parquet))
    drawn.draw(range(4))
    files = drawn.writer.files
    assert isinstance(files, ShardFiles)
    for future in list(files._finishing):
        future.result(60)
    assert names(run) == ["00001.tar", "train-00000.parquet"]
    assert all(drawn.ledger.entries[item(seed)].ok for seed in range(4))
    drawn.leave()


def test_failures_are_in_the_ledger_alone(tmp_path: Path) -> None:
    with process(tmp_path, shards()) as drawn:
        drawn.writer.fail(request(1), "it was not to be")
        drawn.draw(range(2, 3))
    assert [outcome.status for outcome in drawn.outcomes] == ["failed", "ok"]
    assert not (tmp_path / "items").exists()
    assert b"it was not to be" in (tmp_path / "records.jsonl").read_bytes()
    check_shards(tmp_path)


def test_folders_become_shards_and_back_when_a_run_goes_on(tmp_path: Path) -> None:
    with process(tmp_path, Output(min_free_gb=0)) as drawn:
        drawn.draw(range(2))
    with process(tmp_path, shards()) as drawn:
        drawn.draw(range(2, 4))
    with process(tmp_path, Output(min_free_gb=0)) as drawn:
        drawn.draw(range(4, 5))
    entries = Ledger.load(tmp_path / "records.jsonl").entries
    assert [entries[item(seed)].place is not None for seed in range(5)] == [False, False, True, True, False]
    check_shards(tmp_path)
    with atomic.directory(tmp_path) as fd:
        assert not any(Pictures(fd).damage(name, entry, True) for name, entry in entries.items())


def test_pictures_are_found_by_both_of_their_names(tmp_path: Path) -> None:
    with process(tmp_path, shards()) as drawn:
        drawn.draw(range(3))
    entry = Ledger.load(tmp_path / "records.jsonl").entries[item(1)]
    for name in (f"{item(1)}/image.png", "shards/00000.tar/000000001.png"):
        with open_picture(tmp_path / name) as file:
            assert hashlib.sha256(file.read()).hexdigest() == entry.sha256
    for name in ("items/0000_a/seed_9/image.png", "shards/00000.tar/000000009.png", "shards/x/y", "a.png"):
        assert shared_picture(tmp_path / name) is None
    with pytest.raises(FileNotFoundError):
        open_picture(tmp_path / "items/0000_a/seed_9/image.png")


@pytest.mark.parametrize(
    "change",
    [
        {"shard": "../../etc/passwd"}, {"shard": "shards/../x.tar"}, {"shard": 5}, {"offset": -1}, {"offset": "0"},
        {"record_bytes": 1 << 62}, {"offset": None},
    ],
)  # fmt: skip
def test_places_of_others_are_not_believed(tmp_path: Path, change: dict[str, Any]) -> None:
    with process(tmp_path, shards()) as drawn:
        drawn.draw(range(1))
    record = json.loads((tmp_path / "records.jsonl").read_bytes())
    record.pop("crc32")
    (tmp_path / "records.jsonl").write_text(json.dumps(record | change) + "\n", encoding="utf-8")
    ledger = Ledger.load(tmp_path / "records.jsonl")
    assert (ledger.damaged, ledger.entries) == (1, {})


def test_a_place_behind_the_end_of_a_shard_is_an_error_not_a_huge_reservation(tmp_path: Path) -> None:
    with process(tmp_path, shards()) as drawn:
        drawn.draw(range(1))
    entry = Ledger.load(tmp_path / "records.jsonl").entries[item(0)]
    far = Finished(tmp_path, item(0), entry._replace(size=1 << 50))
    with pytest.raises(OSError, match="cut off"):
        far.picture.read_bytes()
    os.remove(tmp_path / "shards/00000.tar")
    os.symlink("/etc/passwd", tmp_path / "shards/00000.tar")
    with pytest.raises(OSError, match="a link"):
        Finished(tmp_path, item(0), entry).picture.read_bytes()


def test_a_full_disk_leaves_no_part_of_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Process(tmp_path, shards())
    drawn.draw(range(1))
    before = (tmp_path / "shards/00000.tar").stat().st_size
    write_all = atomic.write_all

    def full(fd: int, data: bytes) -> None:
        if len(data) > 1000:
            os.write(fd, data[:500])
            raise OSError(28, "No space left on device")
        write_all(fd, data)

    monkeypatch.setattr(atomic, "write_all", full)
    with pytest.raises(RunStopped, match="free some space"):
        drawn.draw(range(1, 2))
    assert (tmp_path / "shards/00000.tar").stat().st_size == before
    with pytest.raises(RunStopped):
        drawn.leave()
    monkeypatch.undo()
    drawn.ledger.close()
    drawn.dir.close()
    with process(tmp_path, shards()) as drawn:
        drawn.draw(range(1, 3))
    check_shards(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_pictures": 0}, "output.shard_pictures=0"),
        ({"shard_pictures": 10_001}, "output.shard_pictures=10001"),
        ({"shard_mb": 0}, "output.shard_mb=0"),
        ({"upload": "bucket/folder"}, "write an address"),
        ({"upload": "s3://"}, "write an address"),
        ({"keep": False}, "needs output.upload"),
        ({"keep": False, "upload": "file:///tmp/x"}, "not read back from file://"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Shards(**options)


def test_without_pyarrow_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"zimage-runner\[parquet\]"):
        Shards()


def test_every_option_of_folders_is_one_of_shards() -> None:
    assert {f.name for f in dataclasses.fields(Output)} < {f.name for f in dataclasses.fields(Shards)}
