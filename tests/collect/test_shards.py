"""Pictures of runs as WebDataset tar files and as Parquet, read back by those formats' own readers."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from tests.support.made_pictures import write_run
from zimage_runner.collect.__main__ import main
from zimage_runner.outputs.atomic import own_temporary


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    items = {(f"{n:05d}_a_cat_{n}", n): {"id": f"id{n}"} for n in range(7)}
    return write_run(tmp_path / "run", items)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def right(run: Path) -> dict[int, np.ndarray]:
    return {n: pixels(next(run.glob(f"items/*/seed_{n}/image.png")).read_bytes()) for n in range(7)}


def test_webdataset_is_read_by_its_own_package(run: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    assert main([str(run), "into=wds", "layout=webdataset", "shard_pictures=3"]) == 0
    assert sorted(path.name for path in Path("wds").iterdir()) == [
        "00000.parquet", "00000.tar", "00001.parquet", "00001.tar", "00002.parquet", "00002.tar"
    ]  # fmt: skip
    urls = [str(path) for path in sorted(Path("wds").glob("*.tar"))]
    samples = list(
        webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("__key__", "png", "txt", "json")
    )
    assert [key for key, *_ in samples] == [f"{n // 3:05d}{n % 3:04d}" for n in range(7)]
    for n, (key, picture, text, record) in enumerate(samples):
        assert np.array_equal(picture, right(run)[n])
        assert text == f"a cat {n}"
        assert (record["key"], record["caption"], record["seed"], record["status"]) == (key, text, n, "success")
    table = pyarrow.parquet.read_table("wds/00000.parquet").to_pylist()
    assert [row["key"] for row in table] == ["000000000", "000000001", "000000002"]
    assert table[1] == samples[1][3]
    assert json.loads(table[1]["record"])["id"] == "id1"


def test_parquet_is_what_the_hub_shows_as_pictures(run: Path) -> None:
    assert main([str(run), "into=hub", "layout=parquet", "shard_pictures=4", "format=webp", "quality=lossless"]) == 0
    files = sorted(Path("hub/data").iterdir())
    assert [file.name for file in files] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    schema = pyarrow.parquet.read_schema(files[0])
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert features.keys() == set(schema.names)
    rows = [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]
    assert [row["text"] for row in rows] == [f"a cat {n}" for n in range(7)]
    for n, row in enumerate(rows):
        assert row["image"]["path"].endswith(".webp")
        assert np.array_equal(pixels(row["image"]["bytes"]), right(run)[n])


def test_a_shard_is_bounded_by_its_bytes(run: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    lines = []
    for line in (run / "records.jsonl").read_text().splitlines():
        record = json.loads(line)
        Image.fromarray(noise).save(run / record["item"] / "image.png")
        lines.append(json.dumps(record | {"bytes": (run / record["item"] / "image.png").stat().st_size}) + "\n")
    (run / "records.jsonl").write_text("".join(lines))
    assert main([str(run), "into=wds", "layout=webdataset", "shard_mb=2"]) == 0
    counts = []
    for path in sorted(Path("wds").glob("*.tar")):
        with tarfile.open(path) as tar:
            counts.append(len(tar.getmembers()) // 3)
    assert counts == [2, 2, 2, 1]  # 0.8 MB each


def test_made_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "into=wds", "layout=webdataset", "shard_pictures=2"]) == 0
    before = Path("wds/00000.tar").read_bytes()
    assert main([str(run), "into=wds", "layout=webdataset"]) == 2
    assert "wds has 00000.parquet already: use another folder, or overwrite=true" in capsys.readouterr().err
    assert main([str(run), "into=wds", "layout=webdataset", "shard_pictures=2", "overwrite=true"]) == 0
    assert Path("wds/00000.tar").read_bytes() == before, "the same pictures make the same files"
    Path("wds/mine.txt").write_text("mine", encoding="utf-8")
    assert main([str(run), "into=wds", "layout=webdataset", "overwrite=true"]) == 2
    assert "wds has mine.txt, which is no shard" in capsys.readouterr().err
    assert Path("wds/00003.tar").exists()


def test_nothing_half_written_has_a_name(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "zimage_runner.collect.shards.Sample.data", lambda self: (_ for _ in ()).throw(OSError(5, "EIO"))
    )
    assert main([str(run), "into=wds", "layout=webdataset"]) == 2
    assert list(Path("wds").iterdir()) == []


@pytest.mark.parametrize(("layout", "folder"), [("webdataset", "all"), ("parquet", "all/data")])
def test_the_same_line_is_typed_again_after_a_call_was_killed(run: Path, layout: str, folder: str) -> None:
    Path(folder).mkdir(parents=True)
    left = Path(folder, own_temporary("00007.tar"))
    left.write_bytes(b"half")
    assert main([str(run), "into=all", f"layout={layout}"]) == 0
    assert not left.exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["layout=zip"], "layout=zip: write imagefolder, webdataset or parquet"),
        (["shard_mb=5"], "shard_mb=5 has no effect without layout=webdataset or layout=parquet"),
        (["layout=parquet", "shard_pictures=0"], "shard_pictures=0: write a whole number from 1 to 10000"),
        (["layout=parquet", "shard_pictures=20000"], "shard_pictures=20000: write a whole number from 1 to 10000"),
        (["layout=parquet", "shard_mb=0"], "shard_mb=0: write a whole number from 1 to 999999"),
        (["layout=webdataset", "name={seed}"], "name={seed} has no effect on layout=webdataset"),
    ],
)
def test_what_is_refused(run: Path, capsys: pytest.CaptureFixture[str], words: list[str], text: str) -> None:
    assert main([str(run), "into=out", *words]) == 2
    assert text in capsys.readouterr().err
    assert not Path("out").exists()


def test_without_pyarrow(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([str(run), "into=out", "layout=parquet"]) == 2
    assert "layout=parquet needs pyarrow: pip install 'zimage-runner[parquet]'" in capsys.readouterr().err
