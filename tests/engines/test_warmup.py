"""Warm-up: what it runs, in which order, and that it stays out of the work."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch

from zimage_runner.engines.base import Engine, ReadyImages
from zimage_runner.engines.request import DenoiseRequest, Posterior
from zimage_runner.errors import UserError
from zimage_runner.sampling import ANY_PICTURE, Controlnet, Inputs, SamplingParams
from zimage_runner.warmup import WARMUP_PROMPT, Article, Generate, Hardware, NoWarmup, WarmupShape

PARAMS = SamplingParams(
    height=128, width=64, num_inference_steps=2, guidance_scale=0.0, negative_prompt="", max_sequence_length=512,
    cfg_normalization=0.0, cfg_truncation=1.0,
)  # fmt: skip
GUIDED = PARAMS.overridden({"guidance_scale": 4.0, "negative_prompt": "blurry"})


class RecordingEngine(Engine):
    """Keeps the calls; a caption has as many rows as its text has words."""

    name = device = "cpu"
    dtype, attention = "float32", "native"

    def __init__(self):
        self.calls: list[tuple] = []
        self.requests: list[DenoiseRequest] = []

    def encode(self, texts, max_sequence_length):
        self.calls.append(("encode", tuple(texts)))
        return [torch.ones(len(text.split()), 4) for text in texts]

    def encode_picture(self, pixels):
        self.calls.append(("encode_picture", pixels.shape))
        mean = torch.zeros(16, pixels.shape[0] // 8, pixels.shape[1] // 8)
        return Posterior(mean=mean, std=mean)

    def denoise(self, request):
        self.requests.append(request)
        lengths = [len(e) for e in request.prompt_embeds]
        negative = [len(e) for e in request.negative_prompt_embeds or []]
        self.calls.append(("denoise", tuple(request.noise.shape), lengths, negative))
        return request.noise

    def decode(self, latents):
        self.calls.append(("decode",))
        return ReadyImages(np.zeros((len(latents), 8, 8, 3), np.uint8))

    def synchronize(self):
        self.calls.append(("synchronize",))

    def close(self):
        pass

    def kinds(self) -> list[str]:
        return [call[0] for call in self.calls]


def test_none_does_nothing():
    engine = RecordingEngine()
    assert NoWarmup().run(engine, [WarmupShape(params=PARAMS)], engine.encode) == []
    assert engine.calls == []


def test_generate_draws_every_shape_as_often_as_asked():
    engine = RecordingEngine()
    shapes = [WarmupShape(params=PARAMS), WarmupShape(params=PARAMS, batch_size=3)]
    passes = Generate(passes=2).run(engine, shapes, engine.encode)
    assert [p.label for p in passes] == ["64x128 #1", "64x128 #2", "64x128 b3 #1", "64x128 b3 #2"]
    assert all(p.seconds >= 0 for p in passes)
    assert engine.kinds() == ["encode", "denoise", "decode", "synchronize"] * 4
    noises = [call[1] for call in engine.calls if call[0] == "denoise"]
    assert noises == [(1, 16, 16, 8)] * 2 + [(3, 16, 16, 8)] * 2


def test_only_its_own_prompt_is_used():
    engine = RecordingEngine()
    Generate().run(engine, [WarmupShape(params=PARAMS)], engine.encode)
    assert engine.calls[0] == ("encode", (WARMUP_PROMPT,))


def test_caption_lengths_of_the_plan_are_met_after_padding():
    engine = RecordingEngine()
    shape = WarmupShape(params=GUIDED, caption_tokens=64, negative_caption_tokens=32, batch_size=2)
    passes = Generate().run(engine, [shape], engine.encode)
    assert ("denoise", (2, 16, 16, 8), [63, 63], [31, 31]) in engine.calls
    assert passes[0].label == "64x128 b2 c64 #1"


NET = Controlnet(digest="n", convention="trained", path="n", channels=33)


@pytest.mark.parametrize("whole", [True, False])
def test_pictures_are_warmed_up_as_they_are_drawn(whole):
    inputs = Inputs(
        image=ANY_PICTURE, mask=ANY_PICTURE, control_image=ANY_PICTURE, control_end=0.5, tile=32, controlnet=NET
    )
    engine, params = RecordingEngine(), PARAMS.overridden({"inputs": inputs})
    (told,) = Generate().run(engine, [WarmupShape(params=params, batch_size=2, whole=whole)], engine.encode)
    assert told.label == "64x128 b2 image mask control #1"
    assert engine.kinds() == [
        "encode",
        "encode_picture",
        "encode_picture",
        "denoise",
        *["decode"] * whole,
        "synchronize",
    ]
    (request,) = engine.requests
    assert request.control is not None
    assert request.start is not None
    assert request.mask is not None
    shapes = [tuple(part.shape) for part in (request.start, request.mask, request.control.pictures)]
    assert shapes == [(2, 16, 16, 8), (2, 1, 16, 8), (2, 16, 16, 8)]
    assert request.control.around is not None  # the second picture that is encoded
    assert request.params.inputs is not None
    assert (request.params.inputs.tile, request.params.inputs.control_end) == (32, 0.5 if whole else 1.0)


def test_article_generates_first_and_wakes_the_hardware_last():
    engine = RecordingEngine()
    passes = Article().run(engine, [WarmupShape(params=PARAMS)], engine.encode)
    assert [p.label for p in passes] == ["64x128 #1", "hardware"]


def test_hardware_runs_the_articles_convolutions_and_no_picture(monkeypatch):
    shapes = []
    conv2d = torch.nn.functional.conv2d
    monkeypatch.setattr(
        torch.nn.functional, "conv2d", lambda x, w: shapes.append((tuple(x.shape), x.dtype)) or conv2d(x, w)
    )
    engine = RecordingEngine()
    passes = Hardware().run(engine, [WarmupShape(params=PARAMS)], engine.encode)
    assert [p.label for p in passes] == ["hardware"]
    assert shapes == [((1, 3, side, side), torch.bfloat16) for side in (64, 62, 60)]
    assert engine.kinds() == ["synchronize"]


@pytest.mark.parametrize("kind", [Generate, Article])
def test_bad_passes(kind):
    with pytest.raises(UserError, match=r"warmup.passes=0 is below 1"):
        kind(passes=0)


def test_several_passes_are_printed_with_the_summary():
    from zimage_runner.outputs.summary import table

    passes = [{"label": "64x128 #1", "seconds": 2.5}, {"label": "64x128 #2", "seconds": 0.75}]
    summary = {
        "items": defaultdict(int, ok=1), "phases": {"load": 1.0, "warm_up": 3.25},
        "images": {}, "session": {"warmup_passes": passes}, "total_seconds": 5.0, "failed": [], "stopped": None,
        "resume": None, "run_dir": "x",
    }  # fmt: skip
    assert "warm-up passes  64x128 #1 2.50 s, 64x128 #2 0.75 s" in table(summary)
    summary["session"]["warmup_passes"] = passes[:1]
    assert "warm-up passes" not in table(summary)
