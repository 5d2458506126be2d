"""Every placement draws the same pictures: moving weights about changes no arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from zimage_runner.compile import NoCompile
from zimage_runner.engines.diffusers import DiffusersEngine
from zimage_runner.errors import UserError
from zimage_runner.memory import (
    GroupOffload,
    Loading,
    Memory,
    ModelOffload,
    OffloadType,
    Resident,
    SequentialOffload,
    Staged,
)
from zimage_runner.model import Model, Source
from zimage_runner.plan import build_plan
from zimage_runner.prompts.base import Prompt
from zimage_runner.sampling import SamplingParams
from zimage_runner.seeds import parse_seeds
from zimage_runner.session import Session, SessionConfig
from zimage_runner.warmup import Generate, WarmupShape
from zimage_runner.weights.checkpoint import Checkpoint

NANO = Path(__file__).parents[2] / "zimage_runner" / "assets" / "zimage_nano"
PARAMS = SamplingParams(
    height=128, width=128, num_inference_steps=2, guidance_scale=0.0, negative_prompt="", max_sequence_length=512,
    cfg_normalization=0.0, cfg_truncation=1.0,
)  # fmt: skip
PLACEMENTS = {
    "staged": Staged,
    "model_offload": ModelOffload,
    "group_offload": GroupOffload,
    "group_offload_two_blocks": lambda: GroupOffload(use_stream=False, num_blocks_per_group=2),
    "group_offload_leaves": lambda: GroupOffload(offload_type=OffloadType.leaf_level),
    "cpu_then_gpu": lambda: Resident(loading=Loading.cpu_then_gpu),
    "slow_init": lambda: Resident(low_cpu_mem_usage=False),
}


def draw(memory: Memory, params: SamplingParams = PARAMS) -> dict[str, bytes]:
    """Pixels of two prompts, through the session with a warm-up, on the CPU in float32."""
    plan = build_plan(
        [Prompt(text="a red apple"), Prompt(text="一只猫")],
        parse_seeds([1, 2]),
        params,
        check_size=lambda h, w: None,
    )
    config = SessionConfig(
        model=Model(name="nano", source=Source.embedded),
        engine=DiffusersEngine(batch_size=2),
        memory=memory,
        warmup=Generate(),
        compile=NoCompile(),
        checkpoint=Checkpoint(path=NANO, revision="test", digest="0" * 64),
    )
    session = Session(config, [WarmupShape(params=params)], list(plan.encodings()) if memory.staged else [])
    session.start()
    try:
        return {
            item.item_dir: picture.tobytes()
            for items in plan.batches(2)
            for item, picture in zip(items, session.generate(items).images.wait(), strict=True)
        }
    finally:
        session.close()


@pytest.fixture(scope="module")
def resident() -> dict[str, bytes]:
    return draw(Resident())


@pytest.mark.parametrize("name", PLACEMENTS)
def test_placement_draws_the_same_pictures(name: str, resident: dict[str, bytes]) -> None:
    assert draw(PLACEMENTS[name]()) == resident


def test_vae_slicing_only_rounds_differently(resident: dict[str, bytes]) -> None:
    """The convolutions of a batch of two and of one are summed in another order."""
    for name, pixels in draw(Resident(vae_slicing=True)).items():
        difference = np.frombuffer(pixels, np.uint8).astype(int) - np.frombuffer(resident[name], np.uint8)
        assert abs(difference).max() <= 1


def test_sequential_offload_is_refused_on_the_cpu() -> None:
    with pytest.raises(UserError, match=r"memory=sequential_offload needs a GPU.*memory=resident"):
        draw(SequentialOffload())


def test_pictures_differ_between_seeds_and_prompts(resident: dict[str, bytes]) -> None:
    assert len(set(resident.values())) == 4
