"""``python -m zimage_runner.compare``: runs against runs, and options against options."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zimage_runner import compare, prepare
from zimage_runner.cli.main import main as run
from zimage_runner.engines.precision import likeness_key, likeness_text
from zimage_runner.errors import UserError
from zimage_runner.model import Model, Source
from zimage_runner.outputs.summary import _likeness_rows
from zimage_runner.weights.cache import read_entry
from zimage_runner.weights.find.resolve import resolve
from zimage_runner.weights.prepared import figures, prepared
from zimage_runner.weights.prepared.prepare import build

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


def test_figures_are_kept_with_the_copy(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("ZIMAGE_RUNNER_CACHE", str(tmp_path / "cache"))
    model = Model(name="zimage_nano", source=Source.embedded)
    checkpoint = resolve(model)
    copy = build(checkpoint, model, precision="fp8")
    second = altered(first, tmp_path / "second", 20, numerics={"precision": "fp8"})
    record = json.loads(next(second.rglob("record.json")).read_text(encoding="utf-8"))
    key = likeness_key(checkpoint.digest, record["numerics"])
    assert key is not None
    assert figures.known(copy.path, key) is None
    words = ["info", "model=zimage_nano", "engine.precision=fp8"]
    assert prepare.main(words) == 0
    assert "how near its pictures are to bf16's: " in capsys.readouterr().out

    summary = json.loads((second / "summary.json").read_text(encoding="utf-8"))
    summary["session"]["weights"] = str(copy.path)
    (second / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    before = os.umask(0)
    try:
        assert compare.main([str(first), str(second), f"into={tmp_path / 'into'}"]) == 0
    finally:
        os.umask(before)
    assert str(copy.path / "manifest.json") in capsys.readouterr().out
    found = prepared.find(checkpoint, model, precision="fp8")  # nothing else of it has changed
    assert found is not None
    known = figures.known(found.path, key)
    assert known is not None
    report = json.loads((tmp_path / "into" / "comparison.json").read_text(encoding="utf-8"))
    assert known["likeness"] == report["likeness"]
    assert found.manifest == copy.manifest | {"likeness": {key: known}}
    assert not (tmp_path / "cache" / "likeness").exists()
    assert prepare.main(words) == 0
    told = f"likeness to bf16 (precision fp8, attention {record['numerics']['attention']}): {likeness_text(known)}"
    assert told in capsys.readouterr().out.splitlines()

    older = json.dumps(found.manifest | {"version": 2})  # which is used, too
    (found.path / "manifest.json").write_text(older, encoding="utf-8")
    assert figures.known(found.path, key) == known
    manifest = found.manifest | {"likeness": {key: {"likeness": {"psnr": "near"}}}}
    (found.path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert figures.known(found.path, key) is None


@pytest.mark.parametrize("changed", ["source", "precision"])
def test_figures_of_other_weights_go_to_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    monkeypatch.setenv("ZIMAGE_RUNNER_CACHE", str(tmp_path / "cache"))
    copy = tmp_path / "copy"
    copy.mkdir()
    manifest = {
        "format": prepared.FORMAT, "version": prepared.VERSION, "source": {"digest": "d"}, "components": {},
        "config_files": [], "lossless": False, "precision": "bf16" if changed == "precision" else "fp8",
    }  # fmt: skip
    (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (tmp_path / "summary.json").write_text(json.dumps({"session": {"weights": str(copy)}}), encoding="utf-8")
    near = {name: {"mean": 1.0, "worst": 2.0} for name in ("psnr", "flip")}
    kept = figures.keep(tmp_path, "other" if changed == "source" else "d", "key", {"pictures": 2, "likeness": near})
    assert kept is not None
    assert kept.is_relative_to(tmp_path / "cache")
    assert json.loads((copy / "manifest.json").read_text(encoding="utf-8")) == manifest
    known = figures.known(copy, "key")
    assert known is not None
    assert known["likeness"] == near


def test_options_are_drawn(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(first), "seeds=[1,2]", f"into={tmp_path / 'into'}", "--", *OPTIONS[::2]]
    assert compare.main(words) == 0
    report = json.loads((tmp_path / "into" / "comparison.json").read_text(encoding="utf-8"))
    assert report["pictures"] == 1  # of seed 1
    assert report["likeness"]["flip"]["worst"] == 0


@pytest.mark.parametrize(
    ("way", "why"),
    [
        ("seeds=nonsense", "'nonsense' is neither a seed nor a range"),
        ("engine.precision=fp8", "engine.precision=fp8 needs a CUDA GPU"),
        ("engine=native engine.attention=cudnn", "engine.attention=cudnn needs a CUDA GPU"),
    ],
)
def test_nothing_is_drawn_where_one_way_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], way: str, why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert compare.main(["seeds=1", way, "--", *OPTIONS[::2]]) == 2
    err = capfd.readouterr().err
    assert why in err
    assert f"zimage_runner: {way} cannot be drawn (exit code 2), and so nothing was: see above" in err
    assert compare.main(["seeds=1", "engine.device=cuda", "--", *OPTIONS[::2]]) == 2
    assert "engine.device=cuda cannot be drawn, and so nothing was: engine.device=cuda but no" in capfd.readouterr().err
    assert not list(tmp_path.rglob("*"))


def test_what_ray_draws_needs_no_gpu_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults: [{override /executor: ray}]\n"
    (tmp_path / "experiment/far.yaml").write_text(text, encoding="utf-8")
    options = [f"--config-dir={tmp_path}", "+experiment=far", *OPTIONS[::2]]
    compare._check("engine.precision=fp8", tmp_path / "into", options)
    with pytest.raises(UserError, match="executor=inline cannot be drawn"):
        compare._check("engine.precision=fp8 executor=inline", tmp_path / "into", options)


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
        (["A", "prompt='b"], "prompt='b: No closing quotation: close what is quoted within the options"),
        (["A", "A", "into=file"], "into=file is a file: name a folder"),
        (["A", "A", "into="], "into= is empty: write what is meant, or leave it out"),
        (["A", "A", "floor="], "floor= is empty: write what is meant, or leave it out"),
        (["A", ""], "a word is empty: write what is meant, or leave it out"),
    ],
)
def test_bad_input(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    if "B" in words:
        altered(first, tmp_path / "B", 0, prompt="a cat")
    named = [str(first) if word == "A" else word for word in words]
    assert compare.main(named) == 2
    assert message in capsys.readouterr().err
