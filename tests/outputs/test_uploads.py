"""Shards uploaded to a store: a server that speaks S3 on this machine, and fsspec's memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.support.shards import Process, item, names, process, shards
from tests.support.written_runs import noise_pictures
from zimage_runner.errors import RunStopped
from zimage_runner.outputs import atomic
from zimage_runner.outputs.config import Layout
from zimage_runner.outputs.finished import Finished
from zimage_runner.outputs.ledger import Ledger
from zimage_runner.outputs.metadata import read_metadata
from zimage_runner.outputs.survey import Pictures


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Address of an S3 server without any bucket."""
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    pytest.importorskip("s3fs", reason="the extra s3 is not installed")
    thread = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    thread.start()
    try:
        yield "http://{}:{}".format(*thread.get_host_and_port())
    finally:
        thread.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A bucket as a file system, found as users' tools find it: by the environment."""
    for name, value in {
        "AWS_ENDPOINT_URL": server, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"), "NO_PROXY": "127.0.0.1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    files = fsspec.filesystem("s3", use_listings_cache=False)
    type(files).clear_instance_cache()  # of another environment perhaps
    files = fsspec.filesystem("s3", use_listings_cache=False)
    files.mkdir("pictures")
    yield files
    type(files).clear_instance_cache()


@pytest.fixture
def memory() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def test_s3_has_the_shards_and_pictures_are_read_back_from_it(bucket: Any, tmp_path: Path) -> None:
    run = tmp_path / "cats" / "first"
    run.parent.mkdir()
    with process(run, shards(upload="s3://pictures/all/", keep=False)) as drawn:
        drawn.draw(range(4))
    assert names(run) == ["uploaded.json"]
    there = sorted(path.rpartition("/")[2] for path in bucket.ls("pictures/all/cats/first", refresh=True))
    assert there == ["00000.parquet", "00000.tar", "00001.parquet", "00001.tar"]
    entries = Ledger.load(run / "records.jsonl").entries
    with atomic.directory(run) as fd:
        assert not any(Pictures(fd).damage(name, entry, True) for name, entry in entries.items())
    for seed in range(4):
        found = Finished(run, item(seed), entries[item(seed)])
        recipe = read_metadata(found.picture.open()).recipe
        assert recipe is not None
        assert recipe["seed"] == json.loads(found.record.read_bytes())["seed"] == seed
    bucket.rm("pictures/all/cats/first/00000.tar")
    with pytest.raises(OSError, match="resume the run"):
        Finished(run, item(0), entries[item(0)]).picture.read_bytes()


@pytest.mark.parametrize("layout", list(Layout))
def test_a_full_shard_is_uploaded_at_once_and_the_rest_when_all_is_drawn(
    memory: Any, tmp_path: Path, layout: Layout
) -> None:
    run, output = tmp_path / "runs" / "one", shards(layout=layout, upload="memory://box")
    run.parent.mkdir()
    with process(run, output, complete=False) as drawn:
        drawn.draw(range(4))
    first = set(memory.find("/box"))
    assert len(first) == (1 if layout is Layout.parquet else 2)  # the second shard may grow
    with process(run, output) as drawn:
        drawn.draw(range(4, 5))
    second = set(memory.find("/box"))
    assert len(second) == 2 * len(first)
    for path in second:
        assert memory.cat_file(path) == (run / "shards" / path.rpartition("/")[2]).read_bytes()


def test_a_store_that_cannot_be_reached_stops_no_drawing(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto host")

    run, output = tmp_path / "runs" / "one", shards(upload="memory://box")
    run.parent.mkdir()
    monkeypatch.setattr(type(memory), "put_file", broken)
    drawn = Process(run, output)
    drawn.draw(range(7))
    with pytest.raises(RunStopped, match=r"memory://box/runs/one/00000.tar cannot be reached \(.*no route to host"):
        drawn.writer.settle(complete=True)
    drawn.leave()
    assert [outcome.status for outcome in drawn.outcomes] == ["ok"] * 7
    monkeypatch.undo()
    with process(run, output):
        pass
    assert len(memory.find("/box")) == 6


def test_a_run_whose_upload_failed_says_so_and_can_be_resumed(
    memory: Any, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    with monkeypatch.context() as patched:
        patched.setattr(type(memory), "put_file", broken)
        words = ["output=shards", "output.upload=memory://box", "prompt=a", "sampling.num_inference_steps=1"]
        code, out, err = cli(*words)
        run = Path(out.strip())
        assert code == 130
        assert re.search(r"stopped: memory://box/.*/00000.tar cannot be reached", err)
        assert f"resume={run}" in err
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        assert (summary["status"], summary["items"]["ok"]) == ("stopped", 1)
        code, _, err = cli(f"resume={run}")
        assert code == 130
        assert "cannot be reached" in err
    code, _, err = cli(f"resume={run}")
    assert code == 0, err
    assert len(memory.find("/box")) == 2
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["status"] == "complete"


def test_a_picture_that_was_damaged_here_is_there_once(memory: Any, tmp_path: Path) -> None:
    run, output = tmp_path / "runs" / "one", shards(upload="memory://box")
    run.parent.mkdir()
    with process(run, output) as drawn:
        drawn.draw(range(3))
    with process(run, output, damaged={item(1): "its bytes changed"}) as drawn:
        drawn.draw(range(1, 2))
    there = {path.rpartition("/")[2] for path in memory.find("/box")}
    assert there == {path for path in names(run) if path != "uploaded.json"}
    assert "00000.tar" not in there


@pytest.mark.parametrize("address", ["file:///etc/passwd", "http://127.0.0.1:9/x", "local:///etc/passwd", "x"])
def test_a_run_directory_of_others_names_no_file_to_be_read(tmp_path: Path, address: str) -> None:
    with process(tmp_path, shards()) as drawn:
        drawn.draw(range(1))
    (tmp_path / "shards/00000.tar").unlink()
    state = {"shards/00000.tar": {"address": address, "bytes": 1 << 30}}
    (tmp_path / "shards/uploaded.json").write_text(json.dumps(state), encoding="utf-8")
    entry = Ledger.load(tmp_path / "records.jsonl").entries[item(0)]
    with pytest.raises(OSError, match="not read back"):
        Finished(tmp_path, item(0), entry).picture.read_bytes()


def test_the_pictures_are_those_that_were_drawn(memory: Any, tmp_path: Path) -> None:
    import io

    import numpy as np
    from PIL import Image

    run = tmp_path / "runs" / "one"
    run.parent.mkdir()
    with process(run, shards(upload="memory://box", keep=False, layout=Layout.parquet)) as drawn:
        drawn.draw(range(3))
    entries = Ledger.load(run / "records.jsonl").entries
    for seed in range(3):
        data = Finished(run, item(seed), entries[item(seed)]).picture.read_bytes()
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), noise_pictures(seed=seed)[0])
