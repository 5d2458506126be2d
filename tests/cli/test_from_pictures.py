"""vary and enlarge: which runs they start from the pictures that they are given."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from zimage_runner.cli import enlarge, vary
from zimage_runner.cli.vary import _neighbours
from zimage_runner.errors import UserError


@pytest.fixture
def cat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A picture that another program drew with seed 9."""
    info = PngInfo()
    info.add_text("parameters", "a cat\nSteps: 5, Sampler: Euler, CFG scale: 1, Seed: 9, Size: 128x128")
    Image.new("RGB", (128, 128), "white").save(tmp_path / "cat.png", pnginfo=info)
    Image.new("RGB", (100, 80), "white").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cat.png"


def test_neighbours_are_near_in_noise(cat: Path) -> None:
    prompt = _neighbours(cat, {"n": "3", "amount": "0.25"})
    assert prompt.seeds == (10, 11, 12)
    assert prompt.overrides == {
        "num_inference_steps": 5, "guidance_scale": 0.0, "width": 128, "height": 128, "variation_seed": 9,
        "variation": 0.25,
    }  # fmt: skip
    assert prompt.metadata == {"varied_from": str(cat)}


def test_neighbours_are_near_in_what_they_show(cat: Path) -> None:
    prompt = _neighbours(cat, {"strength": "0.4"})
    assert (prompt.text, prompt.seeds) == ("a cat", (10, 11, 12, 13))
    assert (prompt.overrides["image"], prompt.overrides["strength"]) == (str(cat), 0.4)


def test_an_enlarged_picture_is_drawn_in_tiles(cat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert enlarge.main([str(cat), "scale=2", "dry_run=true"]) == 0
    out = capsys.readouterr().out
    assert "1 picture of 1 prompt" in out
    assert "256x256, 5 steps" in out
    assert "img2img at strength 0.15, tiles of 128" in out


def test_vary_starts_a_run(cat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vary.main([str(cat), "n=2", "name=near", "dry_run=true"]) == 0
    assert "2 pictures of 1 prompt" in capsys.readouterr().out


def test_the_same_line_again_continues_its_run(cat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [str(cat), "model=zimage_nano", "sampling.num_inference_steps=1", "output.min_free_gb=0", "continue=near"]
    assert vary.main([*line, "n=1"]) == 0
    assert vary.main([*line, "n=1"]) == 0
    assert "nothing to draw: 1 picture is done" in capsys.readouterr().err
    assert vary.main([*line, "n=2"]) == 2
    err = capsys.readouterr().err
    assert "the named pictures, or their n, amount, strength or scale, give other prompts than the run began wi" in err
    assert "jsonl" not in err


@pytest.mark.parametrize("words", [["executor=resident"], ["--config-dir=conf", "+experiment=warm"]])
def test_the_run_may_be_the_resident_process_s(cat: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    (cat.parent / "conf/experiment").mkdir(parents=True)
    (cat.parent / "conf/experiment/warm.yaml").write_text(
        "# @package _global_\ndefaults:\n- override /executor: resident\n", encoding="utf-8"
    )
    handed = []

    def hand_over(words: list[str], repeats: bool = False) -> int:
        handed.append((words, Path(words[1].partition("=")[2]).read_text(encoding="utf-8"), repeats))
        return 5

    monkeypatch.setattr("zimage_runner.resident.client.hand_over", hand_over)
    assert vary.main([str(cat), "n=1", *words]) == 5
    ((given, table, repeats),) = handed
    assert given[-len(words) :] == words
    assert '"varied_from"' in table
    assert repeats == (words[0] != "executor=resident")


@pytest.mark.parametrize(
    ("command", "words", "told"),
    [
        (vary, ["n=4"], "no picture is named: give picture files, run directories, folders of runs, or latest"),
        (vary, ["cat.png", "n=1.5"], "n=1.5: write a whole number"),
        (vary, ["cat.png", "n=0"], "n=0: write a number from 1 to 1000"),
        (vary, ["cat.png", "amount=2"], "amount=2: write a number from 0 to 1"),
        (
            vary,
            ["cat.png", "amount=0.5", "strength=0.5"],
            "amount and strength are two ways to vary a picture: keep one",
        ),
        (vary, ["photo.jpg"], "photo.jpg does not say how it was drawn"),
        (
            vary,
            ["photo.jpg", "strength=0.5"],
            "photo.jpg does not say what it shows, and there is no photo.txt beside it",
        ),
        (enlarge, ["nowhere.png"], "nowhere.png does not exist: name a picture, a run directory"),
        (enlarge, ["cat.png", "scale=x"], "scale=x: write a number from 1 to 16"),
        (enlarge, ["cat.png", "starred=maybe"], "starred=maybe: write true or false"),
        (enlarge, ["cat.png", "sampling.colour=red"], "sampling.colour"),
        (vary, ["cat.png", "prompt=x"], "prompt=x has no effect on pictures, which are drawn with their own prompts: "),
        (enlarge, ["cat.png", "+prompt=x"], "+prompt=x has no effect on pictures, which are drawn with their own"),
        (vary, ["cat.png", "prompts=text_file"], "prompts=text_file has no effect on pictures, which are drawn with"),
        (vary, ["cat.png", "prompts.texts=[x]"], "prompts.texts=[x] has no effect on pictures, which are drawn with"),
    ],
)
def test_what_is_refused(cat: Path, capsys: pytest.CaptureFixture[str], command, words: list[str], told: str) -> None:
    assert command.main(words) == 2
    assert told in capsys.readouterr().err


def test_a_photo_needs_its_text(cat: Path) -> None:
    with pytest.raises(UserError, match="does not say how it was drawn"):
        _neighbours(Path("photo.jpg"), {})
    Path("photo.txt").write_text("a dog", encoding="utf-8")
    assert _neighbours(Path("photo.jpg"), {"strength": "0.3"}).text == "a dog"
