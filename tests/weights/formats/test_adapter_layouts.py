"""Every layout of adapters means the same change of weights; what is not understood is refused by name."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import pytest
import torch

from tests.support import adapter_layouts as known_layouts
from tests.support import weight_formats as support
from tests.support.adapter_layouts import ADALN, ATTENTION, FEED_FORWARD, Known, known, layouts
from zimage_runner.errors import UserError
from zimage_runner.weights.adapters.adapter import Adapter, lora_hash, merged, tensors_sha256
from zimage_runner.weights.adapters.reader import describe_adapter, read_adapter

Weights = support.Weights


@functools.cache
def base() -> Weights:
    return support.transformer(support.SMALL)


@functools.cache
def change() -> Known:
    return known()


def apply(adapter: Adapter, weights: Weights, strength: float) -> Weights:
    """The weights after the adapter, where it changes them, as an engine with split matrices would do it."""
    out: Weights = {}
    for delta in adapter.deltas:
        parts = [weights[name] for name in delta.tensors]
        value = merged(parts[0] if len(parts) == 1 else torch.cat(parts), [(delta.change, strength)])
        out.update(zip(delta.tensors, value.split([len(part) for part in parts]), strict=True))
    return out


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bfloat16 numbers, but for sums that lie on the edge between two of them."""
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected.float(), rtol=2**-7, atol=1e-5)
    assert (found != expected).float().mean() < 1e-3


@pytest.mark.parametrize("layout", list(layouts(base())))
def test_every_layout_gives_the_same_merged_weights(layout: str, tmp_path: Path) -> None:
    write, modules = layouts(base())[layout]
    part = change().only(*modules, blocks=("layers.0",))
    tensors, metadata = write(part)
    adapter = read_adapter(support.write(tmp_path / "a.safetensors", tensors, metadata))
    adapter.check("transformer", support.SMALL)
    for strength in (1.0, -0.6):
        found = apply(adapter, base(), strength)
        assert found.keys() == {f"{module}.weight" for module in part.up}
        for module in part.up:
            weight = base()[f"{module}.weight"]
            expected = (weight.float() + strength * part.difference(module)).bfloat16()
            assert_close(found[f"{module}.weight"], expected)


@pytest.mark.parametrize("layout", ["ai-toolkit", "musubi", "musubi other", "DiffSynth", "kohya fused", "Anime-Z"])
def test_layouts_that_diffusers_converts_mean_the_same_to_it(layout: str, tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_z_image_lora_to_diffusers as convert

    write, modules = layouts(base())[layout]
    tensors, metadata = write(change().only(*modules, blocks=("layers.0",)))
    adapter = read_adapter(support.write(tmp_path / "a.safetensors", tensors, metadata))
    theirs = convert({key: value.clone() for key, value in tensors.items()})
    found = apply(adapter, base(), 1.0)
    assert found.keys() == {
        key.removeprefix("transformer.").replace(".lora_A", "") for key in theirs if ".lora_A" in key
    }
    for name in found:
        lora = f"transformer.{name.removesuffix('.weight')}"
        added = theirs[f"{lora}.lora_B.weight"].float() @ theirs[f"{lora}.lora_A.weight"].float()
        assert_close(found[name], (base()[name].float() + added).bfloat16())


def test_broken_refiner_names_of_musubis_converter(tmp_path: Path) -> None:
    part = change().only("attention.to_q", blocks=("noise_refiner.0", "context_refiner.0"))
    write, _ = layouts(base())["musubi other"]
    tensors = {key.replace("_refiner", ".refiner"): value for key, value in write(part)[0].items()}
    adapter = read_adapter(support.write(tmp_path / "a.safetensors", tensors))
    assert {delta.tensors for delta in adapter.deltas} == {(f"{module}.weight",) for module in part.up}


def test_lokr_is_a_kronecker_product_of_both_factors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    w1, w2 = torch.randn(8, 4, generator=generator), torch.randn(12, 24, generator=generator)
    a, b = torch.randn(12, 2, generator=generator), torch.randn(2, 24, generator=generator)
    q, k = "diffusion_model.layers.0.attention.to_q", "diffusion_model.layers.0.attention.to_k"
    tensors = {f"{q}.lokr_w1": w1, f"{q}.lokr_w2": w2, f"{q}.alpha": torch.tensor(9.9e9)}
    tensors |= {f"{k}.lokr_w1": w1.clone(), f"{k}.lokr_w2_a": a, f"{k}.lokr_w2_b": b, f"{k}.alpha": torch.tensor(1.0)}
    adapter = read_adapter(support.write(tmp_path / "a.safetensors", tensors))
    zero = torch.zeros(96, 96)
    found = {delta.source: delta.change.apply(zero, 1.0) for delta in adapter.deltas}
    for module, second in ((q, w2), (k, 0.5 * a @ b)):
        expected = (w1[:, None, :, None] * second[None, :, None, :]).reshape(96, 96)
        torch.testing.assert_close(found[module], expected)


def test_loha_multiplies_two_products(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(6)
    factors = [torch.randn(shape, generator=generator) for shape in ((96, 3), (3, 96), (96, 3), (3, 96))]
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    tensors = {f"lora_unet_layers_1_attention_to_v.{name}": factor for name, factor in zip(names, factors, strict=True)}
    tensors["lora_unet_layers_1_attention_to_v.alpha"] = torch.tensor(1.5)
    (delta,) = read_adapter(support.write(tmp_path / "a.safetensors", tensors)).deltas
    one, two, three, four = factors
    expected = 2 * 0.5 * torch.einsum("or,ri,os,si->oi", one, two, three, four)
    torch.testing.assert_close(delta.change.apply(torch.zeros(96, 96), 2.0), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("by", ["row", "column"])
def test_dora_sets_the_length_of_rows_or_columns(by: str, tmp_path: Path) -> None:
    part = change().only("attention.to_q", blocks=("layers.0",))
    (module,) = part.up
    size = torch.rand(96, generator=torch.Generator().manual_seed(7)) + 0.5
    tensors = known_layouts.pairs(part, lambda m: f"transformer.{m}", "lora_down.weight", "lora_up.weight")
    tensors[f"transformer.{module}.dora_scale"] = size[:, None] if by == "row" else size[None]
    (delta,) = read_adapter(support.write(tmp_path / "a.safetensors", tensors)).deltas
    weight = base()[f"{module}.weight"].float()
    direction = weight + part.difference(module)
    length = direction.square().sum(1 if by == "row" else 0, keepdim=True).sqrt()
    expected = direction / length * (size[:, None] if by == "row" else size[None])
    torch.testing.assert_close(delta.change.apply(weight, 1.0), expected)
    torch.testing.assert_close(delta.change.apply(weight, 0.25), weight + 0.25 * (expected - weight))


def test_differences_of_norms_biases_and_tokens(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(8)
    tensors = {
        "diffusion_model.layers.0.attention_norm1.diff": torch.randn(96, generator=generator),
        "lycoris_layers_0_ffn_norm2.w_norm": torch.randn(96, generator=generator),
        "diffusion_model.layers.0.attention.q_norm.diff": torch.randn(16, generator=generator),
        "diffusion_model.layers.0.adaLN_modulation.0.diff_b": torch.randn(384, generator=generator),
        "diffusion_model.final_layer.linear.diff": torch.randn(64, 96, generator=generator),
        "diffusion_model.x_embedder.set_weight": torch.randn(96, 64, generator=generator),
        "diffusion_model.x_pad_token.diff": torch.randn(96, generator=generator),
    }
    adapter = read_adapter(support.write(tmp_path / "a.safetensors", tensors))
    adapter.check("transformer", support.SMALL)
    found = apply(adapter, base(), 0.5)
    values = dict(
        zip(
            (
                "layers.0.attention_norm1.weight", "layers.0.ffn_norm2.weight", "layers.0.attention.norm_q.weight",
                "layers.0.adaLN_modulation.0.bias", "all_final_layer.2-1.linear.weight", "all_x_embedder.2-1.weight",
                "x_pad_token",
            ),
            tensors.values(),
            strict=True,
        )
    )  # fmt: skip
    assert found.keys() == values.keys()
    for name, value in values.items():
        weight = base()[name].float()
        full = value.reshape(weight.shape) if "embedder" in name else weight + value.reshape(weight.shape)
        torch.testing.assert_close(found[name], (0.5 * weight + 0.5 * full).bfloat16(), rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize(
    "module",
    ["text_encoder.layers.1.self_attn.q_proj", "lora_te_layers_1_self_attn_q_proj",
     "lora_te1_model_layers_1_self_attn_q_proj", "text_encoders.qwen3_4b.transformer.model.layers.1.self_attn.q_proj"],
)  # fmt: skip
def test_text_encoder_keys(module: str, tmp_path: Path) -> None:
    tensors = {f"{module}.lora_down.weight": torch.ones(2, 256), f"{module}.lora_up.weight": torch.ones(256, 2)}
    adapter = read_adapter(support.write(tmp_path / "a.safetensors", tensors))
    assert [delta.tensors for delta in adapter.of("text_encoder")] == [("layers.1.self_attn.q_proj.weight",)]
    assert not adapter.of("transformer")
    shapes = {n.removeprefix("model."): tuple(t.shape) for n, t in support.text_encoder().items()}
    adapter.check("text_encoder", shapes)
    torch.testing.assert_close(adapter.deltas[0].change.apply(torch.zeros(256, 256), 1.0), torch.full((256, 256), 2.0))


def test_strength_zero_changes_nothing_and_several_add_up() -> None:
    from zimage_runner.weights.adapters.changes import LowRank

    part = change().only("attention.to_q", blocks=("layers.0", "layers.1"))
    first, second = (LowRank(part.down[m], part.up[m], 0.5) for m in part.up)
    weight = base()["layers.0.attention.to_q.weight"]
    assert torch.equal(merged(weight, [(first, 0.0), (second, 0.0)]), weight)
    both = merged(weight.float(), [(first, 0.7), (second, -0.2)])
    one, two = (part.difference(module) for module in part.up)
    torch.testing.assert_close(both, weight.float() + 0.7 * one - 0.2 * two)


Q = "diffusion_model.layers.0.attention.to_q"
GOOD = {f"{Q}.lora_A.weight": torch.ones(2, 96), f"{Q}.lora_B.weight": torch.ones(96, 2)}
BAD = {
    "rank": ({**GOOD, f"{Q}.lora_B.weight": torch.ones(96, 3)}, "ranks differ: lora_down / lora_A is [2, 96]"),
    "half": ({f"{Q}.lora_A.weight": torch.ones(2, 96)}, "to_q has down: a factor is missing"),
    "alpha alone": ({f"{Q}.alpha": torch.ones(())}, "only an alpha: a factor is missing"),
    "nan": ({**GOOD, f"{Q}.lora_B.weight": torch.full((96, 2), torch.nan)}, f"{Q}.lora_B.weight holds NaN or Inf"),
    "inf": ({**GOOD, f"{Q}.alpha": torch.tensor(torch.inf)}, f"{Q}.alpha holds NaN or Inf"),
    "integers": (
        {**GOOD, f"{Q}.lora_B.weight": torch.ones((96, 2), dtype=torch.int8)},
        f"{Q}.lora_B.weight is I8: quantised adapters are not read",
    ),
    "no block": ({f"{Q}.lora_A.weight": torch.ones(96), f"{Q}.lora_B.weight": torch.ones(96, 2)}, "need a matrix"),
    "leftover": (
        {**GOOD, "diffusion_model.layers.0.attention.rotary.lora_A.weight": torch.ones(2, 2)},
        "1 of 3 keys belong to no known part of Z-Image: diffusion_model.layers.0.attention.rotary.lora_A.weight",
    ),
    "other role": ({**GOOD, f"{Q}.lora_mid.weight": torch.ones(2, 2)}, f"no known part of Z-Image: {Q}.lora_mid"),
    "other model": (
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 2)},
        "is no adapter of Z-Image: none of its 1 keys is known (lora_unet_double_blocks_0_img_attn_qkv",
    ),
    "twice": (
        {**GOOD, **{key.replace("diffusion_model", "transformer"): value.clone() for key, value in GOOD.items()}},
        "both change layers.0.attention.to_q.weight: which of them is meant?",
    ),
    "magnitude": ({**GOOD, f"{Q}.magnitude": torch.ones(5)}, "its magnitude has shape [5]: need [96], [96, 1]"),
    "loha": (
        {f"{Q}.hada_w{i}_{half}": torch.ones((2, 8) if half == "b" else (8, 1 + i)) for i in (1, 2) for half in "ab"},
        "ranks differ: hada_w2_b is [2, 8], hada_w2_a [8, 3]",
    ),
    "lokr": ({f"{Q}.lokr_w1": torch.ones(2, 2)}, "need lokr_w2, or lokr_w2_a and lokr_w2_b"),
    "empty": ({}, "holds no tensors: not an adapter"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_together_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    tensors, text = BAD[case]
    path = support.write(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(UserError) as caught:
        read_adapter(path)
    assert text in str(caught.value)
    assert "bad.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ("[1", "lora_adapter_metadata cannot be read"),
        ('{"transformer.lora_alpha": "big"}', "alpha 'big' is no number"),
        ('{"transformer.lora_alpha": 1, "transformer.alpha_pattern": {"(a+)+b": 2}}', "'(a+)+b' is not the end of a"),
    ],
)
def test_bad_peft_settings_are_refused(metadata: str, text: str, tmp_path: Path) -> None:
    path = support.write(tmp_path / "bad.safetensors", GOOD, {"lora_adapter_metadata": metadata})
    with pytest.raises(UserError) as caught:
        read_adapter(path)
    assert text in str(caught.value)


def test_a_wrong_model_is_refused(tmp_path: Path) -> None:
    adapter = read_adapter(support.write(tmp_path / "a.safetensors", GOOD))
    small = {name: tuple(n // 2 for n in shape) for name, shape in support.SMALL.items()}
    with pytest.raises(UserError, match=r"to_q changes a weight of shape \[96, 96\], the model's is \[48, 48\]"):
        adapter.check("transformer", small)
    with pytest.raises(UserError, match=r"the model has no layers\.0\.attention\.to_q\.weight"):
        adapter.check("transformer", {})


def test_description_of_an_adapter(tmp_path: Path) -> None:
    tensors = GOOD | {"lora_te_layers_1_self_attn_q_proj.lora_down.weight": torch.ones(4, 256), "odd": torch.ones(1)}
    lines = describe_adapter(support.write(tmp_path / "a.safetensors", tensors))
    assert lines[1].endswith("MB, 4 tensors")
    assert lines[2] == "adapter: LoRA of 2 modules, rank 2-4"
    assert sorted(lines[3:]) == ["text_encoder: 1 modules", "transformer: 1 modules", "unknown keys: 1"]


def test_hashes_are_those_that_civitai_reads(tmp_path: Path) -> None:
    path = support.write(tmp_path / "a.safetensors", GOOD, {"title": "one"})
    other = support.write(tmp_path / "b.safetensors", GOOD, {"title": "quite another"})
    data = path.read_bytes()
    rest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert tensors_sha256(path) == tensors_sha256(other) == rest
    assert lora_hash(rest) == rest[:12]


def test_all_modules_of_the_layouts_are_tried() -> None:
    assert {m for _, modules in layouts(base()).values() for m in modules} == {*ATTENTION, *FEED_FORWARD, *ADALN}
