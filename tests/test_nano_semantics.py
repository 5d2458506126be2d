"""The shipped model's pictures mean what their captions say."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import cache
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import NANO
from training.cases import Case, load_reference
from training.scoring import Judge
from zimage_runner.config.paths import CONFIG_DIR
from zimage_runner.engines.native.assembly import load_controlnet, load_model, load_vae_encoder
from zimage_runner.engines.native.model import Control, NativeModel, Options
from zimage_runner.engines.native.sampler import Guidance
from zimage_runner.model import Model, Source
from zimage_runner.pictures.canny import canny
from zimage_runner.weights.find.controlnet import find_controlnet

REFERENCE = NANO.parents[2] / "training" / "reference"


@pytest.fixture(scope="module")
def model() -> NativeModel:
    return load_model(NANO, Options())


Draw = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def draw(model: NativeModel) -> Draw:
    @cache
    def draw(prompt: str, seed: int = 0, steps: int = 8, guidance: float = 0.0, negative: str = "") -> np.ndarray:
        """uint8 [128, 128, 3]."""
        noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(seed))
        negatives = model.encode([negative], 512) if guidance else None
        latents = model.denoise(model.encode([prompt], 512), noise, steps, Guidance(scale=guidance), negatives)
        return model.decode(latents).wait()[0]

    return draw


@pytest.fixture(scope="module")
def judge() -> tuple[Judge, list[str]]:
    """Retrieval among every tenth picture and those named here, and their labels."""
    thumbs, names = load_reference(REFERENCE)
    wanted = {"red apple", "cat", "panda", "rocket", "sunflower", "banana", "dog", "house"}
    keep = [i for i, n in enumerate(names) if i % 10 == 0 or n["label"] in wanted]
    return Judge(thumbs[keep], [names[i]["flippable"] for i in keep]), [names[i]["label"] for i in keep]


def ink(picture: np.ndarray) -> np.ndarray:
    """Mask of what is not the white ground."""
    return (picture.min(-1) < 225) | (np.ptp(picture.astype(int), axis=-1) > 30)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """What two silhouettes share of what either covers."""
    return float((ink(a) & ink(b)).sum() / (ink(a) | ink(b)).sum())


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """RMS over channels, 0 to 255."""
    return float(np.sqrt(np.square(a.astype(float) - b).mean()))


def test_a_red_apple(draw: Draw) -> None:
    picture = draw("a red apple")
    mask = ink(picture)
    r, g, b = (picture[..., k].astype(int) for k in range(3))
    assert ((r > g + 40) & (r > b + 40))[mask].mean() > 0.7
    assert np.abs(np.argwhere(mask).mean(0) - 63.5).max() < 8
    assert 0.25 < mask.mean() < 0.75
    assert np.concatenate([picture[:4].ravel(), picture[-4:].ravel()]).mean() > 245


@pytest.mark.parametrize(
    ("english", "chinese"), [("a red apple", "一个红苹果"), ("a rocket", "火箭"), ("a panda", "熊猫")]
)
def test_both_languages_draw_one_thing(draw: Draw, english: str, chinese: str) -> None:
    same = min(distance(draw(english, s), draw(chinese, t)) for s in (0, 1) for t in (0, 1))
    others = [p for p in ("a red apple", "a rocket", "a panda") if p != english]
    assert same < 0.6 * min(distance(draw(chinese, 0), draw(p)) for p in others)


def test_colour_words_colour(draw: Draw) -> None:
    blue, green = draw("a blue apple")[ink(draw("a blue apple"))], draw("a green cat")[ink(draw("a green cat"))]
    assert blue.mean(0).argmax() == 2
    assert green.mean(0).argmax() == 1
    assert distance(draw("a green cat"), draw("a cat")) > 20


def labels_of(judge: tuple[Judge, list[str]], pictures: list[np.ndarray]) -> list[str]:
    index, labels = judge
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return [labels[k] for k in index.index().search(images, keep=1).order[:, 0].tolist()]


def test_recognisable_after_four_forwards(draw: Draw, judge: tuple[Judge, list[str]]) -> None:
    wanted = {
        "a red apple": "red apple",
        "熊猫": "panda",
        "a rocket": "rocket",
        "a banana": "banana",
        "一座房子": "house",
    }
    assert labels_of(judge, [draw(p, steps=4) for p in wanted]) == list(wanted.values())


def test_a_pair_has_both_parts_on_their_sides(draw: Draw, judge: tuple[Judge, list[str]]) -> None:
    wanted = {"a red apple and a banana": ("red apple", "banana"), "火箭和熊猫": ("rocket", "panda")}
    places = [[[judge[1].index(label)] for label in pair] for pair in wanted.values()]
    cases = [Case("pairs", prompt, right) for prompt, right in zip(wanted, places)]
    images = torch.from_numpy(np.stack([draw(p) for p in wanted])).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert judge[0].score(cases, images).misses == []


def test_seeds_differ_and_repeat(draw: Draw, model: NativeModel) -> None:
    pictures = [draw("a cat", seed) for seed in range(4)]
    between = [distance(a, b) for k, a in enumerate(pictures) for b in pictures[:k]]
    assert min(between) > 8
    assert max(between) > 40
    again = draw.__wrapped__("a cat", 2)  # type: ignore[attr-defined]
    assert np.array_equal(again, pictures[2])


def along(start: np.ndarray, end: np.ndarray, target: np.ndarray) -> float:
    """How far `end` went from `start` towards `target`: 1 is all the way, negative is away from it."""
    way = target.astype(float) - start
    return float(((end.astype(float) - start) * way).sum() / np.square(way).sum())


def test_a_negative_prompt_pushes_away_from_its_picture(draw: Draw) -> None:
    """The median of three seeds: guidance mirrors a cat now and then, which tells nothing pixel by pixel."""

    def away(guidance: float) -> float:
        return median(
            along(draw("a cat", s), draw("a cat", s, guidance=guidance, negative="a dog"), draw("a dog", s))
            for s in range(3)
        )

    assert away(2.0) < away(0.5) < -0.03


def test_guidance_keeps_the_thing(draw: Draw, judge: tuple[Judge, list[str]]) -> None:
    guided = [draw("a cat", seed, guidance=1.0) for seed in (0, 1)]
    assert all(distance(guided[seed], draw("a cat", seed)) > 3 for seed in (0, 1))
    assert labels_of(judge, guided) == ["cat", "cat"]


def test_its_controlnet_draws_in_the_outlines_of_another_picture(draw: Draw, model: NativeModel) -> None:
    """The sketch's silhouette is small and to one side; by itself the model draws large ones in the middle."""
    own = Model(name="nano", source=Source.embedded, controlnet="embedded")
    found = find_controlnet(own, json.loads((NANO / "transformer" / "config.json").read_text(encoding="utf-8")))
    assert found is not None
    load_controlnet(model, found)
    load_vae_encoder(model, NANO)
    picture = np.asarray(Image.open(CONFIG_DIR / "pictures" / "apple.png").convert("RGB"))
    edges = model.encode_picture(torch.from_numpy(canny(picture))).mean
    for prompt in ("a green apple", "a peach"):
        noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
        control = Control(condition=edges[None], scales=[1.0])
        steered = model.decode(model.denoise(model.encode([prompt], 512), noise, 8, control=control)).wait()[0]
        assert overlap(picture, steered) > 0.8 > overlap(picture, draw(prompt))


def test_diffusers_draws_the_same(draw: Draw) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline

        pipe: Any = ZImagePipeline.from_pretrained(str(NANO), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe(
        "a red apple", height=128, width=128, num_inference_steps=8, guidance_scale=0.0, output_type="np",
        generator=[torch.Generator().manual_seed(0)],
    ).images[0]  # fmt: skip
    assert np.abs((picture * 255).round().astype(int) - draw("a red apple")).max() <= 1
