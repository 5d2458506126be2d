"""Caption pools: millions of captions drawn and tokenised once, on all cores. `python -m training.pools`.

Written to `<work>/pools/*.npy`; `done` is written last. For each token bucket T (captions padded to T, as the
transformer pads them to multiples of 32): `single_T` int16 [pictures, K, T], `scene_T` int16 [n, T] and `row_T` int32
[n], the scene that each caption belongs to. Scenes: `things` int16 [S, 2], `tints` int8 [S, 2], `backdrop` int8 [S].
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from training.captions import CaptionWriter, Scene
from training.config import TrainingConfig, command
from training.names import load_pictures
from training.scenes import SceneWriter
from training.tokenizer import chat, load_tokenizer

CHUNK = 2000  # captions tokenised at a time
_worker: dict = {}


def setup(cfg: TrainingConfig) -> None:
    """Load what every worker process needs."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker["cfg"] = cfg
    _worker["pictures"] = load_pictures(Path(cfg.data.packed), cfg.data.limit)
    _worker["tokenizer"] = load_tokenizer(cfg.data.work)
    _worker["writer"] = CaptionWriter(_worker["pictures"], random.Random(), cfg.captions.noisy, cfg.captions.fragments)
    _worker["scenes"] = SceneWriter(_worker["writer"])


def bucket_of(length: int) -> int:
    """Padded length of a caption: the next multiple of 32."""
    return max(32, -(-length // 32) * 32)


def fitting(
    tokenizer: PreTrainedTokenizerFast, draw: Callable[[], tuple], count: int, bucket: int
) -> tuple[np.ndarray, list]:
    """Draw until `count` captions pad to exactly `bucket` tokens; returns ids [count, bucket] and what was drawn."""
    ids, drawn = np.zeros((count, bucket), np.int16), []
    while len(drawn) < count:
        batch = [draw() for _ in range(min(CHUNK, int(1.3 * (count - len(drawn))) + 8))]
        encoded = tokenizer([chat(item[-1]) for item in batch])["input_ids"]
        for item, tokens in zip(batch, encoded):
            if bucket_of(len(tokens)) == bucket and len(drawn) < count:
                ids[len(drawn), : len(tokens)] = tokens
                drawn.append(item)
    return ids, drawn


def wordy(bucket: int, rng: random.Random) -> bool:
    """Whether to ask for a long caption: always for the longest bucket, mostly for the middle one."""
    return bucket > 64 or (bucket == 64 and rng.random() < 0.7)


def single_captions(job: tuple[int, int, int]) -> np.ndarray:
    """Captions of one picture: int16 [count, bucket]."""
    index, bucket, count = job
    writer = _worker["writer"]
    writer.rng = rng = random.Random(f"{_worker['cfg'].seed} single {index} {bucket}")

    def draw() -> tuple[str]:
        return (writer.single(index, long=wordy(bucket, rng)),)

    return fitting(_worker["tokenizer"], draw, count, bucket)[0]


def scene_captions(job: tuple[int, int, int]) -> tuple[np.ndarray, list[Scene]]:
    """Scenes of one chunk with a caption each."""
    chunk, bucket, count = job
    writer = _worker["scenes"]
    writer.writer.rng = rng = random.Random(f"{_worker['cfg'].seed} scene {chunk} {bucket}")
    ids, drawn = fitting(_worker["tokenizer"], lambda: writer.draw(long=wordy(bucket, rng)), count, bucket)
    return ids, [scene for scene, _ in drawn]


def scene_jobs(cfg: TrainingConfig) -> list[tuple[int, int, int]]:
    """(chunk, bucket, count) of every scene chunk; the shortest bucket first."""
    counts = {32: cfg.captions.scenes, **cfg.captions.long_scenes}
    return [(k, b, min(CHUNK, n - k * CHUNK)) for b, n in counts.items() for k in range(-(-n // CHUNK))]


def main(cfg: TrainingConfig) -> None:
    """Draw all pools and save them."""
    start, out = time.time(), Path(cfg.data.work) / "pools"
    out.mkdir(parents=True, exist_ok=True)
    count = len(load_pictures(Path(cfg.data.packed), cfg.data.limit))
    things: list[tuple[int, ...]] = []
    tints: list[tuple[int, ...]] = []
    backdrop: list[int] = []
    with get_context("fork").Pool(cfg.captions.workers or os.cpu_count(), setup, (cfg,)) as pool:
        for bucket, each in cfg.captions.per_picture.items():
            jobs = [(i, bucket, each) for i in range(count)]
            np.save(out / f"single_{bucket}.npy", np.stack(pool.map(single_captions, jobs, chunksize=4)))
        captions: dict[int, list[np.ndarray]] = {}
        rows: dict[int, list[int]] = {}
        jobs = scene_jobs(cfg)
        for (_, bucket, _), (ids, scenes) in zip(jobs, pool.map(scene_captions, jobs, chunksize=1)):
            captions.setdefault(bucket, []).append(ids)
            rows.setdefault(bucket, []).extend(range(len(things), len(things) + len(scenes)))
            things += [(*s.things, -1)[:2] for s in scenes]
            tints += [(*s.tints, -1)[:2] for s in scenes]
            backdrop += [s.backdrop for s in scenes]
    for bucket, parts in captions.items():
        np.save(out / f"scene_{bucket}.npy", np.concatenate(parts))
        np.save(out / f"row_{bucket}.npy", np.array(rows[bucket], np.int32))
    np.save(out / "things.npy", np.array(things, np.int16))
    np.save(out / "tints.npy", np.array(tints, np.int8))
    np.save(out / "backdrop.npy", np.array(backdrop, np.int8))
    (out / "done").touch()
    print(f"{len(things)} scenes, pools in {time.time() - start:.1f} s", flush=True)


if __name__ == "__main__":
    command(main)
