"""The comparisons, each with what we expect before it is run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import Scenario
from benchmarks.variants import DEVICE_MAP, NAIVE, NAIVE_BYTECODE, TUNED, Work, ours, peer

PLAIN = ("engine=diffusers", "engine.attention=native", "memory.loading=cpu_then_gpu", "warmup=none", "compile=none")
"""This runner made to do what the naive script does: the ablation's baseline."""
STEP_1 = (
    "memory.alloc_conf='max_split_size_mb:512,garbage_collection_threshold:0.8'",
    "memory.per_process_fraction=0.95",
)
STEP_2 = ("memory.device_map=cpu", "memory.low_cpu_mem_usage=true")
STEP_4 = ("warmup=hardware",)
GENERATE = ("warmup=generate",)
REGIONAL = ("compile=regional", *GENERATE)
STEPS_1_TO_3 = (*PLAIN, *STEP_1, *STEP_2, *REGIONAL)
COMPILED = {"compile.cache_dir": "regional"}
"""Of variants that share compiled code."""
FP8 = ("engine.precision=fp8",)
SMALL = 512
"""Pixels a side up to which batches are measured too."""


def cold_start(work: Work) -> Scenario:
    """From process start to the first picture."""
    return Scenario(
        name="cold_start",
        title="From process start to the first picture on disk",
        prediction=(
            "Naive 18 to 25 s with the files in the page cache, 57 s without; device_map a little less. This runner's "
            "default: 5 to 7 s and 15 s (disk-bound), because it neither imports diffusers nor casts 24.6 GB on the "
            "CPU. Prompt embeddings cached by an earlier run: 0.5 s less, or more where the text encoder need not be "
            "read. engine=diffusers 23 s, as it imports what the naive script imports."
        ),
        variants=[
            NAIVE,
            NAIVE_BYTECODE,
            ours("ours default"),
            ours("ours fp8", *FP8),
            ours("ours, prompt embeddings cached", keeps={"embedding_cache.path": "embeddings"}, primed=True),
            ours("ours engine=diffusers", "engine=diffusers", rounds=2, caches=("warm",)),
            dataclasses.replace(DEVICE_MAP, rounds=2, caches=("warm",)),
        ],
        work=dataclasses.replace(work, images=1),
        rounds=5,
        caches=("warm", "dropped"),
    )


def multirun(work: Work) -> Scenario:
    """Jobs of one multirun: the second and later ones neither load nor warm up."""
    jobs = 3
    return Scenario(
        name="multirun",
        title="Jobs of one multirun, a picture each",
        prediction=(
            "From a job's picture to the next job's: 1.00 to 1.03 times what it takes within a job of several, for the "
            "next job is composed, planned and queued while the GPU draws (before that: 1.23 times); 0 s of loading "
            "and warm-up in the second and later jobs."
        ),
        variants=[
            ours("one job", images=jobs),
            ours("three jobs of one multirun", "-m", "prompts.limit=1", "prompts.offset=0,1,2", "seeds='0-0'",
                 images=jobs),
        ],
        work=dataclasses.replace(work, images=jobs),
        rounds=3,
    )  # fmt: skip


def throughput(work: Work) -> Scenario:
    """Images per second in the steady state of one process."""
    diffusers = ("engine=diffusers", "warmup=generate")
    regional = (*diffusers, "compile=regional", "engine.vae_channels_last=true")
    variants = [
        ours("ours default"),
        NAIVE,
        ours("ours fp8", *FP8),
        ours("ours fp8, attention in fp8", *FP8, "engine=native", "engine.attention=flash3_fp8"),
        ours("ours streamed, 4 seeds at a time", "memory=streamed", "engine.batch_size=4"),
        ours("ours fp8 streamed, 4 seeds at a time", *FP8, "memory=streamed", "engine.batch_size=4"),
        dataclasses.replace(TUNED, rounds=2),
        ours("ours engine=diffusers, regional", *regional, rounds=1),
        ours("ours engine=diffusers", *diffusers, rounds=1),
    ]
    prediction = (
        "Naive 1.44 s a picture, tuned diffusers 1.1 s, this runner's default engine 0.76 s, engine=diffusers with "
        "compiled blocks 0.97 s. In fp8 0.48 s, with attention in fp8 too 0.46 s. Streamed in batches of 4 0.80 s at "
        "4 GB: 12.3 GB cross the bus in 0.25 s a forward, which 0.37 s of work hides."
    )
    if work.size <= SMALL:
        # Many pictures, so that most batches are full; few of the others, which draw one at a time.
        several = ours("ours default, batch chosen by the engine", "engine.batch_size=auto", images=8 * work.images)
        one = ours("ours default", images=2 * work.images)
        eight_bits = ours("ours fp8, batch chosen by the engine", *FP8, "engine.batch_size=auto",
                          images=8 * work.images)  # fmt: skip
        variants = [several, NAIVE, eight_bits, one, dataclasses.replace(TUNED, rounds=1)]
        prediction = (
            "At 512x512: naive 0.45 s a picture, this runner one at a time 0.19 s, in batches of 16 0.17 s: the GPU's "
            "power limit binds either way, so batches save the launches and little else. In fp8 0.11 s."
        )
    return Scenario(
        name="throughput",
        title="Images per second in one process, after the first picture",
        prediction=prediction,
        variants=variants,
        work=work,
        rounds=3,
    )


def from_pictures(work: Work) -> Scenario:
    """Pictures from a picture at strength 0.6: five of eight forwards, encoder included."""
    given = ("sampling.image={picture}", "sampling.strength=0.6")
    return Scenario(
        name="img2img",
        title="Pictures from a picture at strength 0.6",
        prediction=(
            "Five forwards instead of eight, and the VAE's encoder. Naive 5/8 of its 1.31 s of forwards, 0.10 s of "
            "decoding, 0.06 s of encoding, PNG in the way: 1.05 s a picture. Ours 0.45 + 0.05 + 0.03 s: 0.53 s, 2.0x; "
            "in fp8 0.36 s, 2.9x."
        ),
        variants=[
            peer("naive diffusers", "naive_img2img.py"),
            ours("ours default", *given),
            ours("ours fp8", *given, *FP8),
        ],
        work=work,
        rounds=2,
    )


def control(work: Work) -> Scenario:
    """What a ControlNet costs, where its weights lie."""
    steered = ("model.controlnet={beside}/controlnet.safetensors", "sampling.control_image={picture}",
               "sampling.control_preprocess=canny", "engine=native")  # fmt: skip
    return Scenario(
        name="control",
        title="A ControlNet (Union 2.1's layout): cost and memory",
        prediction=(
            "17 control blocks beside 34 of the model: 1.5 times the forwards, 1.13 s a picture instead of 0.77 s in "
            "bf16, 0.72 instead of 0.48 s in fp8. Peak 6.7 GB more: 28.5 GB resident, 20.5 GB staged; streamed "
            "0.5 GB more than without at the same batch."
        ),
        variants=[
            ours("without"),
            ours("with", *steered),
            ours("with, staged", *steered, "memory=staged", images=4),
            ours("with, streamed, 4 seeds at a time", *steered, "memory=streamed", "engine.batch_size=4"),
            ours("with, fp8", *steered, *FP8),
        ],
        work=work,
        rounds=1,
    )


def ablation(work: Work) -> Scenario:
    """The article's four steps, alone and added up, each against doing without."""
    return Scenario(
        name="ablation",
        title="The article's four steps, alone and added up",
        prediction=(
            "Step 1 changes nothing measurable on a GPU with room to spare; step 2 is what from_pretrained does "
            "anyway, and direct loading beats it by 2 s; step 3's compilation saves 10 to 15 % a picture and costs "
            "15 to 40 s once, its sequential offload makes a picture at least 10 times slower; step 4 only moves "
            "0.2 to 0.5 s from the first picture to before it."
        ),
        variants=[
            ours("plain", *PLAIN),
            ours("step 3 corrected: compile, then warm up", *PLAIN, *REGIONAL, keeps=COMPILED, starts_empty=True,
                 images=2),
            ours("steps 1+2+3+4", *STEPS_1_TO_3, "warmup=article", keeps=COMPILED),
            ours("step 4: wake the hardware", *PLAIN, *STEP_4, images=2),
            ours("step 3 corrected, compiled before", *PLAIN, *REGIONAL, keeps=COMPILED, primed=True),
            ours("step 1: allocator", *PLAIN, *STEP_1),
            ours("step 2: CPU first", *PLAIN, *STEP_2, images=2),
            ours("direct loading", *PLAIN, "memory.loading=direct", images=2),
            ours("step 3 as printed: sequential offload", *PLAIN, "memory=sequential_offload", images=2, rounds=1),
            ours("warm-up without compiling", *PLAIN, *GENERATE),
            ours("steps 1+2+3", *STEPS_1_TO_3, keeps=COMPILED, images=2),
            ours("steps 1+2", *PLAIN, *STEP_1, *STEP_2, images=2),
        ],
        work=work,
        rounds=2,
    )  # fmt: skip


def article_start(work: Work) -> Scenario:
    """The article's steps as far as they are about the start, with less noise: more and shorter processes."""
    return Scenario(
        name="article_start",
        title="The article's steps: from process start to the first picture",
        prediction=(
            "Plain 14 to 16 s. Step 2 and step 4 within 5 % of it, direct loading up to 1 s sooner. All four steps, "
            "even with the compiler's cache of an earlier run, 3 to 5 s later: they draw a picture more."
        ),
        variants=[
            ours("plain", *PLAIN),
            ours("steps 1+2+3+4", *STEPS_1_TO_3, "warmup=article", keeps=COMPILED, primed=True),
            ours("step 2: CPU first", *PLAIN, *STEP_2),
            ours("direct loading", *PLAIN, "memory.loading=direct"),
            ours("step 4: wake the hardware", *PLAIN, *STEP_4),
        ],
        work=dataclasses.replace(work, images=1),
        rounds=5,
        settles=True,
    )  # fmt: skip


def compilers(work: Work) -> Scenario:
    """Eager, regional and full compilation."""
    base = ("engine=diffusers", "warmup=generate")
    regional, kept = (*base, "compile=regional"), {"compile.cache_dir": "regional"}
    return Scenario(
        name="compile",
        title="Compilation: what it costs once and saves each picture",
        prediction="With cuDNN attention eager 1.12 s, regional 1.0 s after 15 s of compiling, full too, after 60 s.",
        variants=[
            ours("eager", *base),
            ours("regional", *regional, keeps=kept, starts_empty=True),
            ours("regional, compiled before", *regional, keeps=kept, primed=True),
            ours("full", *base, "compile=full", keeps={"compile.cache_dir": "full"}, starts_empty=True),
        ],
        work=work,
        rounds=1,
    )  # fmt: skip


def attention(work: Work) -> Scenario:
    """Attention backends of engine=diffusers."""
    base = ("engine=diffusers", "warmup=generate")
    names = ("native", "_native_cudnn", "_native_flash", "_native_efficient")
    return Scenario(
        name="attention",
        title="Attention backends of engine=diffusers, nothing compiled",
        prediction="cuDNN saves 0.25 s of 1.37 s a picture against native (flash attention 2); efficient is slower.",
        variants=[ours(name, *base, f"engine.attention={name}") for name in names],
        work=work,
        rounds=1,
    )


def offload(work: Work) -> Scenario:
    """Where the weights live: speed against peak memory."""
    base = ("engine=diffusers", "warmup=generate")
    ways = {"bf16": (), "fp8": FP8, "int8": ("engine.precision=int8",)}
    return Scenario(
        name="offload",
        title="Where the weights live: speed against peak memory",
        prediction=(
            "engine=native: bf16 resident 21 GB, staged 13.7 GB, both 0.77 s a picture; streamed in batches of 4 3.3 "
            "GB and 0.75 s. fp8 15.1, 9 and 2.5 GB at 0.49 s; int8 the memory of fp8 at 0.76 s, for Hopper's integer "
            "units are slower. engine=diffusers: resident 23 GB and staged 15 GB at 1.33 s; group_offload with streams "
            "2.6 GB and 2.8 s; model_offload 13 GB and 13 s, sequential_offload 2.6 GB and 14 s."
        ),
        variants=[
            *(ours(f"{name} {placement}", *words, f"memory={placement}")
              for name, words in ways.items() for placement in ("resident", "staged")),
            *(ours(f"{name} streamed, 4 seeds at a time", *words, "memory=streamed", "engine.batch_size=4", images=16)
              for name, words in ways.items()),
            ours("diffusers resident", *base, "memory=resident"),
            ours("diffusers staged", *base, "memory=staged"),
            ours("diffusers group_offload, streams", *base, "memory=group_offload"),
            ours("diffusers sequential_offload", *base, "memory=sequential_offload", "warmup=none", images=2),
            ours("diffusers model_offload", *base, "memory=model_offload", images=3),
        ],
        work=work,
        rounds=1,
    )  # fmt: skip


FULL_SIZE = ("control",)
"""Need a file that lies beside a full-size synthetic checkpoint."""

IMAGES = {"ablation": 4, "compile": 4, "attention": 4, "offload": 6}
"""Pictures of each process; 8 for the other scenarios."""

SCENARIOS: dict[str, Callable[[Work], Scenario]] = {
    "throughput": throughput,
    "img2img": from_pictures,
    "control": control,
    "cold_start": cold_start,
    "multirun": multirun,
    "ablation": ablation,
    "article_start": article_start,
    "compile": compilers,
    "attention": attention,
    "offload": offload,
}
"""Scenarios by name, most important first."""

TINY = Path(__file__).resolve().parent.parent / "zimage_runner" / "assets" / "zimage_nano"
