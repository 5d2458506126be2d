"""The fidelity bound catches the mistakes it is there for: each is made on purpose, and must exceed it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support import NANO
from tests.support.reference import TOLERANCE, Reference, captions, difference, noise
from zimage_runner.engines.native import model as model_module
from zimage_runner.engines.native import transformer as transformer_module
from zimage_runner.engines.native.assembly import load_model
from zimage_runner.engines.native.model import NativeModel, Options
from zimage_runner.engines.native.rope import RotaryTable
from zimage_runner.engines.native.sampler import Guidance
from zimage_runner.engines.native.sdpa import Attention

STEPS = 3
"""The bound is one of eight forwards: a mistake that exceeds it after three is caught all the more."""
Mutation = Callable[[NativeModel, pytest.MonkeyPatch], None]


def wrong_attention_scale(native: NativeModel, patch: pytest.MonkeyPatch) -> None:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return F.scaled_dot_product_attention(query, key, value, scale=0.99 * query.shape[-1] ** -0.5).transpose(1, 2)

    native.attention = Attention("wrong", attend)
    native.transformer.attend = attend


def wrong_table(change: Callable[[RotaryTable], RotaryTable]) -> Mutation:
    def mutate(native: NativeModel, patch: pytest.MonkeyPatch) -> None:
        right = model_module.sequence_tables

        def wrong(*args: Any) -> tuple[RotaryTable, RotaryTable]:
            image, unified = right(*args)
            return change(image), change(unified)

        patch.setattr(model_module, "sequence_tables", wrong)

    return mutate


def wrong_parameter(name: str) -> Mutation:
    def mutate(native: NativeModel, patch: pytest.MonkeyPatch) -> None:
        native.transformer.get_parameter(name).mul_(0.98).add_(0.002)

    return mutate


def no_image_padding(native: NativeModel, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(transformer_module, "padded_length", lambda tokens: tokens)
    right = model_module.sequence_tables

    def wrong(rows: int, columns: int, *args: Any) -> tuple[RotaryTable, RotaryTable]:
        image, unified = right(rows, columns, *args)
        keep = torch.ones(len(unified.cos), dtype=torch.bool)
        keep[rows * columns : len(image.cos)] = False
        tokens = rows * columns
        return RotaryTable(image.cos[:tokens], image.sin[:tokens]), RotaryTable(unified.cos[keep], unified.sin[keep])

    patch.setattr(model_module, "sequence_tables", wrong)


def wrong_shift(native: NativeModel, patch: pytest.MonkeyPatch) -> None:
    native.shift = 3.01


def one_step_more(native: NativeModel, patch: pytest.MonkeyPatch) -> None:
    right = model_module.make_schedule
    patch.setattr(model_module, "make_schedule", lambda steps, *rest: right(steps + 1, *rest))


def caption_positions_doubled(native: NativeModel, patch: pytest.MonkeyPatch) -> None:
    # A shift of all positions would change nothing: rotary attention sees differences alone.
    right = model_module.caption_positions
    patch.setattr(model_module, "caption_positions", lambda length: 2 * right(length))


def stale_caption(native: NativeModel, patch: pytest.MonkeyPatch) -> None:
    first = native._caption(captions(12, seed=9)[0])
    patch.setattr(native, "_caption", lambda embeds: first)


MUTATIONS: dict[str, Mutation] = {
    "attention scale": wrong_attention_scale,
    "rotation backwards": wrong_table(lambda t: RotaryTable(t.cos, -t.sin)),
    "angles of half precision": wrong_table(lambda t: RotaryTable(t.cos.bfloat16().float(), t.sin.bfloat16().float())),
    "positions off by one": wrong_table(lambda t: RotaryTable(t.cos.roll(1, 0), t.sin.roll(1, 0))),
    "caption positions": caption_positions_doubled,
    "caption padding token": wrong_parameter("cap_pad_token"),
    "image padding token": wrong_parameter("x_pad_token"),
    "no image padding": no_image_padding,
    "a query norm": wrong_parameter("layers.5.attention.norm_qk"),
    "a gate's norm": wrong_parameter("layers.0.ffn_norm2"),
    "final scale": wrong_parameter("final_modulation.weight"),
    "schedule's shift": wrong_shift,
    "one step more": one_step_more,
    "another caption": stale_caption,
}


@pytest.fixture
def mutant(monkeypatch: pytest.MonkeyPatch) -> NativeModel:
    """A model of its own, to be broken."""
    return load_model(NANO, Options())


@pytest.fixture(scope="module")
def expected(reference: Reference) -> torch.Tensor:
    return reference.denoise(captions(12), noise(1, 144, 80), STEPS)


def test_unchanged_passes(mutant: NativeModel, expected: torch.Tensor) -> None:
    assert difference(mutant.denoise(captions(12), noise(1, 144, 80), STEPS), expected) <= TOLERANCE


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught(
    mutant: NativeModel, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with torch.inference_mode():
        MUTATIONS[name](mutant, monkeypatch)
    assert difference(mutant.denoise(captions(12), noise(1, 144, 80), STEPS), expected) > TOLERANCE


@pytest.fixture(scope="module")
def expected_fp8() -> torch.Tensor:
    """What eight-bit arithmetic gives, bit by bit the same on this machine every time."""
    return load_model(NANO, Options(precision="fp8")).denoise(captions(12), noise(1, 144, 80), STEPS)


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught_in_fp8_too(expected_fp8: torch.Tensor, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    mutant = load_model(NANO, Options(precision="fp8"))
    with torch.inference_mode():
        MUTATIONS[name](mutant, monkeypatch)
    assert difference(mutant.denoise(captions(12), noise(1, 144, 80), STEPS), expected_fp8) > TOLERANCE


def test_guidance_on_the_wrong_side_is_caught(native: NativeModel, reference: Reference) -> None:
    embeds, negatives, z = captions(12), captions(3, seed=1), noise(1, 32, 32)
    expected = reference.denoise(embeds, z, negative_prompt_embeds=negatives, guidance_scale=2.0)
    swapped = native.denoise(negatives, z, 8, Guidance(scale=2.0), embeds)
    assert difference(swapped, expected) > TOLERANCE
