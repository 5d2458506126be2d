"""ControlNet files: found as the user names them, and refused in one line before a model is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import NANO
from tests.support.controlnets import LAYOUTS, TRANSFORMER, shapes_of, write_controlnet
from zimage_runner.errors import UserError
from zimage_runner.model import Model, Source, Verify
from zimage_runner.prepare import main as prepare
from zimage_runner.weights.find.controlnet import EMBEDDED_FILE, ControlNetFile, find_controlnet
from zimage_runner.weights.formats.checkpoint_file import open_checkpoint_file
from zimage_runner.weights.formats.controlnet import PUBLISHED, layout_of
from zimage_runner.weights.safetensors_file import TensorInfo

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIMAGE_RUNNER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_controlnet(tmp_path_factory.mktemp("whole") / "net.safetensors", "2.1", torch.bfloat16)


def find(path: Path | str, transformer: dict[str, Any] = TRANSFORMER, **fields: Any) -> ControlNetFile:
    found = find_controlnet(Model(name="nano", source=Source.embedded, controlnet=str(path), **fields), transformer)
    assert found is not None
    return found


def test_the_embedded_models_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for verify in Verify:
        found = find("embedded", verify=verify)
        assert (found.path, found.layout.name) == (EMBEDDED_FILE, "Union 2.0, 1 control layer, 16 channels")
    data = bytearray(EMBEDDED_FILE.read_bytes())
    data[-1] ^= 1
    (tmp_path / "altered.safetensors").write_bytes(data)
    monkeypatch.setattr("zimage_runner.weights.find.controlnet.EMBEDDED_FILE", tmp_path / "altered.safetensors")
    with pytest.raises(UserError, match=r"model.controlnet=embedded: .*altered.safetensors was altered: reinstall"):
        find("embedded")


@pytest.mark.parametrize(
    ("layout", "layers", "count", "name", "places"),
    [
        ("1.0", 6, 136, "Union 1.0, 6 control layers, 16 channels", [0, 5, 10, 15, 20, 25]),
        ("2.1", 15, 295, "Union 2.1, 15 control layers, 33 channels", list(range(0, 30, 2))),
        ("lite", 3, 91, "Union 2.1, 3 control layers, 33 channels", [0, 10, 20]),
    ],
)
def test_the_published_files(layout: str, layers: int, count: int, name: str, places: list[int]) -> None:
    shapes = shapes_of(layout, layers, PUBLISHED)
    assert len(shapes) == count
    found = layout_of("file", {key: TensorInfo("BF16", shape, 0, 0) for key, shape in shapes.items()}, PUBLISHED, True)
    assert found.name == name
    assert list(found.places) == places
    assert list(found.refiner_places) == ([] if layout == "1.0" else [0, 1])


def test_no_controlnet_is_none() -> None:
    assert find_controlnet(Model(name="nano", source=Source.embedded), TRANSFORMER) is None


def test_a_file_and_its_directory_are_the_same(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nets").mkdir()
    shutil.copy(whole, tmp_path / "nets" / "diffusion_pytorch_model.safetensors")
    config = {**TRANSFORMER, **LAYOUTS["2.1"], "control_refiner_layers_places": [0]}
    (tmp_path / "nets" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = find(whole)
    assert found.path == whole
    assert found.layout.name == "Union 2.1, 3 control layers, 33 channels"
    for same in ("nets", "~/nets", tmp_path / "nets"):
        assert (find(same).digest, find(same).path) == (found.digest, tmp_path / "nets")


def test_shards(whole: Path, tmp_path: Path) -> None:
    tensors = load_file(whole)
    halves = [dict(list(tensors.items())[part::2]) for part in range(2)]
    index = {}
    for part, half in enumerate(halves):
        save_file(half, tmp_path / f"part-{part}.safetensors")
        index |= dict.fromkeys(half, f"part-{part}.safetensors")
    text = json.dumps({"weight_map": index})
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(text, encoding="utf-8")
    assert find(tmp_path).layout == find(whole).layout
    assert len(find(tmp_path).files) == 2
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"names files that are not there: part-1\.safetensors"):
        find(tmp_path)


def test_union_2_0_is_told_from_2_1_by_its_untrained_refiner(tmp_path: Path) -> None:
    """Both hold tensors of the same names; as diffusers saves 2.0, the refiner's are gone."""
    stored = write_controlnet(tmp_path / "stored.safetensors", "2.0")
    slim = {name: value for name, value in load_file(stored).items() if not name.startswith("control_noise_refiner.")}
    save_file(slim, tmp_path / "slim.safetensors")
    assert find(stored).layout == find(tmp_path / "slim.safetensors").layout
    assert find(stored).layout.name.startswith("Union 2.0")
    assert find(stored).digest != find(tmp_path / "slim.safetensors").digest


def test_places_that_a_config_says(whole: Path, tmp_path: Path) -> None:
    shutil.copy(whole, tmp_path / "net.safetensors")
    for places, problem in (
        ([0, 1, 5], None),
        ([0, 1], "control_layers_places=[0, 1]: 3 places, the first 0, were expected"),
        ([1, 2, 3], "control_layers_places=[1, 2, 3]: 3 places, the first 0, were expected"),
        ([0, 4, 2], "are no ascending places of 6 layers"),
        ([0, 2, 6], "are no ascending places of 6 layers"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"control_layers_places": places}), encoding="utf-8")
        if problem is None:
            assert list(find(tmp_path).layout.places) == places
            assert find(tmp_path).digest != find(whole).digest
            continue
        with pytest.raises(UserError) as error:
            find(tmp_path)
        assert problem in str(error.value)


def without(name: str) -> Callable[[Tensors], None]:
    def drop(tensors: Tensors) -> None:
        for one in [one for one in tensors if one.startswith(name)]:
            del tensors[one]

    return drop


def with_(name: str, value: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: value})


SPOILT = {
    "incomplete": (without("control_layers.2.attention.to_v"), "lacks 1 tensor: control_layers.2.attention.to_v"),
    "a layer in between": (without("control_layers.1."), "lacks 17 tensors: control_layers.1."),
    "another number of layers": (without("control_layers.2.attention_norm1"), "lacks 1 tensor"),
    "no embedder": (without("control_all_x_embedder"), "lacks control_all_x_embedder.2-1.weight"),
    "other channels": (
        with_("control_all_x_embedder.2-1.weight", torch.zeros(288, 80)),
        "takes 20 channels: need 16 (a control picture) or 33 (with mask and picture)",
    ),
    "stray": (with_("control_layers.0.extra.weight", torch.zeros(2)), "1 tensor belongs to no part of a ControlNet"),
    "fp8": (
        with_("control_layers.0.attention.to_q.weight", torch.zeros(288, 288, dtype=torch.float8_e4m3fn)),
        "control_layers.0.attention.to_q.weight is stored as F8_E4M3: quantised ControlNets are not read",
    ),
    "marked": (with_("control_layers.0.attention.to_q.comfy_quant", torch.zeros(2)), "quantised ControlNets"),
    "NaN": (
        with_("control_layers.0.after_proj.bias", torch.full((288,), torch.nan)),
        "control_layers.0.after_proj.bias holds NaN or infinity",
    ),
    "another size": (
        with_("control_layers.0.after_proj.weight", torch.zeros(64, 64)),
        "control_layers.0.after_proj.weight has the shape [64, 64], the model asks for [288, 288]",
    ),
    "a LoRA": (
        with_("diffusion_model.layers.0.attention.to_q.lora_A.weight", torch.zeros(4, 288)),
        "is a LoRA or another adapter, not a ControlNet: use loras=[FILE]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(SPOILT))
def test_a_spoilt_file_is_refused_by_its_name_and_tensor(kind: str, whole: Path, tmp_path: Path) -> None:
    change, text = SPOILT[kind]
    tensors = load_file(whole)
    change(tensors)
    save_file(tensors, tmp_path / "spoilt.safetensors")
    with pytest.raises(UserError) as error:
        find(tmp_path / "spoilt.safetensors")
    message = str(error.value)
    assert str(tmp_path / "spoilt.safetensors") in message
    assert text in message
    assert "\n" not in message


def test_other_things_are_refused(whole: Path, tmp_path: Path) -> None:
    save_file({"down_blocks.0.weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html>", encoding="utf-8")
    (tmp_path / "short.safetensors").write_bytes(whole.read_bytes()[:-7])
    (tmp_path / "empty").mkdir()
    (tmp_path / "many").mkdir()
    for name in "ab":
        shutil.copy(whole, tmp_path / "many" / f"{name}.safetensors")
    transformer = next((NANO / "transformer").glob("*.safetensors"))
    for path, text in (
        ("none.safetensors", "no such file or directory"),
        ("foreign.safetensors", "is no ControlNet of Z-Image (it holds down_blocks.0.weight)"),
        ("page.safetensors", "is a web page, not weights"),
        ("short.safetensors", "truncated"),
        ("empty", "holds no .safetensors file"),
        ("many", "holds several files (a.safetensors, b.safetensors): name one of them"),
        (transformer, "is a transformer of Z-Image, not a ControlNet: use model.transformer=FILE"),
    ):
        with pytest.raises(UserError) as error:
            find(tmp_path / path)
        assert text in str(error.value)


def test_made_for_another_model(whole: Path) -> None:
    with pytest.raises(UserError, match=r"has 3 control layers and the model 8 layers, which do not tell where"):
        find(whole, {**TRANSFORMER, "n_layers": 8})
    with pytest.raises(UserError, match=r"has the shape \[288.*the model asks for \[384.*made for another model"):
        find(whole, {**TRANSFORMER, "dim": 384})


def test_an_altered_file_is_refused(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    shutil.copy(whole, path)
    find(path)
    tensors = load_file(path)
    tensors["control_layers.0.after_proj.bias"] += 1
    save_file(tensors, path)
    with pytest.raises(UserError, match="was altered: sha256"):
        find(path)


def test_prepare_info_says_what_it_is(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(["info", str(whole)]) == 0
    out = capsys.readouterr().out
    assert "74 tensors, BF16" in out
    assert "for another model than Z-Image (dim 288, 33 channels)" in out
    assert f"use: model.controlnet={whole} sampling.control_image=PICTURE" in out


def test_it_is_no_checkpoint(whole: Path) -> None:
    with pytest.raises(
        UserError, match=r"is a ControlNet of Z-Image, not a checkpoint: use model\.controlnet=net\.safetensors"
    ):
        open_checkpoint_file(whole)


def test_an_altered_file_is_accepted_on_request(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "net.safetensors"
    shutil.copy(whole, path)
    find(path)
    save_file({**load_file(path), "control_layers.0.after_proj.bias": torch.zeros(288)}, path)
    assert prepare(["accept", f"model.controlnet={path}"]) == 0
    assert f"{path}: sha256" in capsys.readouterr().out
    find(path)
