"""Weights that are incomplete, altered, quantised or another model's are refused by their headers, before loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import edit_json, refused
from zimage_runner.errors import UserError
from zimage_runner.weights.find.layout import IncompleteCheckpoint, inspect
from zimage_runner.weights.find.resolve import EMBEDDED
from zimage_runner.weights.find.whole import OPTIONAL, REQUIRED, check_configs
from zimage_runner.weights.safetensors_file import BadWeightsFile, parse_tensors

Tensors = dict[str, torch.Tensor]
ENCODER = "text_encoder/model.safetensors"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
QUERY = "layers.0.self_attn.q_proj.weight"


def change(checkpoint: Path, file: str, edit: Callable[[Tensors], Tensors | None]) -> None:
    """Write a weights file anew after ``edit``, which returns other tensors or changes the ones it is given."""
    tensors = {name: tensor.clone() for name, tensor in load_file(checkpoint / file).items()}
    tensors = edit(tensors) or tensors
    (checkpoint / file).unlink()
    save_file(tensors, checkpoint / file)


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {other: tensor for other, tensor in tensors.items() if other != name}


def to_float8(tensors: Tensors) -> None:
    """As tools write it that keep a scale beside each weight (W2)."""
    for name in [name for name, tensor in tensors.items() if tensor.ndim == 2 and ".attention." in name]:
        scale = tensors[name].abs().max().float() / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[name.removesuffix("weight") + "scale_weight"] = scale


def to_int8(tensors: Tensors) -> None:
    tensors["layers.0.attention.to_q.weight"] = tensors["layers.0.attention.to_q.weight"].to(torch.int8)


FAULTS: dict[str, tuple[str, Callable[[Tensors], Tensors | None], str]] = {
    "W1 a tensor gone": (
        ENCODER, without(QUERY), rf"{ENCODER} lacks tensor {QUERY} that its config\.json asks for"
    ),
    "W2 float8 with scales": (TRANSFORMER, to_float8, rf"{TRANSFORMER}: tensor \S+ is (F32|F8_E4M3): quantised"),
    "W5 int8": (TRANSFORMER, to_int8, r"tensor layers\.0\.attention\.to_q\.weight is I8: quantised weights are not"),
    "W5 scales alone": (
        VAE, lambda t: t | {"decoder.conv_in.scale": torch.ones(1)}, r"tensor decoder\.conv_in\.scale is F32: quantised"
    ),
    "W4 prefixed": (
        TRANSFORMER,
        lambda t: {f"model.diffusion_model.{name}": tensor for name, tensor in t.items()},
        r"lacks tensor all_x_embedder\.2-1\.weight \(and \d+ more\).*; .*tensor model\.diffusion_model\.\S+ \(and \d+ "
        r"more\) belongs to no part of the model",
    ),
    "W4 wrong shape": (
        TRANSFORMER, lambda t: t | {"x_pad_token": torch.ones(1, 8)},
        rf"{TRANSFORMER}: tensor x_pad_token has shape \[1, 8\], its config\.json says \[1, 288\]",
    ),
    "another part": (VAE, lambda t: t | {"lora.down": torch.ones(1)}, rf"{VAE}: tensor lora\.down belongs to no part"),
    "twice": (
        ENCODER, lambda t: t | {f"model.{QUERY}": t[QUERY].clone()},
        rf"{ENCODER} holds tensor (model\.)?{QUERY}, which model\.safetensors holds too",
    ),
    "escapes in a name": (VAE, lambda t: t | {"a\x1b[2Jb\n": torch.ones(1)}, r"tensor a \[2Jb  belongs to no part"),
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict, str]] = {
    "W4 a layer too many": (
        "transformer", {"n_layers": 7}, rf"{TRANSFORMER} lacks tensor layers\.6\.\S+ \(and \d+ more\) that its config"
    ),
    "a layer too few": ("transformer", {"n_layers": 5}, r"tensor layers\.5\.\S+ \(and \d+ more\) belongs to no part"),
    "W10 text": ("transformer", {"n_layers": "6"}, r"transformer/config\.json: n_layers=6: need a whole number from 1"),
    "A9 absurd": ("transformer", {"n_layers": 10**9}, r"n_layers=1000000000: need a whole number from 1 to 1000:"),
    "a fraction": ("transformer", {"dim": 288.5}, r"config\.json: dim=288\.5: need a whole number"),
    "true": ("transformer", {"n_heads": True}, r"n_heads=True: need a whole number"),
    "a digit sea": ("text_encoder", {"vocab_size": int("9" * 4000)}, r"vocab_size=9{97}\.\.\.: need a whole"),
    "null": ("vae", {"latent_channels": None}, r"vae/config\.json: latent_channels=None: need a whole number"),
    "no list": ("transformer", {"axes_dims": 48}, r"axes_dims=48: need a list of 3 to 16 numbers"),
    "other axes": ("transformer", {"axes_dims": [16, 16, 32]}, r"axes_dims=\[16, 16, 32\]: need even .* dim/n_heads"),
    "a flag as text": ("vae", {"use_quant_conv": "no"}, r"use_quant_conv=no: need true or false"),
    "no number": ("vae", {"scaling_factor": float("nan")}, r"scaling_factor=nan: need a number above 0"),
    "odd groups": ("vae", {"norm_num_groups": 7}, r"block_out_channels=.*: need multiples of norm_num_groups=7"),
    "another encoder": ("text_encoder", {"hidden_size": 2560}, r"hidden_size=2560, but .* cap_feat_dim=192: it is"),
    "another VAE": ("vae", {"latent_channels": 4}, r"latent_channels=4, but the transformer has in_channels=16: it is"),
    "W5 quantised": (
        "transformer", {"quantization_config": {"quant_method": "sdnq"}}, r"quantization_config: quantised weights"
    ),
    "omni": ("transformer", {"siglip_feat_dim": 1152}, r"siglip_feat_dim=1152: an Omni transformer"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_that_are_not_the_models(nano: Path, fault: str) -> None:
    file, edit, text = FAULTS[fault]
    change(nano, file, edit)
    refused(nano, text)


@pytest.mark.parametrize("fault", CONFIGS)
def test_configs_that_ask_for_something_else(nano: Path, fault: str) -> None:
    component, changes, text = CONFIGS[fault]
    edit_json(nano / component / "config.json", **changes)
    refused(nano, text)


def test_a_field_that_is_missing(nano: Path) -> None:
    path = nano / "transformer/config.json"
    path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text(encoding="utf-8")).items() if k != "n_heads"}),
        encoding="utf-8",
    )
    refused(nano, r"transformer/config\.json lacks n_heads")


def test_a_shard_without_one_of_its_tensors(sharded: Path) -> None:
    """Left out of the index too, so that index and shards agree with each other."""
    index = sharded / "transformer/diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    shard = content["weight_map"].pop("x_pad_token")
    index.write_text(json.dumps(content), encoding="utf-8")
    change(sharded, f"transformer/{shard}", without("x_pad_token"))
    refused(sharded, r"transformer/\*\.safetensors lacks tensor x_pad_token that its config\.json asks for")


def test_names_of_a_causal_language_model_are_whole(nano: Path) -> None:
    head = {"lm_head.weight": torch.ones(1)}
    change(nano, ENCODER, lambda tensors: {f"model.{name}": tensor for name, tensor in tensors.items()} | head)
    assert len(inspect(nano).weights["text_encoder"][0].tensors) > 10


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)
FIELDS = sorted({(part, field) for table in (REQUIRED, OPTIONAL) for part, fields in table.items() for field in fields})


@given(where=st.sampled_from(FIELDS), value=VALUES)
def test_any_value_of_any_field_is_taken_or_refused_in_one_line(where: tuple[str, str], value: object) -> None:
    component, field = where
    names = {"scheduler": "scheduler_config.json"}
    configs = {
        part: json.loads((EMBEDDED / part / names.get(part, "config.json")).read_text(encoding="utf-8"))
        for part in ("text_encoder", "transformer", "vae", "scheduler")
    }
    configs[component][field] = value
    problems: list[str] = []
    try:
        check_configs(EMBEDDED, configs, problems)
    except UserError as error:
        problems.append(str(error))
    assert all(len(problem.splitlines()) == 1 and len(problem) < 500 for problem in problems)
    if isinstance(value, str | dict):
        assert problems


def test_absurd_numbers_in_a_header_cost_nothing() -> None:
    """Products of thousands of numbers with thousands of digits took minutes (A9)."""
    entry = {"dtype": "F32", "shape": [10**4000] * 10_000, "data_offsets": [0, 8]}
    with pytest.raises((BadWeightsFile, ValueError), match="absurd"):
        parse_tensors({f"t{i}": entry for i in range(1000)}, 8)


def test_problems_are_those_of_an_incomplete_checkpoint(nano: Path) -> None:
    """So that a hub is asked for the files again."""
    change(nano, VAE, without("decoder.conv_in.bias"))
    with pytest.raises(IncompleteCheckpoint):
        inspect(nano)
