"""Runs with output=shards from the command line, beside a run of folders: the same pictures for every reader."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.command import command
from tests.support.shards import check_shards
from zimage_runner import compare, reproduce
from zimage_runner.collect.__main__ import main as collect
from zimage_runner.collect.pictures import pictures_of
from zimage_runner.outputs.ledger import Ledger
from zimage_runner.runner import pool
from zimage_runner.signals import StopRequest
from zimage_runner.view.report import write_report

WORDS = [
    "prompts.texts=[a red fox, a blue ball]", "seeds=[0,1]", "sampling.num_inference_steps=1", "warmup=none",
    "output.shard_pictures=3",
]  # fmt: skip
RUNS = {
    "folders": [*WORDS[:-1], "output=folders"],
    "webdataset": [*WORDS, "output=shards"],
    "parquet": [*WORDS, "output=shards", "output.layout=parquet", "output.metadata=false"],
}
SHARDS = ["webdataset", "parquet"]


@pytest.fixture(scope="module", autouse=True)
def warm() -> Iterator[None]:
    """One loaded model for all tests here."""
    with pool.shared_executor(StopRequest()):
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, warm: None) -> dict[str, Path]:
    """Drawn once; no test changes them."""
    root = tmp_path_factory.mktemp("runs")
    for name, words in RUNS.items():
        code, _, err = command(root, *words, f"hydra.run.dir={root / name}")
        assert code == 0, err
    return {name: root / name for name in RUNS}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def pixels(run: Path) -> dict[str, np.ndarray]:
    found = {}
    for picture in pictures_of([run]):
        with picture.image.open() as stream, Image.open(stream) as image:
            found[picture.item] = np.asarray(image.convert("RGB"))
    return found


@pytest.mark.parametrize("name", SHARDS)
def test_the_pictures_are_those_of_folders(runs: dict[str, Path], name: str) -> None:
    expected, found = pixels(runs["folders"]), pixels(runs[name])
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[item], found[item]) for item in expected)
    assert not (runs[name] / "items").exists()
    check_shards(runs[name])
    prints = [{i: e.fingerprint for i, e in Ledger.load(runs[n] / "records.jsonl").entries.items()} for n in RUNS]
    assert prints[0] == prints[1] == prints[2]


@pytest.mark.parametrize("name", SHARDS)
def test_resume_and_verify_have_nothing_to_do(runs: dict[str, Path], name: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in (runs[name] / "shards").iterdir()}
    code, _, err = command(Path.cwd(), f"resume={runs[name]}", "verify=true")
    assert code == 0
    assert "nothing to draw: 4 pictures are done" in err
    assert before == {path: path.stat().st_mtime_ns for path in (runs[name] / "shards").iterdir()}


def test_a_picture_is_drawn_again_from_a_shard(runs: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("items/00001_a_blue_ball/seed_1/image.png", "shards/00001.tar/000010000.png"):
        assert reproduce.main([str(runs["webdataset"] / name)]) == 0
        assert "identical" in capfd.readouterr().out
    assert reproduce.main([str(runs["webdataset"] / "shards/00000.tar/000000009.png")]) == 2
    assert "does not exist" in capfd.readouterr().err


@pytest.mark.parametrize("name", SHARDS)
def test_prompts_are_read_from_the_pictures_of_shards(runs: dict[str, Path], name: str) -> None:
    words = ["prompts=images", f"prompts.path={runs[name]}", "dry_run=true"]
    code, out, err = command(Path.cwd(), *words)
    assert code == 0, err
    assert "2 prompts" in out
    assert "4 pictures" in out
    one = runs[name] / "items/00000_a_red_fox/seed_0/image.png"
    code, out, err = command(Path.cwd(), "prompts=images", f"prompts.path={one}", "dry_run=true")
    assert code == 0, err
    assert "1 picture" in out


@pytest.mark.parametrize("name", SHARDS)
def test_collect_takes_them_into_every_layout(runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    for _ in range(2):  # what is there already and the same is left
        assert collect([str(runs[name]), "into=pictures", "sheet=sheet.png"]) == 0
        assert collect([str(runs[name]), "into=webp", "format=webp"]) == 0
    assert len(list(Path("pictures").glob("*.png"))) == 4
    rows = [json.loads(line) for line in Path("pictures/metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = pixels(runs["folders"])
    for row in rows:
        item = Path(row["source"]).parent.relative_to(runs[name])
        assert np.array_equal(np.asarray(Image.open(Path("pictures", row["file_name"]))), expected[str(item)])
    for layout in SHARDS:
        assert collect([str(runs[name]), f"into={layout}", f"layout={layout}"]) == 0
    assert Path("webdataset/00000.tar").exists()
    assert Path("sheet.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", SHARDS)
def test_compare_says_that_nothing_differs(runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    assert compare.main([str(runs["folders"]), str(runs[name]), f"into={tmp_path / 'into'}"]) == 0
    report = json.loads((tmp_path / "into/comparison.json").read_bytes())
    assert report["pictures"] == 4
    assert {(pair["flip"], pair["psnr"]) for pair in report["pairs"]} == {(0, None)}


@pytest.mark.parametrize("name", SHARDS)
def test_the_gallery_and_the_report_show_them(runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="the extra web is not installed")
    from starlette.testclient import TestClient

    from tests.support.gallery import opened

    with opened(runs[name], tmp_path / "cache") as (_, app):
        client = TestClient(app, base_url="http://127.0.0.1:8188")
        listed = client.get("/api/pictures", params={"limit": 10}).json()
        assert listed["total"] == 4
        entries = Ledger.load(runs[name] / "records.jsonl").entries
        for row in listed["pictures"]:
            details = client.get(f"/api/picture/{row['id']}").json()
            assert details["damage"] == ""
            assert details["shard"].startswith("shards/")
            assert details["record"]["prompt"] == details["prompt"]
            entry = entries[details["file"].rpartition("/")[0]]
            assert len(client.get(f"/picture/{row['id']}").content) == entry.size
            assert client.get(f"/thumb/{row['id']}").status_code == 200
        grid = client.get("/api/grid.png", params={"columns": "seed", "rows": "prompt"})
        assert grid.content.startswith(b"\x89PNG")
    page = write_report(runs[name]).read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") == 4
    assert "the file is missing" not in page
    assert 'href="items/' not in page


@pytest.mark.parametrize(
    ("source", "target"), [("webdataset", "folders"), ("folders", "parquet"), ("parquet", "webdataset")]
)
def test_an_earlier_runs_pictures_are_taken_over(
    runs: dict[str, Path], source: str, target: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    code, _, err = command(tmp_path, *RUNS[target], f"skip_existing={runs[source]}", f"hydra.run.dir={run}")
    assert code == 0, err
    summary = json.loads((run / "summary.json").read_bytes())
    assert summary["items"]["linked"] == 4
    expected = pixels(runs["folders"])
    assert all(np.array_equal(expected[item], found) for item, found in pixels(run).items())
    if target != "folders":
        check_shards(run)


def test_the_same_prompt_twice_and_a_picture_of_ones_own(tmp_path: Path) -> None:
    words = ["sampling.num_inference_steps=1", "warmup=none", "output=shards", "output.shard_pictures=1"]
    code, _, err = command(
        tmp_path, "prompts.texts=[a red fox, a red fox, a red fox]", *words, f"hydra.run.dir={tmp_path / 'a'}"
    )
    assert code == 0, err
    code, _, err = command(tmp_path, "prompt=a red fox", *words, "output_file=x.png", f"hydra.run.dir={tmp_path / 'b'}")
    assert code == 0, err
    check_shards(tmp_path / "a")
    assert len({picture.tobytes() for picture in pixels(tmp_path / "a").values()}) == 1
    written = Path("x.png").read_bytes()
    os.remove("x.png")
    assert command(tmp_path, f"resume={tmp_path / 'b'}")[0] == 0
    assert Path("x.png").read_bytes() == written


def test_a_picture_that_changed_is_drawn_again(
    runs: dict[str, Path], tmp_path: Path, copied: Callable[[str], Path]
) -> None:
    run = copied("webdataset")
    expected = pixels(run)
    place = Ledger.load(run / "records.jsonl").entries["items/00000_a_red_fox/seed_1"].place
    assert place is not None
    with open(run / place.shard, "r+b") as file:
        file.seek(place.offset + 200)
        file.write(b"\0" * 32)
    code, _, err = command(tmp_path, f"resume={run}", "verify=true")
    assert code == 0, err
    assert "1 is damaged and drawn again" in err
    check_shards(run)
    assert all(np.array_equal(expected[item], found) for item, found in pixels(run).items())
    assert len(pixels(run)) == 4


@pytest.fixture
def copied(runs: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """``copied(name)``: a copy of a run that may be changed."""
    import shutil

    return lambda name: Path(shutil.copytree(runs[name], tmp_path / "copy"))


def test_pictures_to_start_from_are_collected_first(runs: dict[str, Path]) -> None:
    from zimage_runner.cli.chosen import _pictures
    from zimage_runner.errors import UserError

    assert len(_pictures([str(runs["folders"])], {})) == 4
    with pytest.raises(UserError, match=r"has its pictures in shards.* collect .* into=FOLDER"):
        _pictures([str(runs["webdataset"])], {})
