"""On a GPU: real out-of-memory, provoked with a small memory fraction, and runs that complete under it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.drawing import NANO, PARAMS
from zimage_runner.compile import NoCompile
from zimage_runner.engines.base import Device, EngineConfig
from zimage_runner.engines.diffusers import DiffusersEngine
from zimage_runner.engines.native.config import NativeEngine
from zimage_runner.executors.base import Batch, BatchResult
from zimage_runner.executors.ladder import Ladder
from zimage_runner.memory import Resident
from zimage_runner.model import Dtype, Model, Source
from zimage_runner.monitor import free_gpu_bytes
from zimage_runner.plan import WorkItem, build_plan
from zimage_runner.prompts.base import Prompt
from zimage_runner.sampling import SamplingParams
from zimage_runner.seeds import parse_seeds
from zimage_runner.session import Session, SessionConfig
from zimage_runner.warmup import NoWarmup
from zimage_runner.weights.checkpoint import Checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

ENGINES = {"diffusers": DiffusersEngine, "native": NativeEngine}
BATCH = 64
LARGE = PARAMS.overridden({"height": 1024, "width": 1024})
ROUNDING = 3
"""Of 255, in float32: other batch sizes take other kernels."""


def items(count: int, params: SamplingParams = PARAMS) -> list[WorkItem]:
    seeds = parse_seeds(list(range(count)))
    return list(build_plan([Prompt(text="a red apple")], seeds, params, check_size=lambda h, w: None).items)


@pytest.fixture(params=ENGINES)
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    engine: EngineConfig = ENGINES[request.param](device=Device.cuda, batch_size=BATCH)
    config = SessionConfig(
        model=Model(name="nano", source=Source.embedded, dtype=Dtype.float32),
        engine=engine,
        memory=Resident(),
        warmup=NoWarmup(),
        compile=NoCompile(),
        checkpoint=Checkpoint(path=NANO, revision="test", digest="0" * 64),
    )
    made = Session(config, [])
    made.start()
    yield made
    torch.cuda.set_per_process_memory_fraction(1.0)
    made.close()


def peak_of(session: Session, batch: list[WorkItem], *, tiled: bool = False) -> tuple[int, np.ndarray]:
    """Most bytes reserved while drawing it, and the pictures."""
    session.free_memory()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    pixels = session.generate(batch, tiled=tiled).images.wait()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved(), pixels


def limit_to(session: Session, limit: float) -> None:
    """From now on, at most so many bytes for this process."""
    session.free_memory()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit / total)


def collect(results: Iterator[BatchResult]) -> tuple[dict[int, np.ndarray], list[BatchResult]]:
    pictures, kept = {}, []
    for result in results:
        assert result.images is not None, result.error
        pictures |= {i.seed: p for i, p in zip(result.items, result.images.wait(), strict=True)}
        kept.append(result)
    return pictures, kept


def test_the_batch_is_halved_until_it_fits(session):
    batch = items(BATCH)
    session.generate(batch[:1]).images.wait()
    one, _ = peak_of(session, batch[:1])
    all_of_them, reference = peak_of(session, batch)
    assert all_of_them > one * 1.2, "the batch needs too little memory for this test"
    limit_to(session, one + (all_of_them - one) * 0.3)
    ladder = Ladder(session)
    pictures, results = collect(ladder.run(Batch(items=batch)))
    assert pictures.keys() == set(range(BATCH))
    assert "recovery" in ladder.report()
    assert 1 <= max(len(r.items) for r in results) <= BATCH // 2
    differences = [np.abs(pictures[s].astype(int) - reference[s]).max() for s in range(BATCH)]
    assert max(differences) <= ROUNDING


def test_what_worked_is_remembered(session):
    batch = items(BATCH)
    session.generate(batch[:1]).images.wait()
    one, _ = peak_of(session, batch[:1])
    all_of_them, _ = peak_of(session, batch)
    limit_to(session, one + (all_of_them - one) * 0.3)
    ladder = Ladder(session)
    collect(ladder.run(Batch(items=batch)))
    steps = len(ladder.steps)
    pictures, _ = collect(ladder.run(Batch(items=batch)))
    assert len(pictures) == BATCH
    assert len(ladder.steps) == steps


def test_then_the_picture_is_decoded_in_tiles(session):
    if session.engine.name != "diffusers":
        pytest.skip("the native decoder needs no tiles")
    batch = items(1, LARGE)
    session.generate(batch).images.wait()
    whole, reference = peak_of(session, batch)
    tiled, _ = peak_of(session, batch, tiled=True)
    assert tiled < whole * 0.95, f"tiles save too little for this test: {tiled} of {whole} bytes"
    limit_to(session, (tiled + whole) / 2)
    ladder = Ladder(session)
    pictures, results = collect(ladder.run(Batch(items=batch)))
    assert results[0].details["recovery"] == ["VAE decoded in tiles"]
    assert ladder.steps == ["out of memory with one picture of 1024x1024: decoding in tiles from now on"]
    assert np.abs(pictures[0].astype(int) - reference[0]).mean() < 8


def test_a_picture_that_cannot_fit_is_an_error_and_not_the_end(session):
    small, large = items(1), items(1, LARGE)
    session.generate(small).images.wait()
    need, _ = peak_of(session, small)
    limit_to(session, need * 1.02)
    ladder = Ladder(session)
    results = list(ladder.run(Batch(items=large)))
    assert [r.error is not None and "OutOfMemoryError" in r.error for r in results] == [True]
    pictures, _ = collect(ladder.run(Batch(items=small)))
    assert len(pictures) == 1


def test_auto_finds_a_batch_that_fits(session):
    batch = items(48)
    session.generate(batch[:1]).images.wait()
    ladder = Ladder(session, auto_batch=True)
    pictures, results = collect(ladder.run(Batch(items=batch)))
    assert len(pictures) == 48
    assert [len(r.items) for r in results] == [1, 16, 16, 15]
    assert free_gpu_bytes() > 0
    one, _ = peak_of(session, batch[:1])
    sixteen, _ = peak_of(session, batch[:16])
    limit_to(session, one + (sixteen - one) * 0.5)
    limited = Ladder(session, auto_batch=True)
    pictures, results = collect(limited.run(Batch(items=batch)))
    assert len(pictures) == 48
    assert max(len(r.items) for r in results) < 16


@pytest.mark.parametrize("executor", ["inline", "process"])
def test_a_whole_run_completes_under_a_small_fraction(cli, session, tmp_path: Path, executor):
    """``session`` only measures, and is closed before the run."""
    batch = items(BATCH)
    name = session.engine.name
    session.generate(batch[:1]).images.wait()
    one, _ = peak_of(session, batch[:1])
    all_of_them, _ = peak_of(session, batch)
    session.close()
    fraction = (one + (all_of_them - one) * 0.3) / torch.cuda.get_device_properties(0).total_memory
    code, _, err = cli(
        "prompt=a red apple", f'seeds="0-{BATCH - 1}"', f"engine={name}", f"engine.batch_size={BATCH}",
        f"memory.per_process_fraction={fraction}", "model.dtype=float32", "sampling.num_inference_steps=2",
        f"executor={executor}", "hydra.run.dir=run",
    )  # fmt: skip
    assert code == 0, err
    summary = json.loads((tmp_path / "run/summary.json").read_bytes())
    assert summary["items"]["ok"] == BATCH
    assert any("out of memory" in step for step in summary["session"]["recovery"])
    assert "out of memory with 64 pictures of 128x128: 32 at a time from now on" in err
