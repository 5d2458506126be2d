"""``python -m zimage_runner.compare``: runs against runs, and options against options."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zimage_runner import compare
from zimage_runner.cli.main import main as run
from zimage_runner.engines.precision import likeness_key
from zimage_runner.outputs.summary import _likeness_rows
from zimage_runner.weights.cache import read_entry

OPTIONS = ["prompt=a red fox", "seeds=[0,1]", "sampling.num_inference_steps=1"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two pictures."""
    root = tmp_path_factory.mktemp("runs")
    assert run([*OPTIONS, f"output.root={root}", "name=first"]) == 0
    (found,) = root.glob("first/*")
    return found


def altered(first: Path, target: Path, amount: int, **record: object) -> Path:
    """A copy of a run whose pictures are brighter and whose records say something else."""
    shutil.copytree(first, target)
    for path in target.rglob("image.png"):
        pixels, size = np.asarray(Image.open(path)).astype(int), path.stat().st_size
        Image.fromarray(np.clip(pixels + amount, 0, 255).astype(np.uint8)).save(path)
        path.write_bytes(path.read_bytes().ljust(size + 1, b"\0"))  # a shorter one would be taken for cut off
        said = json.loads((path.parent / "record.json").read_text(encoding="utf-8"))
        said |= {name: value for name, value in record.items() if name != "numerics"}
        said["numerics"] |= record.get("numerics", {})  # pyright: ignore[reportOperatorIssue]
        (path.parent / "record.json").write_text(json.dumps(said), encoding="utf-8")
    return target


def test_two_runs_and_a_floor(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("ZIMAGE_RUNNER_CACHE", str(tmp_path / "cache"))
    second = altered(first, tmp_path / "second", 20, numerics={"precision": "fp8"})
    floor = altered(first, tmp_path / "floor", 1)
    into = tmp_path / "into"
    assert compare.main([str(first), str(second), f"floor={floor}", f"into={into}", "worst=1"]) == 0
    report = json.loads((into / "comparison.json").read_text(encoding="utf-8"))
    assert report["pictures"] == len(report["pairs"]) == 2
    assert report["likeness"]["psnr"]["worst"] <= report["likeness"]["psnr"]["mean"] < 30
    assert report["floor"]["psnr"]["worst"] > 40
    assert report["likeness"]["flip"]["worst"] >= report["likeness"]["flip"]["mean"] > report["floor"]["flip"]["worst"]
    with Image.open(into / "worst.png") as sheet:
        assert sheet.width > 2 * 128
    out = capsys.readouterr().out
    assert "noise floor" in out
    record = json.loads(next(second.rglob("record.json")).read_text(encoding="utf-8"))
    key = likeness_key(record["model"]["digest"], record["numerics"])
    assert key is not None
    kept = read_entry("likeness", key)
    assert kept is not None
    ((name, text),) = _likeness_rows({"likeness": kept})
    assert name == "likeness to bf16"
    assert text.startswith(f"PSNR {report['likeness']['psnr']['mean']:.1f} dB")
    assert f"noise floor {report['floor']['psnr']['mean']:.1f} dB" in text


def test_options_are_drawn(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(first), "seeds=[1,2]", f"into={tmp_path / 'into'}", "--", *OPTIONS[::2]]
    assert compare.main(words) == 0
    report = json.loads((tmp_path / "into" / "comparison.json").read_text(encoding="utf-8"))
    assert report["pictures"] == 1  # of seed 1
    assert report["likeness"]["flip"]["worst"] == 0


def test_figures_of_bf16_are_not_kept(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIMAGE_RUNNER_CACHE", str(tmp_path / "cache"))
    second = altered(first, tmp_path / "second", 2)
    assert compare.main([str(first), str(second), f"into={tmp_path / 'into'}"]) == 0
    assert not (tmp_path / "cache" / "likeness").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["A"], "1 way is named: give two, each a run directory or options in quotes"),
        (["A", "nowhere"], "nowhere is no run directory and no option: name a run, or options such as"),
        (["A", "A", "--", "seeds=1"], "seeds=1 has no effect: both runs are there already"),
        (["A", "A", "worst=0"], "worst=0: give a number of pairs"),
        (["A", "B"], "items/00000_a_red_fox/seed_0: its prompt is 'a red fox' in "),
        (["A", "empty"], "empty holds no run"),
    ],
)
def test_bad_input(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    if "B" in words:
        altered(first, tmp_path / "B", 0, prompt="a cat")
    named = [str(first) if word == "A" else word for word in words]
    assert compare.main(named) == 2
    assert message in capsys.readouterr().err
