"""The table of names: there and back in every layout, and nothing that it does not know is taken for something."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import weight_formats as support
from zimage_runner.weights.adapters.keys import split_key, target_of
from zimage_runner.weights.formats.configs import config_of, expected_shapes
from zimage_runner.weights.formats.names import component_of, ldm_levels, published

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_comfyui_names_come_back_as_the_published_ones(prefix: str) -> None:
    weights = support.transformer(support.SMALL)
    stored = support.comfyui(weights, prefix)
    assert {component_of(name)[0] for name in stored} == {"transformer"}
    back = [part for name in stored for part in published("transformer", component_of(name)[1])]
    assert sorted(back) == sorted(weights)


def test_published_names_are_their_own() -> None:
    assert all(published("transformer", name) == (name,) for name in support.SMALL)


def test_counts_are_those_of_the_published_files() -> None:
    """453 tensors in ComfyUI's layout, 521 in diffusers'; 398 of Qwen3-4B; 244 of FLUX's VAE."""
    transformer = {
        "all_x_embedder.2-1.weight": (3840, 64),
        "cap_embedder.1.weight": (3840, 2560),
        "noise_refiner.0.attention.norm_q.weight": (128,),
        "noise_refiner.1.x": (1,),
        "layers.29.x": (1,),
    }
    shapes = expected_shapes("transformer", config_of("transformer", transformer))
    assert len(shapes) == 521
    assert shapes["layers.29.adaLN_modulation.0.weight"] == (15360, 256)
    assert shapes["layers.0.feed_forward.w1.weight"] == (10240, 3840)
    fused = {name for name in shapes if not any(f".to_{part}." in name for part in "kv")}
    assert len(fused) == 453
    encoder = {
        "embed_tokens.weight": (151936, 2560),
        "layers.0.self_attn.q_norm.weight": (128,),
        "layers.0.self_attn.q_proj.weight": (4096, 2560),
        "layers.0.self_attn.k_proj.weight": (1024, 2560),
        "layers.0.mlp.gate_proj.weight": (9728, 2560),
        "layers.35.x": (1,),
    }
    assert len(expected_shapes("text_encoder", config_of("text_encoder", encoder))) == 398
    flux = {f"decoder.up_blocks.{i}.resnets.0.conv1.weight": (n, n, 3, 3) for i, n in enumerate((512, 512, 256, 128))}
    flux |= {"encoder.conv_in.weight": (128, 3, 3, 3), "decoder.conv_out.weight": (3, 128, 3, 3)}
    flux |= {"decoder.conv_in.weight": (512, 16, 3, 3), "decoder.up_blocks.0.resnets.2.x": (1,)}
    flux |= {"decoder.mid_block.attentions.0.to_q.weight": (512, 512)}
    assert len(expected_shapes("vae", config_of("vae", flux))) == 244


def test_ldm_names_count_the_decoder_from_the_other_end() -> None:
    weights = support.vae()
    stored = support.ldm(weights, 3, "vae.")
    names = [component_of(name)[1] for name in stored]
    assert {component_of(name)[0] for name in stored} == {"vae"}
    assert ldm_levels(names) == 3
    assert [published("vae", name, 3) for name in names] == [(name,) for name in weights]


@pytest.mark.parametrize("prefix", ["model.", "", "text_encoders.qwen3_4b.transformer.model."])
def test_qwen3_names_lose_their_prefix(prefix: str) -> None:
    for name in support.text_encoder():
        bare = name.removeprefix("model.")
        component, rest = component_of(prefix + bare)
        assert (component, published(component, rest)) == ("text_encoder", (bare,))


def test_llama_cpp_names_of_qwen3() -> None:
    gguf_names = pytest.importorskip("gguf").get_tensor_name_map(__import__("gguf").MODEL_ARCH.QWEN3, 2)
    for name in support.text_encoder():
        theirs = gguf_names.get_name(name.removesuffix(".weight"))
        component, rest = component_of(f"{theirs}.weight")
        assert (component, published(component, rest)) == ("text_encoder", (name.removeprefix("model."),))


MODULES = st.sampled_from([name.removesuffix(".weight") for name in support.SMALL if name.endswith(".weight")])
SPELLINGS = st.sampled_from(
    [
        lambda m: f"transformer.{m}",
        lambda m: f"diffusion_model.{m}",
        lambda m: f"base_model.model.{m}",
        lambda m: f"base_model.model.transformer.{m}",
        lambda m: m,
        lambda m: "lora_unet_" + m.replace(".", "_"),
        lambda m: "lora_unet__" + m.replace(".", "_"),
        lambda m: "lora_transformer_" + m.replace(".", "_"),
        lambda m: "lycoris_" + m.replace(".", "_"),
        lambda m: "diffusion_model." + m.replace("_refiner", ".refiner"),
    ]
)
ROLES = st.sampled_from(
    [("lora_A.weight", "down"), ("lora_A.default.weight", "down"), ("lora_up.weight", "up"), ("alpha", "alpha"),
     ("lokr_w2_b", "lokr_w2_b"), ("hada_w1_a", "hada_w1_a"), ("dora_scale", "magnitude"), ("diff_b", "diff_b"),
     ("lora_magnitude_vector.default.weight", "magnitude"), ("w_norm", "diff"), ("lora.up.weight", "up")]
)  # fmt: skip


@given(module=MODULES, spell=SPELLINGS, role=ROLES)
def test_every_spelling_of_a_module_is_understood(module: str, spell, role: tuple[str, str]) -> None:
    parts = split_key(f"{spell(module)}.{role[0]}")
    assert parts == (spell(module), role[1])
    target = target_of(spell(module))
    assert target is not None
    assert (target.component, target.modules) == ("transformer", (module,))


@settings(max_examples=60)
@given(st.text(max_size=60))
def test_unknown_texts_are_no_keys_and_raise_nothing(text: str) -> None:
    parts = split_key(text)
    assert parts is None or text.startswith(parts[0])
    target = target_of(text)
    assert target is None or all(
        name in expected_modules() or name.startswith(("layers.", "noise_refiner.", "context_refiner."))
        for name in target.modules
    )
    assert component_of(text)[0] in ("transformer", "text_encoder", "vae")
    assert published("transformer", text)


def expected_modules() -> set[str]:
    names = {name.removesuffix(".weight").removesuffix(".bias") for name in support.SMALL}
    return names | {"embed_tokens", "norm"}
