"""A picture drawn again from its own metadata."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.support.command import command
from zimage_runner.collect.__main__ import main as collect
from zimage_runner.errors import UserError
from zimage_runner.outputs.metadata import JSON_KEY, read_metadata
from zimage_runner.reproduce import main, read_recipe, recipe_config


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn once; no test changes it."""
    code, out, err = command(
        tmp_path_factory.mktemp("run"),
        "prompt=a red apple, (8k) ${x} 一只猫", "seeds=7", "sampling.num_inference_steps=2",
        "sampling.guidance_scale=1.5", "sampling.negative_prompt=dog, \"quoted\"", "warmup=none",
    )  # fmt: skip
    assert code == 0, err
    return next(Path(out.strip()).glob("items/*/*/image.png"))


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rewritten(picture: Path, target: Path, change: Callable[[dict], object], pixels: bool = False) -> Path:
    recipe = read_metadata(picture).recipe
    assert recipe is not None
    change(recipe)
    info = PngInfo()
    info.add_text(JSON_KEY, json.dumps(recipe))
    with Image.open(picture) as image:
        copy = image.copy()
    if pixels:
        copy.putpixel((3, 3), (255, 0, 255))
    copy.save(target, pnginfo=info)
    return target


def test_identical(picture: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    capfd.readouterr()
    assert main([str(picture), f"output_file={tmp_path}/again.png"]) == 0
    assert capfd.readouterr().out == f"{picture}: identical\n"
    with Image.open(picture) as was, Image.open(tmp_path / "again.png") as again:
        assert was.tobytes() == again.tobytes()


@pytest.mark.parametrize("options", [["output.format=jpeg"], ["output.format=webp", "output.quality=80"]])
def test_a_picture_of_another_format(options, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The whole way: drawn, resumed with nothing to do, collected, and drawn again from what its file says."""
    words = ["prompt=a red apple", "seeds=7", "sampling.num_inference_steps=1", "warmup=none", *options]
    code, out, err = command(tmp_path, *words)
    assert code == 0, err
    run = Path(out.strip())
    (image,) = run.glob("items/*/*/image.*")
    assert image.suffix in (".jpg", ".webp")
    code, out, err = command(tmp_path, f"resume={run}", "verify=true")
    assert (code, "nothing to draw: 1 picture is done" in err) == (0, True)
    assert collect([str(run), f"into={tmp_path}/all"]) == 0
    assert len(list((tmp_path / "all").glob(f"*{image.suffix}"))) == 1
    capfd.readouterr()
    assert main([str(image)]) == 0
    assert capfd.readouterr().out == f"{image}: identical\n"
    assert main([str(image), "seeds=8"]) == 1


def test_what_differs_is_told(picture: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    changed = rewritten(picture, tmp_path / "x.png", lambda r: r["versions"].update(torch="1.0"), pixels=True)
    assert main([str(changed)]) == 1
    out = capfd.readouterr().out
    assert "torch was 1.0, now " in out
    assert "not identical: 0.01% of the pixels differ" in out
    assert main([str(picture), "seeds=8"]) == 1


def test_the_users_settings_win(picture: Path) -> None:
    config = recipe_config(read_recipe(picture), ["sampling.num_inference_steps=3", "engine=diffusers"])
    assert config.sampling.num_inference_steps == 3
    assert config.sampling.guidance_scale == 1.5
    assert config.seeds == [7]
    assert type(config.engine).__name__ == "DiffusersEngine"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda r: r.pop("prompt"), "its metadata has no prompt"),
        (lambda r: r.update(seed="7"), "its metadata has no seed"),
        (lambda r: r.update(params=[1]), "its metadata has no params"),
        (lambda r: r["params"].update(height=100), "sampling.height=100 is not a positive multiple of 16"),
        (lambda r: r["params"].update(height="a; rm -rf /"), "height"),
        (lambda r: r.update(prompt="a\0b"), "the prompt holds a NUL character"),
        (lambda r: r.update(seed=-1), "seeds: -1 is out of range"),
    ],
)
def test_hostile_metadata(picture: Path, tmp_path: Path, capfd, change, expected: str) -> None:
    capfd.readouterr()
    assert main([str(rewritten(picture, tmp_path / "x.png", change))]) == 2
    err = capfd.readouterr().err
    assert expected in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["../../../tmp/evil", "x=y", "a,b", "${oc.env:HOME}", "", 7, None])
def test_names_in_metadata_are_no_commands(picture: Path, name: object) -> None:
    recipe = read_recipe(picture)
    recipe["model"]["name"] = recipe["numerics"]["engine"] = name
    config = recipe_config(recipe, [])
    assert config.model.name == "zimage_nano", "an unknown name falls back on the default, or on what the user says"


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot be read as a PNG"):
        read_recipe(tmp_path / "x.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "y.png")
    with pytest.raises(UserError, match="carries no zimage_runner metadata"):
        read_recipe(tmp_path / "y.png")
    with pytest.raises(UserError, match=r"missing\.png does not exist"):
        read_recipe(tmp_path / "missing.png")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["prompt=a dog"], "prompt has no effect on a picture that is drawn again: leave it out"),
        (["+model.foo=1"], "foo: no such field of Model, and + cannot add one"),
        (["+prompts.limit=1"], "prompts.limit has no effect on a picture that is drawn again"),
        (["output=shards"], "output has no effect on a picture that is drawn again: leave it out"),
        (["output.root=x", "output_file=x.png"], "output.root has no effect on a picture that is drawn again"),
        (["output.format=jpeg"], "output.format has no effect without output_file: name the file to be written"),
        (["seeds=1-3"], "seeds gives 3 pictures, and one is drawn again"),
        (["seeds=3", "output_file={picture}"], " is the picture itself, which stays: name another file"),
    ],
)
def test_what_cannot_be_asked_for(
    picture: Path, capfd: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    before = picture.read_bytes()
    assert main([str(picture), *(word.format(picture=picture) for word in words)]) == 2
    assert expected in capfd.readouterr().err
    assert picture.read_bytes() == before


def test_where_there_is_no_picture(picture: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for path, expected in (
        (picture.parent, f"{picture.parent} is a folder: give the picture in it, {picture}"),
        (picture.parents[1], f"{picture.parents[1]} is a folder: give a picture"),
        (Path("nowhere.png"), "nowhere.png does not exist: give a picture"),
        (Path("/dev/null"), "/dev/null is no plain file: give a picture"),
    ):
        assert main([str(path)]) == 2
        assert expected in capfd.readouterr().err


def test_another_seed_is_told(picture: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([str(picture), "seeds=8", "sampling.num_inference_steps=1"]) == 1
    out = capfd.readouterr().out.splitlines()
    assert out[:2] == ["  seed was 7, now 8", "  num_inference_steps was 2, now 1"]
