"""memory=streamed computes bit for bit what resident weights do, whatever order the blocks are asked for in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support import NANO
from tests.support.reference import noise
from zimage_runner.engines.native import streamed_encoder, streaming
from zimage_runner.engines.native.assembly import load_model
from zimage_runner.engines.native.model import Options
from zimage_runner.engines.native.sampler import Guidance
from zimage_runner.engines.native.streaming import BlockStream
from zimage_runner.engines.native.transformer import Block
from zimage_runner.memory.policies import Streamed
from zimage_runner.model import Model, Prepare, Source
from zimage_runner.weights.find.resolve import resolve
from zimage_runner.weights.packed.format import packing_of
from zimage_runner.weights.parts import PackedParts, packed_parts
from zimage_runner.weights.prepared.prepare import build
from zimage_runner.weights.safetensors_file import read_header

TEXTS = ["a red fox in the snow", "a cat", "two red cubes on a blue table"]


def test_bfloat16_too() -> None:
    options = [Options(dtype=torch.bfloat16, streamed=streamed) for streamed in (False, True)]
    resident, streamed = (load_model(NANO, option) for option in options)
    embeds, z = resident.encode(TEXTS[:1], 512), noise(1, 32, 32)
    assert torch.equal(streamed.denoise(embeds, z, 1), resident.denoise(embeds, z, 1))


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8"])
def test_captions_and_latents_are_those_of_resident_weights(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_encoder, "TOKENS_AT_ONCE", 40)  # not all captions at once
    resident, streamed = (load_model(NANO, Options(precision=precision, streamed=s)) for s in (False, True))
    embeds, same = (model.encode(TEXTS, 512) for model in (resident, streamed))
    assert all(torch.equal(a, b) for a, b in zip(embeds, same, strict=True))
    for batch, guidance, steps in ((1, Guidance(), 2), (2, Guidance(scale=2.0), 1)):
        args = (embeds[:batch], noise(batch, 48, 32), steps, guidance, embeds[1 : 1 + batch])
        assert torch.equal(resident.denoise(*args), streamed.denoise(*args))


def test_an_error_in_the_middle_of_a_forward_spoils_no_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    resident, streamed = (load_model(NANO, Options(streamed=s)) for s in (False, True))
    embeds, z = resident.encode(TEXTS[:1], 512), noise(1, 64, 64)
    forward, calls = Block.forward, []

    def failing(self: Block, *args: object) -> object:
        calls.append(self)
        if len(calls) == 5:
            raise RuntimeError("out of memory, say")
        return forward(self, *args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Block, "forward", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        streamed.denoise(embeds, z, 1)
    monkeypatch.setattr(Block, "forward", forward)
    assert torch.equal(streamed.denoise(embeds, z, 2), resident.denoise(embeds, z, 2))


def test_no_more_than_a_few_blocks_are_on_the_device() -> None:
    model = load_model(NANO, Options(streamed=True))
    model.denoise(model.encode(TEXTS[:1], 512), noise(1, 64, 64), 1)
    stream = model.transformer.stream
    assert isinstance(stream, BlockStream)
    assert len(stream._places) == streaming.PLACES
    largest = max(stream._sizes)
    assert all(place.memory.nbytes == largest for place in stream._places)
    blocks = [*model.transformer.noise_refiner, *model.transformer.layers]
    assert sum(stream._sizes) >= sum(
        weight.nbytes for block in blocks for weight in streaming.large_weights(block, torch.float32)
    )


def test_what_refines_captions_is_on_the_device_only_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(NANO, Options(streamed=True))
    captions = model.transformer.caption_stream
    assert isinstance(captions, BlockStream)
    places: list[int] = []
    forward = Block.forward

    def watched(self: Block, *args: object) -> object:
        places.append(len(captions._places))
        return forward(self, *args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Block, "forward", watched)
    for text in TEXTS[:2]:
        places.clear()
        model.denoise(model.encode([text], 512), noise(1, 64, 64), 1)
        refiners = len(model.transformer.context_refiner)
        assert places == [1] * refiners + [0] * (len(places) - refiners)
    for block in model.transformer.context_refiner:
        for weight in streaming.large_weights(block, torch.float32):
            assert captions.holds(weight.owner)


def test_short_host_memory_is_told_and_made_up_for_by_the_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ZIMAGE_RUNNER_CACHE", str(tmp_path))
    monkeypatch.setattr(streaming, "available_memory", lambda: 1 << 20)
    streamed, resident = load_model(NANO, Options(streamed=True)), load_model(NANO, Options())
    (warning,) = caplog.messages
    assert warning.startswith("memory=streamed: 0.0 GB of weights, 0.0 GB of host memory free: they are read from")
    assert list(tmp_path.iterdir()) == []  # a file without a name, gone with the process
    embeds, z = resident.encode(TEXTS[:1], 512), noise(1, 64, 64)
    assert torch.equal(streamed.denoise(embeds, z, 1), resident.denoise(embeds, z, 1))


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_packed_files_are_read_part_by_part(
    precision: str, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ZIMAGE_RUNNER_CACHE", str(tmp_path))
    monkeypatch.setattr("zimage_runner.weights.packed.format.FRAME_VALUES", 1 << 14)  # many frames, which parts share
    model = Model(name="n", source=Source.local, path=str(small_checkpoint), prepare=Prepare.always)
    found = build(resolve(model), model, True, precision)
    path = found.weights["transformer"].path
    parts, packing = packed_parts(path, "cpu"), packing_of(read_header(path))
    assert isinstance(parts, PackedParts)
    assert packing is not None
    assert len(packing.frames) > 20
    plain, streamed = (
        load_model(small_checkpoint, Options(precision=precision, dtype=torch.bfloat16)),
        load_model(
            found.path, Options(precision=precision, dtype=torch.bfloat16, streamed=True), published=small_checkpoint
        ),
    )
    streams = (streamed.transformer.stream, streamed.transformer.caption_stream)
    for name, tensor in plain.transformer.named_parameters():
        loaded = streamed.transformer.get_parameter(name)
        assert torch.equal(tensor.float(), loaded.float()), name
        owner, _, leaf = name.rpartition(".")
        module = streamed.transformer.get_submodule(owner)
        if leaf != "weight" or not any(stream is not None and stream.holds(module) for stream in streams):
            # On the device, and no more there than itself: a layer of a packed file comes in one piece of memory.
            assert loaded.untyped_storage().nbytes() == loaded.nbytes, name


def test_a_packed_file_has_to_be_one() -> None:
    assert packed_parts(NANO / "vae" / "diffusion_pytorch_model.safetensors", "cpu") is None


def test_the_option() -> None:
    memory = Streamed()
    assert (memory.placement, memory.staged, memory.streamed, memory.offloads) == ("streamed", True, True, False)
