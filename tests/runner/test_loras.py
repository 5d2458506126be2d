"""Runs with adapters, from the command line to the record: found, checked, ordered, resumed, drawn again."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import NANO
from tests.support import loras as support
from tests.support.command import command
from zimage_runner.outputs.metadata import read_metadata
from zimage_runner.plan import Fingerprints, build_plan
from zimage_runner.prompts.base import Prompt
from zimage_runner.prompts.prompt import LoraWord
from zimage_runner.prompts.seeds import parse_seeds
from zimage_runner.reproduce import main as reproduce
from zimage_runner.sampling import Lora, SamplingParams
from zimage_runner.weights.adapters.adapter import tensors_sha256
from zimage_runner.weights.adapters.find import find_adapter
from zimage_runner.weights.find.verify import sha256_of

FAST = ("warmup=none", "sampling.num_inference_steps=1", "output.report=false")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With style.safetensors and loras/grain.safetensors in it."""
    folder = tmp_path_factory.mktemp("adapted")
    (folder / "loras").mkdir()
    support.written(folder / "style.safetensors", support.low_rank(support.known()))
    support.written(folder / "loras" / "grain.safetensors", support.low_rank(support.known(2)))
    return folder


def records(run: Path) -> dict[str, dict[str, Any]]:
    """Each record by the place of its prompt."""
    found = [json.loads(path.read_text()) for path in sorted(run.glob("items/*/*/record.json"))]
    return {f"{record['index']}": record for record in found}


def pixels(run: Path, index: int) -> np.ndarray:
    (path,) = run.glob(f"items/{index:05d}_*/*/image.png")
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """Five prompts: without, with the run's own weight, with others, with two adapters, and with 0."""
    lines = ["a cat --am 0", "a cat", "a cat --am -0.5", "a cat <lora:grain:0.5>", "a cat <lora:style:0> --d 7"]
    (folder / "p.txt").write_text("\n".join(lines) + "\n")
    words = ["prompts=text_file", "prompts.path=p.txt", "loras=[style.safetensors:0.8]", "lora_dirs=[loras]", "seeds=7"]
    code, out, err = command(folder, *words, *FAST)
    assert code == 0, err
    return folder / out.strip()


def test_each_prompt_has_its_adapters(run: Path, folder: Path) -> None:
    found = records(run)
    weights = {place: [(e["name"], e["weight"]) for e in record.get("loras", [])] for place, record in found.items()}
    assert weights == {
        "0": [], "1": [("style", 0.8)], "2": [("style", -0.5)], "3": [("style", 0.8), ("grain", 0.5)], "4": [],
    }  # fmt: skip
    assert all(record["prompt"] == "a cat" for record in found.values())
    (style, grain) = found["3"]["loras"]
    assert style["digest"] == sha256_of(folder / "style.safetensors")
    assert (style["path"], grain["path"]) == ("style.safetensors", "loras/grain.safetensors")
    assert style["hash"] == tensors_sha256(folder / "style.safetensors")[:12]
    pictures = {place: pixels(run, int(place)).tobytes() for place in found}
    assert pictures["0"] == pictures["4"]
    assert len(set(pictures.values())) == 4


def test_the_picture_says_so_as_other_tools_read_it(run: Path) -> None:
    (path,) = run.glob("items/00003_*/*/image.png")
    text = read_metadata(path).parameters
    assert text is not None
    first, *_, last = text.splitlines()
    assert first == "a cat <lora:style:0.8> <lora:grain:0.5>"
    style, grain = records(run)["3"]["loras"]
    assert f'Lora hashes: "style: {style["hash"]}, grain: {grain["hash"]}"' in last
    plain = read_metadata(next(run.glob("items/00000_*/*/image.png"))).parameters
    assert plain is not None
    assert "Lora" not in plain
    assert "lora" not in plain


def test_pictures_as_prompts_bring_theirs(run: Path, folder: Path) -> None:
    code, out, err = command(folder, "prompts=images", f"prompts.path={run}", "lora_dirs=[loras]", "dry_run=true")
    assert code == 0, err
    assert "style 0.8: 2 pictures" in out
    assert "style -0.5: 1 picture" in out
    assert "grain 0.5: 1 picture" in out


def test_a_resumed_run_draws_what_is_missing_with_them(run: Path, folder: Path) -> None:
    was = {index: pixels(run, index) for index in (2, 3)}
    for index in was:
        shutil.rmtree(next(run.glob(f"items/{index:05d}_*")))
    code, _, err = command(folder, f"resume={run}")
    assert code == 0, err
    for index, before in was.items():
        assert np.array_equal(pixels(run, index), before)
    code, _, err = command(folder, f"resume={run}", "loras=[loras/grain.safetensors:0.8]")
    assert (code, "would mix other pictures into the run: loras was" in err) == (2, True), err
    shutil.rmtree(next(run.glob("items/00003_*")))
    kept = (folder / "style.safetensors").read_bytes()
    support.written(folder / "style.safetensors", support.low_rank(support.known(3)))
    code, _, err = command(folder, f"resume={run}")
    assert code == 2
    assert re.search(r"loras was style:0\.8 \(sha256 (\w+)\), now style:0\.8 \(sha256 (?!\1)", err), err
    (folder / "style.safetensors").write_bytes(kept)
    assert command(folder, f"resume={run}")[0] == 0


def test_a_worker_process_draws_the_same(run: Path, folder: Path) -> None:
    words = ["prompts=text_file", "prompts.path=p.txt", "loras=[style.safetensors:0.8]", "lora_dirs=[loras]", "seeds=7"]
    code, out, err = command(folder, *words, *FAST, "executor=process", "prompts.offset=1", "prompts.limit=3")
    assert code == 0, err
    for index in (1, 2, 3):
        assert np.array_equal(pixels(folder / out.strip(), index), pixels(run, index))


def test_it_is_drawn_again_from_its_record(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (picture,) = run.glob("items/00003_*/*/image.png")
    monkeypatch.chdir(folder)
    assert reproduce([str(picture)]) == 0
    monkeypatch.chdir(tmp_path)  # the files are not where the record says
    capfd.readouterr()
    assert reproduce([str(picture)]) == 2
    said = capfd.readouterr().err
    assert "drawn with style.safetensors (sha256 " in said
    assert "which is not there: lora_dirs=[FOLDER] says where to look for it" in said
    (tmp_path / "kept" / "deep").mkdir(parents=True)
    shutil.copy(folder / "style.safetensors", tmp_path / "kept" / "renamed.safetensors")
    shutil.copy(folder / "loras" / "grain.safetensors", tmp_path / "kept" / "deep" / "grain.safetensors")
    assert reproduce([str(picture), "lora_dirs=[kept]"]) == 0
    support.written(tmp_path / "style.safetensors", support.low_rank(support.known(3)))
    (tmp_path / "kept" / "renamed.safetensors").unlink()
    assert reproduce([str(picture), "lora_dirs=[kept]"]) == 2
    assert "has changed since, and no file in kept has its sha256" in capfd.readouterr().err
    capfd.readouterr()
    assert reproduce([str(picture), "loras=[]"]) == 1
    assert ", now none" in capfd.readouterr().out


def bad_files(folder: Path) -> dict[str, str]:
    """File name -> what must be said of it."""
    good = support.low_rank(support.known().only("attention.to_q", blocks=("layers.0",)))
    down, up = (f"lora_unet_layers_0_attention_to_q.lora_{half}.weight" for half in ("down", "up"))
    written = {
        "nan": {**good, up: good[up].clone().fill_(float("nan"))},
        "rank": {**good, down: good[down][:2]},
        "unknown": {**good, "lora_unet_layers_0_attention_to_x.alpha": torch.tensor(1.0)},
        "wide": {**good, up: torch.cat([good[up], good[up]])},
        "deep": {key.replace("layers_0", "layers_29"): value for key, value in good.items()},
    }
    for name, tensors in written.items():
        support.written(folder / f"{name}.safetensors", tensors)
    whole = support.written(folder / "whole.safetensors", good).read_bytes()
    (folder / "short.safetensors").write_bytes(whole[:-100])
    (folder / "web.safetensors").write_bytes(b"<!DOCTYPE html><html></html>")
    (folder / "pickle.pt").write_bytes(pickle.dumps({"a": 1}))
    with zipfile.ZipFile(folder / "packed.zip", "w") as archive:
        archive.writestr("a.safetensors", b"x")
    return {
        "nan.safetensors": f"{up} holds NaN or Inf: the file is damaged or its training diverged",
        "rank.safetensors": "lora_unet_layers_0_attention_to_q: ranks differ: lora_down / lora_A is [2, 288]",
        "unknown.safetensors": "1 of 4 keys belong to no known part of Z-Image: lora_unet_layers_0_attention_to_x",
        "wide.safetensors": "changes a weight of shape [576, 288], the model's is [288, 288]: made for another model?",
        "deep.safetensors": "the model has no layers.29.attention.to_q.weight: made for another model?",
        "short.safetensors": "truncated: its header promises",
        "web.safetensors": "is a web page, not weights",
        "pickle.pt": "is a pickle checkpoint, which can run code and is never loaded",
        "packed.zip": "is a zip archive: unpack it",
        "missing.safetensors": "missing.safetensors is no file here, and lora_dirs names no folder to look in",
    }


def test_files_are_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    for file, message in bad_files(tmp_path).items():
        for _ in range(2 if file in ("nan.safetensors", "deep.safetensors") else 1):  # bad is not remembered as good
            code, out, err = command(tmp_path, "prompt=a cat", f"loras=[{file}:0.8]", "dry_run=true")
            assert (code, out, err.count("\n"), message in err) == (2, "", 1, True), f"{file}: {err}"
    code, _, err = command(tmp_path, "prompt=a cat", "loras=[deep.safetensors]", *FAST)
    assert (code, "made for another model?" in err, list(tmp_path.glob("outputs/*/*"))) == (2, True, [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prompt=a <lora:none:1> cat", "lora_dirs=[loras]"],
         ": prompts.texts[0]: none is no file here, nor in loras: give a .safetensors file"),
        (["prompt=a cat", "lora_dirs=[nowhere]"], "lora_dirs: nowhere is no folder: name one that holds .safetensors"),
        (["prompt=a cat", "loras=[style:101]"], "loras.0.path: the weight 101 of style is out of range: use -100"),
        (["prompt=a cat", "loras=[style:1,style.safetensors:1]"], "loras: style.safetensors is named twice"),
        (["prompt=a <lora:style:1> cat <lora:style:2>", "lora_dirs=[.]"], "style.safetensors is named twice"),
        (["prompt=a cat", "loras=[{weight: 1}]"], "loras.0.path='' is empty: name a .safetensors file"),
        (["prompt=a cat", "loras=[{path: x, wieght: 1}]"], "loras: wieght: no such field; an entry has path"),
        (["prompt=a cat", "loras.0.weight=1"], "loras has no entry of that number: name the files first"),
        (["prompt=a cat", "loras=[loras]"], "loras.0.path: loras is a folder, and lora_dirs names no folder"),
        (["prompts=text_file", "prompts.path=two.txt", "loras=[style]"],
         "two.txt:1: 2 LoRA weights, and the run has 1 LoRA: loras=[FILE,...] names them"),
        (["prompts=text_file", "prompts.path=two.txt"], "two.txt:1: 2 LoRA weights, and the run has 0 LoRAs"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(words: list[str], message: str, folder: Path) -> None:
    (folder / "two.txt").write_text("a cat --am 1,2\n")
    code, _, err = command(folder, *words, "dry_run=true")
    assert (code, err.count("\n"), message in err) == (2, 1, True), err


def test_tags_are_text_where_no_folder_is_given(folder: Path) -> None:
    code, out, err = command(folder, "prompt=a <lora:style:1> cat", "dry_run=true")
    assert code == 0
    assert "a <lora:style:1> cat" in out
    assert "<lora:style:1> is drawn as text: lora_dirs=[FOLDER] says where its file is" in err


def test_the_plan_names_them_and_reads_no_file_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["prompts.texts=[a cat <lora:grain:0.5>,a dog]", "loras=[style:0.8]", "lora_dirs=[loras]", "dry_run=true"]
    code, out, err = command(folder, *words)
    assert code == 0, err
    assert "style 0.8: 2 pictures, style.safetensors" in out
    assert "grain 0.5: 1 picture, loras/grain.safetensors" in out
    monkeypatch.setitem(sys.modules, "zimage_runner.weights.adapters.reader", None)  # importing it fails
    assert command(folder, *words)[0] == 0


def test_a_transformer_in_a_file_elsewhere_takes_them_too(run: Path, folder: Path) -> None:
    shutil.copy(NANO / support.TRANSFORMER, folder / "elsewhere.safetensors")
    words = ["prompt=a cat", "loras=[style.safetensors:0.8]", "seeds=7", "model.transformer=elsewhere.safetensors"]
    code, out, err = command(folder, *words, *FAST)
    assert code == 0, err
    assert np.array_equal(pixels(folder / out.strip(), 0), pixels(run, 1))


def test_a_sweep_over_a_weight(folder: Path) -> None:
    words = ["prompt=a cat", "loras=[style]", "loras.0.weight=0,0.4", "output.root=swept"]
    code, _, err = command(folder, "-m", *words, *FAST)
    assert code == 0, err
    jobs = sorted((folder / "swept").glob("multirun/*/*/[01]"))
    weights = [record.get("loras", [{}])[0].get("weight") for job in jobs for record in records(job).values()]
    assert weights == [None, 0.4]
    assert not np.array_equal(pixels(jobs[0], 0), pixels(jobs[1], 0))
    assert (jobs[0].parent / "grid.png").is_file()
    assert "0.4" in (jobs[0].parent / "summary.csv").read_text()


def test_an_experiment_file(folder: Path) -> None:
    (folder / "conf" / "experiment").mkdir(parents=True)
    (folder / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nprompt: a cat\nlora_dirs: [loras]\nloras: [grain:0.25, {path: style}]\n"
    )
    code, out, err = command(folder, "--config-dir", "conf", "+experiment=mine", "dry_run=true")
    assert code == 0, err
    assert "grain 0.25: 1 picture" in out
    assert "style 1: 1 picture" in out


PARAMS = SamplingParams(
    height=128, width=128, num_inference_steps=2, guidance_scale=0.0, negative_prompt="", max_sequence_length=512,
    cfg_normalization=0.0, cfg_truncation=1.0,
)  # fmt: skip


def planned(prompts: list[tuple[str, tuple[Lora, ...], int]]) -> Any:
    sources = [
        Prompt(text=text, overrides={"width": width}, id=str(n), loras=tuple(LoraWord(str(n), 1.0) for _ in loras[:1]))
        for n, (text, loras, width) in enumerate(prompts)
    ]

    def find(prompt: Prompt) -> tuple[Lora, ...]:
        return prompts[int(prompt.loras[0].name)][1] if prompt.loras else ()

    return build_plan(sources, parse_seeds([1, 2]), PARAMS, check_size=lambda h, w: None, find_loras=find)


def an_adapter(digest: str, weight: float = 1.0, path: str = "x", encodes: bool = False) -> Lora:
    return Lora(digest=digest, weight=weight, name=path, path=path, hash="h", encodes=encodes)


def test_items_of_one_set_are_drawn_together_largest_first() -> None:
    a, b = (an_adapter("a"),), (an_adapter("b"),)
    plan = planned([("1", a, 64), ("2", (), 64), ("3", b, 128), ("4", a, 128), ("5", (), 128), ("6", b, 64)])
    order = [(item.params.loras, item.params.width) for item in plan.items]
    assert order == [key for loras in ((), a, b) for key in [(loras, 128)] * 2 + [(loras, 64)] * 2]
    for batch in plan.batches(16):
        assert len({(item.params.loras, item.params.width) for item in batch}) == 1
    assert plan.loras() == {a[0]: 4, b[0]: 4}


def test_encodings_name_the_adapters_that_change_the_encoder() -> None:
    words = an_adapter("w", encodes=True)
    plan = planned([("a", (), 64), ("a", (an_adapter("t"),), 64), ("a", (an_adapter("t"), words), 64)])
    assert list(plan.encodings()) == [("a", 512), ("a", 512, words)]


def test_fingerprints_know_digest_and_weight_and_not_the_path() -> None:
    sets = [(), (an_adapter("a"),), (an_adapter("a", 0.5),), (an_adapter("b"),), (an_adapter("a"), an_adapter("b"))]
    moved = (an_adapter("a", path="elsewhere"),)
    plan = planned([("cat", loras, 64) for loras in [*sets, moved]])
    fingerprint = Fingerprints("weights", {"engine": "native"})
    prints = {item.prompt.id: fingerprint(item) for item in plan.items if item.seed == 1}
    assert len({prints[str(n)] for n in range(5)}) == 5
    assert prints["5"] == prints["1"]
    sources = [Prompt(text="cat", overrides={"width": 64})]
    without = build_plan(sources, parse_seeds([1]), PARAMS, check_size=lambda h, w: None)
    assert prints["0"] == fingerprint(without.items[0])
    assert len(plan.duplicates) == 1


def test_names_are_looked_for_in_folders_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("one/a.safetensors", "two/a.safetensors", "two/deep/b.safetensors", "two/other/b.safetensors", "c"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"")
    monkeypatch.chdir(tmp_path)

    def found(name: str) -> str:
        return os.path.relpath(find_adapter(name, ["one", "two"], "p.txt:1"), tmp_path)

    assert found("a") == found("a.safetensors") == "one/a.safetensors"
    assert found("two/a") == "two/a.safetensors"
    assert found("deep/b") == "two/deep/b.safetensors"
    assert found("c") == "c"
    with pytest.raises(Exception, match=r"p\.txt:1: b could be any of two/deep/b.safetensors, two/other/b"):
        found("b")
