"""One known change of weights, written as every trainer and converter writes it.

The change is a LoRA of rank 4 of a few modules (``known``); each writer returns the tensors and the header's texts of
a file that means exactly that change.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tests.support.weight_formats import BLOCKS, SMALL, Weights

RANK, ALPHA = 4, 2.0
ATTENTION = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
FEED_FORWARD = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
ADALN = ("adaLN_modulation.0",)


@dataclass(frozen=True)
class Known:
    """Factors of each module: what is added is ALPHA / RANK * up @ down."""

    up: Weights
    down: Weights

    def difference(self, module: str) -> torch.Tensor:
        return ALPHA / RANK * (self.up[module] @ self.down[module])

    def only(self, *modules: str, blocks: tuple[str, ...] = ("layers.0", "layers.1")) -> Known:
        names = [f"{block}.{module}" for block in blocks for module in modules]
        names = [name for name in names if name in self.up]
        return Known({n: self.up[n] for n in names}, {n: self.down[n] for n in names})


def known() -> Known:
    generator = torch.Generator().manual_seed(4)
    up, down = {}, {}
    for block in BLOCKS:
        for module in (*ATTENTION, *FEED_FORWARD, *ADALN):
            shape = SMALL.get(f"{block}.{module}.weight")
            if shape:
                up[f"{block}.{module}"] = torch.randn(shape[0], RANK, generator=generator) * 0.1
                down[f"{block}.{module}"] = torch.randn(RANK, shape[1], generator=generator) * 0.1
    return Known(up, down)


Layout = Callable[[Known], tuple[Weights, dict[str, str]]]


def underscored(module: str) -> str:
    return module.replace(".", "_")


def pairs(
    change: Known,
    name: Callable[[str], str],
    down: str,
    up: str,
    alpha: str | None = "alpha",
    fold: tuple[float, float] = (1.0, 1.0),
) -> Weights:
    out: Weights = {}
    for module in change.up:
        out[f"{name(module)}.{down}"] = change.down[module] * fold[0]
        out[f"{name(module)}.{up}"] = change.up[module] * fold[1]
        if alpha:
            out[f"{name(module)}.{alpha}"] = torch.tensor(ALPHA)
    return out


SCALE = ALPHA / RANK
ROOT = SCALE**0.5


def fused(change: Known, name: Callable[[str], str], down: str, up: str, with_alpha: bool = True) -> Weights:
    """qkv as one LoRA of three times the rank, up block-diagonal; out under ComfyUI's name."""
    out: Weights = {}
    factor = 1.0 if with_alpha else SCALE
    for module in change.up:
        block, _, last = module.rpartition(".attention.")
        if last in ("to_k", "to_v"):
            continue
        if last == "to_q":
            parts = [f"{block}.attention.to_{kind}" for kind in "qkv"]
            target, rank = f"{block}.attention.qkv", 3
            factors = torch.cat([change.down[p] for p in parts]), torch.block_diag(*[change.up[p] for p in parts])
        else:
            target, rank = module.replace("attention.to_out.0", "attention.out"), 1
            factors = change.down[module], change.up[module]
        out[f"{name(target)}.{down}"], out[f"{name(target)}.{up}"] = factors[0], factors[1] * factor
        if with_alpha:
            out[f"{name(target)}.alpha"] = torch.tensor(ALPHA * rank)
    return out


def peft(change: Known) -> tuple[Weights, dict[str, str]]:
    config = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA, "transformer.alpha_pattern": {}}
    tensors = pairs(change, lambda m: f"transformer.{m}", "lora_A.weight", "lora_B.weight", None)
    return tensors, {"lora_adapter_metadata": json.dumps(config)}


def peft_patterns(change: Known) -> tuple[Weights, dict[str, str]]:
    """Another alpha for some modules; rank-stabilised scale."""
    config = {
        "transformer.r": RANK,
        "transformer.lora_alpha": 16.0,
        "transformer.use_rslora": True,
        "transformer.alpha_pattern": dict.fromkeys(change.up, ALPHA / RANK**0.5),
    }
    tensors = pairs(change, lambda m: f"transformer.{m}", "lora_A.weight", "lora_B.weight", None)
    return tensors, {"lora_adapter_metadata": json.dumps(config)}


def anime_z(change: Known) -> tuple[Weights, dict[str, str]]:
    """Split and fused spellings of the same change in one file."""

    def name(module: str) -> str:
        return f"lora_unet_{underscored(module)}"

    split = pairs(change, name, "lora_down.weight", "lora_up.weight")
    return {**split, **fused(change, name, "lora_down.weight", "lora_up.weight")}, {}


def lokr(name: Callable[[str], str], is_decomposed: bool) -> Layout:
    def layout(change: Known) -> tuple[Weights, dict[str, str]]:
        out: Weights = {}
        for module in change.up:
            out[f"{name(module)}.lokr_w1"] = torch.ones(1, 1)
            if is_decomposed:
                out[f"{name(module)}.lokr_w2_a"] = change.up[module]
                out[f"{name(module)}.lokr_w2_b"] = change.down[module]
            else:
                out[f"{name(module)}.lokr_w2"] = change.difference(module)
            out[f"{name(module)}.alpha"] = torch.tensor(ALPHA if is_decomposed else 1e10)
        return out, {}

    return layout


def loha(change: Known) -> tuple[Weights, dict[str, str]]:
    out: Weights = {}
    for module in change.up:
        rows, columns = change.up[module].shape[0], change.down[module].shape[1]
        name = f"lycoris_{underscored(module)}"
        out[f"{name}.hada_w1_a"], out[f"{name}.hada_w1_b"] = change.up[module], change.down[module]
        out[f"{name}.hada_w2_a"], out[f"{name}.hada_w2_b"] = torch.ones(rows, 1), torch.ones(1, columns)
        out[f"{name}.alpha"] = torch.tensor(ALPHA)
    return out, {}


def dora(weights: Weights, key: str, name: Callable[[str], str], shape: Callable[[int], tuple[int, ...]]) -> Layout:
    """With the magnitudes that W + difference has, so that the change is the difference."""

    def layout(change: Known) -> tuple[Weights, dict[str, str]]:
        out = pairs(change, name, "lora_A.weight", "lora_B.weight", None, (1.0, SCALE))
        for module in change.up:
            norm = (weights[f"{module}.weight"].float() + change.difference(module)).norm(dim=1)
            out[f"{name(module)}.{key}"] = norm.reshape(shape(len(norm)))
        return out, {}

    return layout


def full(change: Known) -> tuple[Weights, dict[str, str]]:
    return {f"diffusion_model.{module}.diff": change.difference(module) for module in change.up}, {}


def layouts(weights: Weights) -> dict[str, tuple[Layout, tuple[str, ...]]]:
    """Name -> (writer, the modules that such files hold)."""
    attention, linear = ATTENTION, (*ATTENTION, *FEED_FORWARD)
    a, b, kohya_down, kohya_up = "lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight"

    def plain(name: Callable[[str], str], down: str, up: str, alpha: str | None = "alpha") -> Layout:
        fold = (1.0, 1.0) if alpha else (1.0, SCALE)
        return lambda change: (pairs(change, name, down, up, alpha, fold), {})

    return {
        "diffusers peft": (peft, attention),
        "diffusers peft, patterns": (peft_patterns, attention),
        "ai-toolkit": (plain(lambda m: f"diffusion_model.{m}", a, b, None), (*linear, *ADALN)),
        "musubi": (plain(lambda m: f"lora_unet_{underscored(m)}", kohya_down, kohya_up), linear),
        "musubi other": (
            lambda change: (pairs(change, lambda m: f"diffusion_model.{m}", a, b, None, (ROOT, ROOT)), {}),
            linear,
        ),
        "kohya fused": (
            lambda change: (fused(change, lambda m: f"lora_unet_{underscored(m)}", kohya_down, kohya_up), {}),
            linear,
        ),
        "VideoX-Fun": (plain(lambda m: f"lora_unet__{underscored(m)}", kohya_down, kohya_up), linear),
        "OneTrainer": (plain(lambda m: f"transformer.{m}", kohya_down, kohya_up), (*linear, *ADALN)),
        "DiffSynth": (plain(lambda m: m, "lora_A.default.weight", "lora_B.default.weight", None), linear),
        "DiffSynth bare": (plain(lambda m: m, a, b, None), linear),
        "peft itself": (plain(lambda m: f"base_model.model.{m}", a, b, None), linear),
        "old diffusers": (plain(lambda m: f"transformer.{m}", "lora.down.weight", "lora.up.weight", None), attention),
        "ComfyUI fused": (
            lambda change: (fused(change, lambda m: f"diffusion_model.{m}", a, b, False), {}),
            linear,
        ),
        "Anime-Z": (anime_z, (*linear, *ADALN)),
        "SimpleTuner": (plain(lambda m: f"lycoris_{underscored(m)}", kohya_down, kohya_up), linear),
        "lora_transformer": (plain(lambda m: f"lora_transformer_{underscored(m)}", kohya_down, kohya_up), linear),
        "LoKr full": (lokr(lambda m: f"diffusion_model.{m}", False), linear),
        "LoKr decomposed": (lokr(lambda m: f"diffusion_model.{m}", True), linear),
        "LoKr lycoris": (lokr(lambda m: f"lycoris_{underscored(m)}", True), linear),
        "LoHa": (loha, linear),
        "DoRA LyCORIS": (dora(weights, "dora_scale", lambda m: f"transformer.{m}", lambda n: (n, 1)), linear),
        "DoRA ai-toolkit": (dora(weights, "magnitude", lambda m: f"diffusion_model.{m}", lambda n: (n,)), linear),
        "DoRA peft": (dora(weights, "lora_magnitude_vector", lambda m: f"transformer.{m}", lambda n: (n,)), linear),
        "full difference": (full, (*linear, *ADALN)),
    }
