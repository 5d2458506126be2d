"""prompts=images: finished pictures as prompts, read from their own metadata."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.support.command import command
from tests.support.prompt_inputs import message
from zimage_runner.collect.__main__ import main as collect
from zimage_runner.errors import UserError
from zimage_runner.outputs.metadata import EXIF_POINTER, UNICODE, USER_COMMENT, parameters_text
from zimage_runner.prompts import read_prompts
from zimage_runner.prompts.generation_data import of_comfyui, of_parameters
from zimage_runner.prompts.images import Images
from zimage_runner.prompts.text_file import TextFile

SECRET = "a ${oc.env:HOME} sign, 一只猫"
RUN = [
    "prompts=jsonl", "prompts.path=p.jsonl", "seeds=[3,5]", "sampling.num_inference_steps=1",
    "sampling.guidance_scale=1.5", "sampling.negative_prompt=blurry", "warmup=none",
]  # fmt: skip
A1111 = (
    "a cat, (fluffy:1.2)\non a roof\nNegative prompt: blurry,\nlow quality\nSteps: 4, Sampler: Euler, "
    'Schedule type: Simple, CFG scale: 5, Seed: 42, Size: 128x64, Model: "z, turbo", Version: v1.10.1'
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompts with two seeds each. No test changes it."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "p.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (SECRET, "a red apple")))
    code, out, err = command(folder, *RUN)
    assert code == 0, err
    return Path(out.strip().splitlines()[-1])


def png(path: Path, **texts: str) -> Path:
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def shown(cli, *argv: str) -> tuple[str, list[str]]:
    code, out, err = cli("prompts=images", *argv, "dry_run=true")
    assert code == 0, err
    return out, [line for line in err.splitlines() if line]


def test_the_same_items_again(run):
    first, second = read_prompts(Images(path=str(run)))
    assert (first.text, second.text) == (SECRET, "a red apple"), "nothing is looked up"
    assert first.seeds == second.seeds == (3, 5)
    assert first.overrides == second.overrides
    assert {"num_inference_steps": 1, "guidance_scale": 1.5, "negative_prompt": "blurry"}.items() <= (
        first.overrides.items()
    )
    assert {"width", "height", "max_sequence_length", "cfg_normalization"} <= first.overrides.keys()


def test_each_way_to_name_them(run, tmp_path):
    picture = next(run.glob("items/00001*/seed_5/image.png"))
    assert collect([str(run), f"into={tmp_path}/all", "format=webp"]) == 0
    for source, count in (
        (Images(path=str(picture)), 1),
        (Images(path=str(run.parents[1])), 4),
        (Images(glob=f"{run}/items/*/seed_5/*"), 2),
        (Images(path=str(tmp_path / "all")), 4),
    ):
        assert sum(len(prompt.seeds or ()) for prompt in read_prompts(source)) == count


def test_the_command_line_wins_and_says_so(cli, run):
    out, err = shown(
        cli, f"prompts.path={run}", "seeds=0-2", "sampling.num_inference_steps=2", "sampling.guidance_scale=2"
    )
    assert "6 pictures of 2 prompts" in out
    assert ", 2 steps" in out
    assert "guidance 2," in out
    (line,) = err
    assert line.endswith("image.png and 1 more set num_inference_steps, guidance_scale, seeds: the command line wins")
    out, err = shown(cli, f"prompts.path={run}", "seeds=0-2", "prompts.wins=row")
    assert "4 pictures of 2 prompts" in out
    assert err[0].endswith("set seeds: this wins over the command line; prompts.wins=command_line if not")


def test_what_is_drawn_is_the_same_picture(cli, run):
    """The metadata gives the very items: they are linked and not drawn."""
    code, out, err = cli("prompts=images", f"prompts.path={run}", f"skip_existing={run}", "warmup=none")
    assert code == 0, err
    summary = json.loads((Path(out.strip().splitlines()[-1]) / "summary.json").read_text())
    assert summary["items"]["linked"] == 4


def test_a_multirun_with_its_grid_and_pictures_without_metadata(cli):
    """Ids and settings of several jobs; the grid is none of the pictures; records stand in for metadata."""
    Path("p.jsonl").write_text('{"text": "a cat", "id": "c", "metadata": {"k": 1}}\n', encoding="utf-8")
    code, _, err = cli(
        "-m", "prompts=jsonl", "prompts.path=p.jsonl", "sampling.num_inference_steps=1,2", "warmup=none",
        "output.metadata=false", "hydra.sweep.dir=sw",
    )  # fmt: skip
    assert code == 0, err
    assert Path("sw/grid.png").is_file()
    found = read_prompts(Images(path="sw"))
    assert [p.overrides["num_inference_steps"] for p in found] == [1, 2]
    assert [(p.id, dict(p.metadata)) for p in found] == [(None, {"k": 1})] * 2
    assert [p.id for p in read_prompts(Images(path="sw/0"))] == ["c"]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_pictures_of_a1111(tmp_path, caplog, suffix):
    path = tmp_path / f"x.{suffix}"
    if suffix == "png":
        png(path, parameters=A1111)
    else:
        exif, order = Image.Exif(), "utf-16-le" if suffix == "jpg" else "utf-16-be"
        exif.get_ifd(EXIF_POINTER)[USER_COMMENT] = UNICODE + A1111.encode(order)
        Image.new("RGB", (8, 8)).save(path, exif=exif)
    (prompt,) = read_prompts(Images(path=str(path)))
    assert prompt.text == "a cat, (fluffy:1.2)\non a roof"
    assert prompt.seeds == (42,)
    assert prompt.overrides == {
        "num_inference_steps": 4, "guidance_scale": 4.0, "width": 128, "height": 64,
        "negative_prompt": "blurry,\nlow quality",
    }  # fmt: skip
    told = [record.getMessage() for record in caplog.records]
    assert told[0].startswith(f"{path} was drawn by another program: prompt, negative prompt, steps")


def test_a_cfg_scale_of_one_needs_no_negative_prompt(tmp_path, caplog):
    path = png(tmp_path / "x.png", parameters=A1111.replace("CFG scale: 5", "CFG scale: 1"))
    (prompt,) = read_prompts(Images(path=str(path)))
    assert prompt.overrides["guidance_scale"] == 0
    assert "negative_prompt" not in prompt.overrides
    assert "its negative prompt had no effect (CFG scale 1): it is left out" in caplog.text


@given(
    prompt=st.text(st.characters(exclude_categories=["C"], exclude_characters="\r"), min_size=1, max_size=40),
    steps=st.integers(1, 99), seed=st.integers(0, 2**32), guidance=st.sampled_from([0.0, 1.0, 2.5]),
)  # fmt: skip
def test_our_own_parameters_come_back(prompt, steps, seed, guidance):
    """As they stand in a JPEG that has no room for the recipe; the guidance is our own there."""
    params = {"num_inference_steps": steps, "guidance_scale": guidance, "width": 64, "height": 32}
    data = of_parameters(parameters_text({"prompt": prompt, "seed": seed, "params": params}))
    assert (data.text, data.is_cfg) == (prompt.strip(), False)
    given = {"num_inference_steps": str(steps), "guidance_scale": f"{guidance:g}", "seeds": str(seed)}
    assert data.values == {**given, "width": "64", "height": "32"}


def test_what_parameters_do_not_give_back_is_told(tmp_path, caplog):
    inputs = {"image": {}, "strength": 0.6, "control_image": {}, "control_scale": 1.0}
    params = {"num_inference_steps": 8, "guidance_scale": 0.0}
    text = parameters_text({"prompt": "a cat", "seed": 1, "params": params, "inputs": inputs})
    path = png(tmp_path / "x.png", parameters=text)
    (prompt,) = read_prompts(Images(path=str(path)))
    assert prompt.overrides == params
    assert f"{path}: its parameters have Denoising strength, ControlNet 0, and name no picture file" in caplog.text


def node(kind: str, **inputs: object) -> dict:
    return {"class_type": kind, "inputs": inputs}


COMFYUI = {
    "3": node("KSampler", seed=["9", 0], steps=8, cfg=1.0, denoise=1, positive=["6", 0], negative=["7", 0],
              latent_image=["5", 0]),
    "5": node("EmptySD3LatentImage", width=128, height=64, batch_size=1),
    "6": node("CLIPTextEncode", text=["8", 0], clip=["1", 0]),
    "7": node("ConditioningZeroOut", conditioning=["6", 0]),
    "8": node("PrimitiveString", value="a cat"),
    "9": node("PrimitiveInt", value=7),
}  # fmt: skip


def test_pictures_of_comfyui(tmp_path):
    found = {"num_inference_steps": 8, "guidance_scale": 0.0, "width": 128, "height": 64}
    (prompt,) = read_prompts(Images(path=str(png(tmp_path / "x.png", prompt=json.dumps(COMFYUI), workflow="{}"))))
    assert (prompt.text, prompt.seeds, prompt.overrides) == ("a cat", (7,), found)
    exif = Image.Exif()
    exif[0x0110] = f"prompt:{json.dumps(COMFYUI)}"
    Image.new("RGB", (8, 8)).save(tmp_path / "y.webp", exif=exif)
    (prompt,) = read_prompts(Images(path=str(tmp_path / "y.webp")))
    assert (prompt.text, prompt.seeds, prompt.overrides) == ("a cat", (7,), found)
    guided = COMFYUI | {"7": node("CLIPTextEncode", text="blurry")}
    guided["3"] = node("KSampler", **guided["3"]["inputs"] | {"cfg": 3})
    data = of_comfyui(json.dumps(guided), "x")
    assert (data.values["negative_prompt"], data.values["guidance_scale"], data.is_cfg) == ("blurry", 3, True)


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ("{", "x.png: its ComfyUI graph is damaged: write its prompt into a text file"),
        ("[" * 100_000, "its ComfyUI graph is damaged"),
        ("[1]", "its ComfyUI graph is damaged"),
        (json.dumps(COMFYUI | {"4": COMFYUI["3"]}), "has 2 samplers, and graphs with one are read"),
        ("{}", "has 0 samplers"),
        (json.dumps(COMFYUI | {"8": node("Loop", text=["8", 0])}), "no prompt is found in its ComfyUI graph"),
        (json.dumps(COMFYUI | {"8": 7}), "no prompt is found"),
    ],
)
def test_graphs_that_cannot_be_read(tmp_path, graph, expected):
    assert expected in message(Images(path=str(png(tmp_path / "x.png", prompt=graph))))


SWARMUI = '{"sui_image_params": {"prompt": "a cat", "seed": 5, "steps": 8, "cfgscale": 1.0}}'


def recipe(**change: object) -> str:
    return json.dumps({"prompt": "a", "seed": 1, "params": {}} | change)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ({}, "x.png does not say how it was drawn as this program, AUTOMATIC1111 and ComfyUI write it: leave it out, "
         "or write its prompt into a text file"),
        ({"parameters": SWARMUI}, "x.png does not say how it was drawn as this program, AUTOMATIC1111 and ComfyUI"),
        ({"invokeai_metadata": "{}"}, "x.png does not say how it was drawn as this program"),
        ({"zimage_runner": recipe(prompt=1)}, "x.png: its metadata has no prompt: it cannot be reproduced"),
        ({"zimage_runner": recipe(params={"width": "a; rm"})}, "x.png: width='a; rm' is not an integer"),
        ({"zimage_runner": recipe(seed=-1)}, "x.png: seed: -1 is out of range"),
        ({"zimage_runner": recipe(prompt="a\0")}, "x.png: the prompt holds a NUL character"),
        ({"parameters": A1111.replace("Seed: 42", "Seed: -1")}, "x.png: seed"),
        ({"parameters": A1111.replace("Steps: 4", "Steps: many")}, "num_inference_steps='many' is not an integer"),
    ],
)  # fmt: skip
def test_pictures_that_are_refused(tmp_path, texts, expected):
    assert expected in message(Images(path=str(png(tmp_path / "x.png", **texts))))


def test_files_and_folders_that_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("t.png").write_text("no picture", encoding="utf-8")
    Path("pipes").mkdir()
    os.mkfifo("pipes/p.png")
    for source, expected in (
        (Images(), "prompts.path is not set: prompts=images needs prompts.path=PICTURE_OR_FOLDER"),
        (Images(path="a", glob="b"), "prompts.path and prompts.glob are both set"),
        (Images(path="empty"), "prompts.path=empty: there is no picture (PNG, JPEG, WebP) in this folder"),
        (Images(path="gone.png"), "prompts.path=gone.png does not exist"),
        (Images(glob="*.jpg"), "prompts.glob=*.jpg matches no picture"),
        (Images(glob="empty"), "for a folder use prompts.path=empty"),
        (Images(path="t.png"), "t.png cannot be read as a PNG, JPEG or WebP picture"),
        (Images(path="pipes"), "pipes/p.png is no plain file: name a picture file"),
        (Images(path="pipes/p.png"), "pipes/p.png is no plain file: name a picture file"),
    ):
        assert expected in message(source)


def test_a_size_that_is_not_ours_names_the_picture(cli, tmp_path):
    png(tmp_path / "x.png", parameters=A1111.replace("128x64", "130x64"))
    code, _, err = cli("prompts=images", "prompts.path=x.png", "dry_run=true")
    assert (code, "x.png: sampling.width=130 is not a positive multiple of 16: use 128" in err) == (2, True)
    out, _ = shown(cli, "prompts.path=x.png", "sampling.width=128", "sampling.height=128")
    assert "128x128" in out


def test_a_picture_given_as_an_option_or_a_list(cli, tmp_path):
    png(tmp_path / "x.png", parameters=A1111)
    code, _, err = cli("prompts=x.png")
    assert (code, "write prompts=images prompts.path=x.png" in err) == (2, True)
    with pytest.raises(UserError, match="is a picture: prompts=images draws from what pictures say"):
        read_prompts(TextFile(path=str(tmp_path / "x.png")))
