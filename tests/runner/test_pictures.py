"""Runs that start from pictures, from the command line to the record: checked, planned, resumed, drawn again."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.support.command import command
from tests.support.drawing import SMALL
from zimage_runner.api import _compose
from zimage_runner.cli import vary
from zimage_runner.cli.main import main as run_main
from zimage_runner.config.schema import RunConfig
from zimage_runner.errors import UserError
from zimage_runner.outputs.metadata import read_metadata
from zimage_runner.plan import Fingerprints, build_plan
from zimage_runner.prompts.base import Prompt
from zimage_runner.prompts.jsonl import Jsonl
from zimage_runner.prompts.seeds import parse_seeds
from zimage_runner.reproduce import main as reproduce
from zimage_runner.runner.inputs import _is_cut
from zimage_runner.runner.spec import plan_run
from zimage_runner.sampling import Inputs, Picture

pytestmark = pytest.mark.usefixtures("model_stays")
FAST = ("warmup=none", "sampling.num_inference_steps=3", "output.report=false")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With red.png, blue.png and mask.png in ``table/``, and a table that names them."""
    folder = tmp_path_factory.mktemp("pictured")
    table = folder / "table"
    table.mkdir()
    for colour in ("red", "blue"):
        image = Image.new("RGB", (160, 140), "white")
        ImageDraw.Draw(image).ellipse((40, 30, 120, 110), fill=colour)
        image.save(table / f"{colour}.png")
    mask = Image.new("L", (160, 140))
    mask.paste(255, (80, 0, 160, 140))
    mask.save(table / "mask.png")
    rows = [
        ("text", "init_image", "mask", "denoising_strength", "id"),
        ("a red apple", "", "", "", "plain"),
        ("a red apple", "red.png", "", "0.3", "weak"),
        ("a red apple", "red.png", "", "", "usual"),
        ("a blue ball", "blue.png", "", "", "blue"),
        ("a red apple", "red.png", "mask.png", "", "half"),
    ]
    with (table / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return folder


WORDS = ("prompts=csv", "prompts.path=table/rows.csv", "seeds=7", "engine.batch_size=4")


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    code, out, err = command(folder, *WORDS, *FAST)
    assert code == 0, err
    assert "init_image is read as image" in err
    return folder / out.strip()


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return _compose(["warmup=none"])


@pytest.fixture(scope="module")
def memo() -> dict[str, Any]:
    """What plans of one model share."""
    return {}


def images(words: list[str]) -> int:
    return run_main(["prompts=images", f"prompts.path={words[0]}", *words[1:]])


def records(run: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(run.glob("items/*/*/record.json"))]
    return {record["id"]: record for record in found}


def pixels(run: Path, name: str) -> np.ndarray:
    (path,) = run.glob(f"items/*_{name}/*/image.png")
    return np.asarray(Image.open(path))


def test_the_records_say_what_each_started_from(run: Path, folder: Path) -> None:
    found = records(run)
    assert "inputs" not in found["plain"]
    inputs = found["weak"]["inputs"]
    assert (inputs["strength"], inputs["image"]["path"]) == (0.3, str(folder / "table" / "red.png"))
    assert (inputs["image"]["width"], inputs["image"]["height"]) == (160, 140)
    assert found["usual"]["inputs"]["strength"] == 0.6
    half = found["half"]["inputs"]
    assert (half["mask"]["path"], half["mask_blur"]) == (str(folder / "table" / "mask.png"), 4)
    assert "strength" not in half  # 1 is neutral
    fingerprints = {record["fingerprint"] for record in found.values()}
    assert len(fingerprints) == 5


def test_the_picture_says_its_strength_as_other_tools_read_it(run: Path) -> None:
    (path,) = run.glob("items/*_weak/*/image.png")
    text = read_metadata(path).parameters
    assert text is not None
    assert "Denoising strength: 0.3" in text


def test_the_weaker_the_closer(run: Path, folder: Path) -> None:
    with Image.open(folder / "table" / "red.png") as image:
        was = np.asarray(image.convert("RGB").resize((146, 128)).crop((9, 0, 137, 128)), np.float32)
    distances = {name: np.abs(pixels(run, name) - was).mean() for name in ("plain", "weak", "usual")}
    assert distances["weak"] < distances["usual"] < distances["plain"]


def test_outside_the_mask_nothing_changes(run: Path) -> None:
    # A mask's left half is kept: the picture's, as it was fitted to 128x128.
    half, usual = pixels(run, "half"), pixels(run, "usual")
    assert (half[:5, :55] == 255).all()  # white in red.png; drawn pictures are hardly ever exactly so
    assert not np.array_equal(half, usual)


def test_a_batch_or_a_resumed_run_draws_the_same(run: Path, folder: Path) -> None:
    was = {name: pixels(run, name) for name in ("weak", "usual", "half")}
    again = folder / "again"
    shutil.copytree(run, again)
    for name in was:
        shutil.rmtree(next(again.glob(f"items/*_{name}")))
    ledger = [line for line in (again / "records.jsonl").read_text().splitlines() if '"ok"' in line]
    kept = [line for line in ledger if not any(f"_{name}/" in line for name in was)]
    (again / "records.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    code, _, err = command(folder, f"resume={again}", "engine.batch_size=1")
    assert code == 0, err
    for name, picture in was.items():
        assert np.array_equal(pixels(again, name), picture), name


def test_it_is_reproduced(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = run.glob("items/*_half/*/image.png")
    assert reproduce([str(path)]) == 0, capsys.readouterr()


def test_a_file_that_is_another_one_now_is_told(run: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = run.glob("items/*_blue/*/image.png")
    file = folder / "table" / "blue.png"
    data = file.read_bytes()
    try:
        Image.new("RGB", (160, 140), "green").save(file)
        assert reproduce([str(path)]) == 2
        assert "blue.png" in (told := capsys.readouterr().err)
        assert "has changed since: sampling.image=FILE says where it is now" in told
        unfinished = shutil.copytree(run, folder / "unfinished")
        shutil.rmtree(next(unfinished.glob("items/*_weak")))
        code, _, err = command(folder, f"resume={unfinished}")
        assert code == 2
        assert "image was sha256" in err
    finally:
        file.write_bytes(data)


def test_pictures_as_prompts_bring_theirs(run: Path, folder: Path) -> None:
    code, out, err = command(folder, "prompts=images", f"prompts.path={run}", "dry_run=true")
    assert code == 0, err
    assert "img2img at strength 0.3" in out
    assert f"mask {folder / 'table' / 'mask.png'}, 160x140: 1 picture" in out


@pytest.mark.parametrize("main", [images, vary.main, reproduce])
def test_a_picture_that_was_moved_is_named_anew(
    run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog, main
) -> None:
    monkeypatch.chdir(folder)
    (path,) = run.glob("items/*_weak/*/image.png")
    was, now = folder / "table" / "red.png", folder / "moved.png"
    planned = () if main is reproduce else ("dry_run=true",)
    was.rename(now)
    try:
        assert main([str(path), *planned]) == 2
        assert "sampling.image=FILE says where it is now" in capsys.readouterr().err
        assert main([str(path), *planned, "sampling.image=moved.png"]) == 0
        if planned:
            out = capsys.readouterr().out
            assert "img2img at strength 0.3" in out
            assert f"image {now}, 160x140: " in out
            assert "sets image: the command line wins" in caplog.text
    finally:
        now.rename(was)


def test_its_own_size_is_drawn_where_none_is_set(folder: Path) -> None:
    words = ("prompt=x", "sampling.image=table/red.png", "dry_run=true")
    code, out, _ = command(folder, *words)
    assert code == 0
    assert "128x128" in out  # the one size of this model
    any_size = "model.native_sizes=[]"
    for more, size in (
        ((), "160x128"),
        (("sampling.width=320",), "320x288"),
        (("sampling.height=64",), "80x64"),
        (("sampling.outpaint=32,0,32,0",), "224x128"),
        (("sampling.mask=table/mask.png", "sampling.mask_crop=8"), "128x128"),
    ):
        code, out, err = command(folder, *words, any_size, *more)
        assert code == 0, err
        assert f": {size}, " in out, (more, out)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["sampling.strength=0.5"],
            "sampling.strength=0.5 says nothing without an image: add sampling.image=FILE, or leave strength out",
        ),
        (["sampling.image=no.png"], "sampling.image={folder}/no.png does not exist"),
        (["sampling.image=table"], "sampling.image={folder}/table is a folder: name a picture file"),
        (["sampling.image=''"], "sampling.image='' is empty: name a picture file, or leave it out"),
        (["sampling.mask=table/mask.png"], "sampling.mask=mask.png says nothing without an image"),
        (["sampling.image=table/red.png", "sampling.mask_grow=4"], "sampling.mask_grow=4 says nothing without a mask"),
        (["sampling.image=table/red.png", "sampling.strength=0"], "sampling.strength=0 is out of range"),
        (["sampling.image=table/red.png", "sampling.strength=1.5"], "sampling.strength=1.5 is out of range"),
        (
            ["sampling.image=table/red.png", "sampling.outpaint='1,2'"],
            "sampling: outpaint='1,2': write \"left,top,right",
        ),
        (
            ["sampling.image=table/red.png", "sampling.scale=2", "sampling.width=128"],
            "sampling.scale=2 says nothing beside width: keep one of the two",
        ),
        (
            ["sampling.image=table/red.png", "sampling.tile=64", "model.native_sizes=[128]"],
            "prompts.texts[0]: sampling.tile=64 is no size that zimage_nano draws: leave it out",
        ),
        (["sampling.image=table/red.png", "engine=diffusers"], "engine=diffusers does not draw from pictures: use"),
        (
            ["sampling.control_image=table/red.png"],
            "control_image={folder}/table/red.png needs a ControlNet to follow it: set",
        ),
    ],
)
def test_what_is_refused(folder: Path, words: list[str], told: str) -> None:
    code, _, err = command(folder, "prompt=x", *words)
    assert code == 2
    assert err.startswith(f"zimage_runner: {told.format(folder=folder)}")
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"image": "no.png"}, "rows.jsonl:2: image={folder}/no.png does not exist"),
        (
            {"image": "red.png", "mask": "wide.png"},
            "rows.jsonl:2: mask={folder}/wide.png has 300x100 pixels and image=",
        ),
        ({"image": "red.png", "strength": 7}, "rows.jsonl:2: sampling.strength=7 is out of range"),
        ({"strength": 0.5}, "rows.jsonl:2: strength=0.5 says nothing without an image"),
        ({"image": 3}, "rows.jsonl:2: image=3 is no file name"),
        ({"image": {"bytes": "x"}}, "rows.jsonl:2: image={{'bytes': 'x'}} holds pictures, not names of files"),
        ({"image": "red.png", "scale": 1e308}, "rows.jsonl:2: sampling.scale=1e+308 is out of range"),
        ({"image": "red.png", "scale": -2}, "rows.jsonl:2: sampling.scale=-2.0 is out of range"),
        ({"image": "red.png", "scale": 2, "height": 64}, "rows.jsonl:2: scale=2 says nothing beside height: keep one"),
        (
            {"image": "red.png", "mask": "red.png", "mask_crop": 8, "scale": 2},
            "rows.jsonl:2: scale=2 says nothing beside mask_crop: keep one of the two",
        ),
        ({"image": "red.png", "tile": -16}, "rows.jsonl:2: sampling.tile=-16 is out of range"),
        ({"image": "red.png", "fit": "cover"}, "rows.jsonl:2: fit='cover': write crop, pad, stretch"),
        (
            {"image": "red.png", "steps_after_strength": "perhaps"},
            "rows.jsonl:2: steps_after_strength='perhaps': write true",
        ),
    ],
)
def test_a_row_that_is_refused_is_named(
    folder: Path, config: RunConfig, memo: dict[str, Any], row: dict[str, Any], told: str
) -> None:
    table = folder / "table"
    Image.new("L", (300, 100), 255).save(table / "wide.png")
    lines = [{"text": "fine", "image": "blue.png"}, {"text": "x", **row}]
    (table / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    with pytest.raises(UserError) as refused:
        plan_run(replace(config, prompts=Jsonl(path=str(table / "rows.jsonl"))), memo)
    assert str(refused.value).replace(f"{table}/rows", "rows").startswith(told.format(folder=table))


@pytest.mark.parametrize(
    ("canvas", "size", "cut"),
    [((160, 140), (160, 128), False), ((256, 128), (128, 128), True), ((1000, 700), (992, 688), False)],
)
def test_whether_a_crop_cuts_what_is_painted_around(canvas: tuple[int, int], size: tuple[int, int], cut: bool) -> None:
    assert _is_cut(canvas, *size) is cut


def picture(digest: str, path: str = "/x.png") -> Picture:
    return Picture(digest=digest, path=path, width=64, height=64)


def test_the_digest_counts_and_not_the_path() -> None:
    def fingerprints(inputs: Inputs | None) -> str:
        plan = build_plan(
            [Prompt(text="x")], parse_seeds([1]), SMALL, check_size=lambda h, w: None,
            find_inputs=lambda prompt: {"inputs": inputs},
        )  # fmt: skip
        return Fingerprints("w", {})(plan.items[0])

    here = Inputs(image=picture("a"), strength=0.5)
    assert fingerprints(here) == fingerprints(Inputs(image=picture("a", "/elsewhere.png"), strength=0.5))
    others = [
        None, Inputs(image=picture("b"), strength=0.5), Inputs(image=picture("a"), strength=0.6),
        Inputs(image=picture("a"), strength=0.5, mask=picture("a")), Inputs(control_image=picture("a")),
        Inputs(image=picture("a"), strength=0.5, steps_after_strength=True),
    ]  # fmt: skip
    assert len({fingerprints(here), *map(fingerprints, others)}) == 1 + len(others)


def test_items_of_one_strength_are_one_batch_whatever_they_start_from() -> None:
    found = {
        "a": Inputs(image=picture("a"), strength=0.5),
        "b": Inputs(image=picture("b"), strength=0.5),
        "c": Inputs(image=picture("b"), strength=0.6),
        "d": Inputs(image=picture("b"), strength=0.5, mask=picture("m")),
    }
    plan = build_plan(
        [Prompt(text=name, overrides={"image": name}) for name in found], parse_seeds([1]), SMALL,
        check_size=lambda h, w: None,
        find_inputs=lambda prompt: {"inputs": found[prompt.text]},
    )  # fmt: skip
    assert sorted("".join(item.prompt.text for item in batch) for batch in plan.batches(4)) == ["ab", "c", "d"]
