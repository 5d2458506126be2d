"""Runs with a ControlNet, from the command line to the record: planned, refused, drawn, drawn again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.command import command
from tests.support.controlnets import TRANSFORMER, write_controlnet
from zimage_runner.cli import vary
from zimage_runner.model import Convention, Model, Source
from zimage_runner.pictures.recorded import recorded_controlnet
from zimage_runner.reproduce import main as reproduce
from zimage_runner.weights.find.controlnet import find_controlnet

FAST = ("warmup=none", "sampling.num_inference_steps=2", "output.report=false", "seeds=7")
NET = "model.controlnet=net.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With net.safetensors, edges.png, photo.png and mask.png in it."""
    folder = tmp_path_factory.mktemp("controlled")
    write_controlnet(folder / "net.safetensors", "2.1")
    rng = np.random.default_rng(0)
    for name in ("edges", "photo"):
        rough = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        rough.resize((128, 128), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    mask = np.zeros((128, 128), np.uint8)
    mask[32:96, 32:96] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


ROWS: list[dict[str, Any]] = [
    {"text": "a cat"},
    {"text": "a cat", "control_image": "edges.png"},
    {"text": "a cat", "control_path": "edges.png", "control_strength": 0.2, "control_end": 0.5},
    {"text": "a cat", "control_image": "edges.png", "preprocessor": "canny", "canny_low": 20, "canny_high": 60},
    {"text": "a cat", "control_image": "edges.png", "image": "photo.png", "mask": "mask.png", "mask_blur": 0},
]


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    code, out, err = command(folder, "prompts=jsonl", "prompts.path=rows.jsonl", NET, *FAST)
    assert code == 0, err
    return folder / out.strip()


def records(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text(encoding="utf-8")) for path in run.glob("items/*/*/record.json")]
    return sorted(found, key=lambda record: record["index"])


def pixels(run: Path, index: int) -> np.ndarray:
    (path,) = run.glob(f"items/{index:05d}_*/*/image.png")
    return np.asarray(Image.open(path))


def test_each_row_follows_its_own_picture(run: Path, folder: Path) -> None:
    drawn = [pixels(run, index) for index in range(len(ROWS))]
    assert len({picture.tobytes() for picture in drawn}) == len(ROWS)
    inputs = [record.get("inputs", {}) for record in records(run)]
    assert inputs[0] == {}
    net = find_controlnet(
        Model(name="nano", source=Source.embedded, controlnet=str(folder / "net.safetensors")), TRANSFORMER
    )
    assert net is not None
    for said in inputs[1:]:
        assert said["controlnet"] == {"path": str(net.path), "digest": net.digest, "convention": "trained"}
        assert said["control_image"]["path"] == str(folder / "edges.png")
    assert [said["control_scale"] for said in inputs[1:]] == [0.75, 0.2, 0.75, 0.75]
    assert inputs[2]["control_end"] == 0.5
    assert (inputs[3]["control_preprocess"], inputs[3]["canny_low"], inputs[3]["canny_high"]) == ("canny", 20, 60)
    photo = np.asarray(Image.open(folder / "photo.png"))
    outside = np.asarray(Image.open(folder / "mask.png")) == 0
    assert (drawn[4][outside] == photo[outside]).all()
    assert (drawn[4][~outside] != photo[~outside]).any()


def test_a_picture_without_a_control_picture_is_the_same_without_a_controlnet(run: Path, folder: Path) -> None:
    code, out, err = command(folder, "prompt=a cat", *FAST)
    assert code == 0, err
    assert (pixels(folder / out.strip(), 0) == pixels(run, 0)).all()
    assert records(folder / out.strip())[0]["fingerprint"] == records(run)[0]["fingerprint"]


@pytest.mark.parametrize("place", ["memory=staged", "memory=streamed", "executor=process"])
def test_wherever_the_weights_are(place: str, run: Path, folder: Path) -> None:
    words = ("prompts=jsonl", "prompts.path=rows.jsonl", "prompts.offset=4", NET, place, *FAST)
    code, out, err = command(folder, *words)
    assert code == 0, err
    assert (pixels(folder / out.strip(), 4) == pixels(run, 4)).all()


def test_the_embedded_controlnet_is_found_wherever_the_package_was() -> None:
    for path in ("zimage_nano_canny.safetensors", "/another/machine/zimage_nano_canny.safetensors"):
        said = {"controlnet": {"path": path, "digest": "0" * 64, "convention": "trained"}}
        assert recorded_controlnet(said, "cat.png") == ("embedded", Convention.trained)


def test_together_in_one_batch(run: Path, folder: Path) -> None:
    words = ("prompts=jsonl", "prompts.path=rows.jsonl", NET, "engine.batch_size=4", *FAST)
    code, out, err = command(folder, *words)
    assert code == 0, err
    for index in range(len(ROWS)):
        difference = pixels(folder / out.strip(), index).astype(int) - pixels(run, index)
        assert abs(difference).max() <= 1  # float32's rounding turns a pixel by a grey level


def test_the_convention_is_another_picture(run: Path, folder: Path) -> None:
    words = ("prompts=jsonl", "prompts.path=rows.jsonl", "prompts.offset=1", "prompts.limit=1", NET)
    code, out, err = command(folder, *words, "model.controlnet_convention=diffusers", *FAST)
    assert code == 0, err
    (other,), first = records(folder / out.strip()), records(run)[1]
    assert other["inputs"]["controlnet"]["convention"] == "diffusers"
    assert other["fingerprint"] != first["fingerprint"]
    assert (pixels(folder / out.strip(), 1) != pixels(run, 1)).any()


def test_drawn_again_from_its_own_metadata(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (picture,) = run.glob("items/00003_*/*/image.png")
    assert reproduce([str(picture), "output_file=again.png"]) == 0, capsys.readouterr().err
    assert (np.asarray(Image.open("again.png")) == pixels(run, 3)).all()


def test_neighbours_are_drawn_with_the_same_controlnet(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures = [str(next(run.glob(f"items/0000{index}_*/*/image.png"))) for index in (0, 1)]
    assert vary.main([*pictures, "n=1", "dry_run=true"]) == 0, capsys.readouterr().err
    assert f"{folder / 'net.safetensors'} (Union 2.1" in capsys.readouterr().out


def test_a_controlnet_that_is_gone_is_asked_for(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (picture,) = run.glob("items/00001_*/*/image.png")
    (folder / "net.safetensors").rename(tmp_path / "moved.safetensors")
    try:
        assert reproduce([str(picture), "output_file=again.png"]) == 2
        assert "which is not there: model.controlnet=FILE says where it is now" in capsys.readouterr().err
        assert reproduce([str(picture), "output_file=again.png", "model.controlnet=moved.safetensors"]) == 0
    finally:
        (tmp_path / "moved.safetensors").rename(folder / "net.safetensors")


def test_a_dry_run_says_what_follows_what(folder: Path) -> None:
    code, out, err = command(folder, "prompt=a cat", "sampling.control_image=edges.png", NET, "dry_run=true", *FAST)
    assert code == 0, err
    assert "Union 2.1, 3 control layers, 33 channels" in out
    assert str(folder / "edges.png") in out


CONTROL = "sampling.control_image=edges.png"
REFUSED = [
    ((CONTROL,), "needs a ControlNet to follow it: set model.controlnet=FILE"),
    ((CONTROL, NET, "engine=diffusers"), "engine=diffusers does not draw from pictures: use engine=native"),
    ((CONTROL, NET, "sampling.control_scale=-1"), "sampling.control_scale=-1.0 is out of range"),
    ((CONTROL, NET, "sampling.control_start=0.5", "sampling.control_end=0.5"), "the start below the end"),
    ((CONTROL, NET, "sampling.canny_low=50"), "sampling.canny_low=50 says nothing without control_preprocess=canny"),
    (
        (CONTROL, NET, "sampling.control_preprocess=canny", "sampling.canny_low=90", "sampling.canny_high=80"),
        "sampling.canny_low=90 is above sampling.canny_high=80",
    ),
    ((NET, "sampling.control_preprocess=canny"), "control_preprocess=canny says nothing without a control_image"),
    ((NET, "sampling.control_end=0.5"), "control_end=0.5 says nothing without a control_image"),
    ((CONTROL, NET, "sampling.control_preprocess=depth"), "control_preprocess"),
    ((CONTROL, "model.controlnet=edges.png"), "is a picture: give a .safetensors or .gguf file"),
    ((CONTROL, "model.controlnet=gone.safetensors"), "gone.safetensors: no such file or directory"),
    (
        (CONTROL, "model.controlnet=Embeded"),
        "Embeded: no such file or directory; did you mean model.controlnet=embedded?",
    ),
]


@pytest.mark.parametrize(("words", "text"), REFUSED)
def test_refused_in_one_line_before_anything_is_loaded(words: tuple[str, ...], text: str, folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    code, out, err = command(folder, "prompt=a cat", *words, *FAST)
    assert (code, out) == (2, "")
    assert text in err
    assert err.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_a_controlnet_that_steers_nothing_is_told(folder: Path) -> None:
    code, _, err = command(folder, "prompt=a cat", NET, "dry_run=true", *FAST)
    assert code == 0
    assert "steers nothing here: no prompt has a control_image" in err
