"""prompts=folder: pictures that are redrawn, with the prompt beside them or their own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from zimage_runner.errors import UserError
from zimage_runner.prompts import Prompt, read_prompts
from zimage_runner.prompts.folder import Folder


def drawn(path: Path, text: str = "") -> Path:
    """A picture; with a text one that A1111 says it drew."""
    info = PngInfo()
    if text:
        info.add_text("parameters", f"{text}\nSteps: 5, Sampler: Euler, CFG scale: 1, Seed: 9, Size: 64x32")
    Image.new("RGB", (64, 32), "white").save(path, pnginfo=info)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a.png says how it was drawn, b.jpg has a text beside it, c.png both; masks of all in masks/."""
    drawn(tmp_path / "a.png", "a cat")
    Image.new("RGB", (64, 32), "white").save(tmp_path / "b.jpg")
    (tmp_path / "b.txt").write_text("a dog\non a roof\n", encoding="utf-8")
    drawn(tmp_path / "c.png", "a bird")
    (tmp_path / "c.txt").write_text("一只鸟", encoding="utf-8")
    (tmp_path / "masks").mkdir()
    for name in "abc":
        drawn(tmp_path / "masks" / f"{name}.png")
    return tmp_path


def read(folder: Path, **options: Any) -> list[Prompt]:
    return read_prompts(Folder(path=str(folder), masks=str(folder / "masks"), **options))


def test_each_picture_has_its_prompt_and_its_mask(folder: Path) -> None:
    prompts = read(folder)
    assert [(p.id, p.text, p.seeds) for p in prompts] == [
        ("a", "a cat", (9,)), ("b", "a dog\non a roof", None), ("c", "一只鸟", (9,)),
    ]  # fmt: skip
    for prompt, name in zip(prompts, ("a.png", "b.jpg", "c.png"), strict=True):
        assert prompt.overrides["image"] == str(folder / name)
        assert prompt.overrides["mask"] == str(folder / "masks" / f"{name[0]}.png")
        assert not {"width", "height"} & prompt.overrides.keys()
    assert prompts[0].overrides["num_inference_steps"] == 5


def test_one_text_for_all(folder: Path) -> None:
    assert {prompt.text for prompt in read(folder, text="in oil")} == {"in oil"}


def test_what_is_refused(folder: Path) -> None:
    silent = drawn(folder / "silent.png")
    with pytest.raises(UserError, match=r"silent.png does not say what it shows, and there is no silent.txt beside it"):
        read_prompts(Folder(path=str(silent)))
    with pytest.raises(UserError, match=r"silent.png: there is no mask of that name in prompts.masks"):
        read(folder, text="x")
    with pytest.raises(UserError, match=r"prompts.path is not set: prompts=folder needs prompts.path=FOLDER"):
        read_prompts(Folder())
    with pytest.raises(UserError, match="does not exist"):
        read_prompts(Folder(path=str(folder / "no")))
    (folder / "pipes").mkdir()
    os.mkfifo(folder / "pipes/p.png")
    with pytest.raises(UserError, match=r"p.png is no plain file: name a picture file"):
        read_prompts(Folder(path=str(folder / "pipes")))


def test_metadata_that_is_not_read_hides_no_text(tmp_path: Path) -> None:
    """SwarmUI writes JSON where AUTOMATIC1111 writes its text."""
    info = PngInfo()
    info.add_text("parameters", '{"sui_image_params": {"prompt": "a cat"}}')
    Image.new("RGB", (64, 32)).save(tmp_path / "a.png", pnginfo=info)
    (tmp_path / "a.txt").write_text("a dog", encoding="utf-8")
    assert [prompt.text for prompt in read_prompts(Folder(path=str(tmp_path)))] == ["a dog"]
