"""Z-Image (base): shift 6, real guidance and negative prompts, on a miniature: diffusers' pictures, as for Turbo."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import NANO
from tests.support.checkpoints import edit_json
from tests.support.engines import PARAMS, create, picture
from tests.support.reference import TOLERANCE, Reference, difference, noise
from zimage_runner.config.paths import CONFIG_DIR
from zimage_runner.engines.base import Device
from zimage_runner.engines.diffusers.engine import DiffusersEngine
from zimage_runner.engines.native.assembly import load_model
from zimage_runner.engines.native.config import NativeEngine
from zimage_runner.engines.native.model import NativeModel, Options
from zimage_runner.engines.native.sampler import Guidance
from zimage_runner.model import PUBLISHED, Variant
from zimage_runner.weights.formats.configs import SHIFTS


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "nano"
    shutil.copytree(NANO, folder)
    edit_json(folder / "scheduler/scheduler_config.json", shift=SHIFTS["base"])
    return folder


@pytest.fixture(scope="module")
def reference(base: Path) -> Reference:
    return Reference(base)


@pytest.fixture(scope="module")
def native(base: Path) -> NativeModel:
    return load_model(base, Options())


@pytest.mark.parametrize(
    ("steps", "negatives", "options"),
    [
        (4, ["", "blurry, ugly " * 12], {"guidance_scale": 4.0, "cfg_normalization": 0.7, "cfg_truncation": 0.6}),
        (4, ["blurry"], {"guidance_scale": 5.0}),
        (12, [""], {"guidance_scale": 3.0, "cfg_normalization": 1.0}),
    ],
    ids=["normalised and truncated", "plain", "more steps"],
)
def test_guided_latents(
    native: NativeModel, reference: Reference, steps: int, negatives: list[str], options: dict[str, Any]
) -> None:
    embeds = native.encode(["a red apple", "一只猫 in the snow"][: len(negatives)], 512)
    refused, z = native.encode(negatives, 512), noise(len(negatives), 128, 128)
    expected = reference.denoise(embeds, z, steps, negative_prompt_embeds=refused, **options)
    guidance = Guidance(
        scale=options["guidance_scale"],
        normalization=options.get("cfg_normalization", 0.0),
        truncation=options.get("cfg_truncation", 1.0),
    )
    assert difference(native.denoise(embeds, z, steps, guidance, refused), expected) <= TOLERANCE


def test_the_shift_counts(native: NativeModel) -> None:
    turbo = load_model(NANO, Options())
    embeds, z = native.encode(["a red apple"], 512), noise(1, 128, 128)
    assert (native.shift, turbo.shift) == (6.0, 3.0)
    assert difference(native.denoise(embeds, z, 4), turbo.denoise(embeds, z, 4)) > 0.1


def test_both_engines_draw_one_picture_with_a_negative_prompt(base: Path) -> None:
    engines = [create(config(device=Device.cpu), base) for config in (NativeEngine, DiffusersEngine)]
    params = replace(PARAMS, num_inference_steps=6, guidance_scale=4.0, negative_prompt="a green apple, blurry")
    ours, theirs = (picture(engine, params).astype(int) for engine in engines)
    assert theirs.std() > 10
    assert np.abs(ours - theirs).max() <= 1
    without = picture(engines[0], replace(params, negative_prompt="")).astype(int)
    assert np.abs(ours - without).max() > 10


@pytest.mark.parametrize("variant", Variant)
def test_a_files_variant_recommends_what_the_published_model_does(variant: Variant) -> None:
    import yaml

    published = yaml.safe_load((CONFIG_DIR / f"model/zimage_{variant.value}.yaml").read_text(encoding="utf-8"))
    file = yaml.safe_load((CONFIG_DIR / "model/file.yaml").read_text(encoding="utf-8"))
    repo, recommended = PUBLISHED[variant]
    assert repo == published["repo"]
    assert file["recommended"] | recommended == published["recommended"]
