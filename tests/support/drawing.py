"""A few of the embedded model's pictures under any placement, compiled or not: what the tests of both compare."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from tests.support import NANO
from zimage_runner.compile import Compile, NoCompile
from zimage_runner.engines.base import EngineConfig
from zimage_runner.engines.diffusers.engine import DiffusersEngine
from zimage_runner.memory.policies import Memory
from zimage_runner.model import Model, Source
from zimage_runner.plan import WorkItem, build_plan
from zimage_runner.prompts.base import Prompt
from zimage_runner.prompts.seeds import parse_seeds
from zimage_runner.sampling import SamplingParams
from zimage_runner.session import Session, SessionConfig
from zimage_runner.warmup import Generate, NoWarmup, WarmupShape
from zimage_runner.weights.find.checkpoint import Checkpoint

PARAMS = SamplingParams(
    height=128, width=128, num_inference_steps=2, guidance_scale=0.0, negative_prompt="", max_sequence_length=512,
    cfg_normalization=0.0, cfg_truncation=1.0,
)  # fmt: skip

SMALL = replace(PARAMS, height=64, width=64)
"""A quarter of the work, for tests that compare pictures bit by bit and look at none."""


def session_config(engine: EngineConfig, memory: Memory, **others: Any) -> SessionConfig:
    """A session of the embedded model, neither warmed up nor compiled; ``others`` replace SessionConfig's fields."""
    config = SessionConfig(
        model=Model(name="nano", source=Source.embedded),
        engine=engine,
        memory=memory,
        warmup=NoWarmup(),
        compile=NoCompile(),
        checkpoint=Checkpoint(path=NANO, revision="test", digest="0" * 64),
    )
    return replace(config, **others)


def items(count: int, params: SamplingParams = PARAMS, first: int = 0) -> list[WorkItem]:
    """One prompt with ``count`` seeds from ``first`` on."""
    seeds = parse_seeds(list(range(first, first + count)))
    return list(build_plan([Prompt(text="a red apple")], seeds, params, check_size=lambda h, w: None).items)


def draw(
    memory: Memory,
    *,
    compile: Compile | None = None,
    engine: EngineConfig | None = None,
    params: SamplingParams = PARAMS,
) -> dict[str, bytes]:
    """Pixels of two prompts and two seeds by item, through a session with a warm-up. On the CPU in float32."""
    plan = build_plan(
        [Prompt(text="a red apple"), Prompt(text="一只猫")],
        parse_seeds([1, 2]),
        params,
        check_size=lambda h, w: None,
    )
    engine = engine or DiffusersEngine(batch_size=2)
    config = session_config(engine, memory, warmup=Generate(), compile=compile or NoCompile())
    captions = list(plan.encodings()) if memory.wants_captions else []
    session = Session(config, [WarmupShape(params=params, batch_size=2)], captions)
    session.start()
    try:
        return {
            item.item_dir: picture.tobytes()
            for items in plan.batches(2)
            for item, picture in zip(items, session.generate(items).images.wait(), strict=True)
        }
    finally:
        session.close()


def largest_difference(one: dict[str, bytes], other: dict[str, bytes]) -> int:
    """Largest difference of any pixel's channel, 0 to 255."""
    assert one.keys() == other.keys()
    pairs = [(np.frombuffer(one[name], np.uint8), np.frombuffer(other[name], np.uint8)) for name in one]
    return max(int(abs(a.astype(int) - b).max()) for a, b in pairs)


def difference(one: dict[str, bytes], other: dict[str, bytes]) -> float:
    """Root of the mean square of all pixels' differences, in 0 to 255."""
    assert one.keys() == other.keys()
    a, b = (np.frombuffer(b"".join(pictures[name] for name in one), np.uint8) for pictures in (one, other))
    return float(np.sqrt(np.square(a.astype(float) - b).mean()))
