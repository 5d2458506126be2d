"""The comparisons, each with what we expect before it is run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import Scenario
from benchmarks.variants import DEVICE_MAP, NAIVE, TUNED, Work, ours

PLAIN = ("engine=diffusers", "engine.attention=native", "memory.loading=cpu_then_gpu", "warmup=none", "compile=none")
"""This runner made to do what the naive script does: the ablation's baseline."""
STEP_1 = (
    "memory.alloc_conf='max_split_size_mb:512,garbage_collection_threshold:0.8'",
    "memory.per_process_fraction=0.95",
)
STEP_2 = ("memory.device_map=cpu", "memory.low_cpu_mem_usage=true")
STEP_4 = ("warmup=hardware",)
GENERATE = ("warmup=generate",)


def main_job(work: Work) -> Scenario:
    """The whole job through the command line, beside the naive loop."""
    return Scenario(
        name="main_job",
        title="The main job: this runner's command line beside the naive loop",
        prediction=(
            "engine=diffusers with its defaults (weights straight to the GPU, cuDNN attention, PNG level 1 in the "
            "background) reaches the first picture about as late as the naive loop, because both import diffusers "
            "(27 s), and then needs 1.05 s a picture against 1.57 s; the peak stays at 23 GB. The default engine "
            "(native) needs 5 s to the first picture, 0.70 s a picture and 21 GB."
        ),
        variants=[
            NAIVE,
            ours("ours engine=diffusers", "engine=diffusers", "warmup=none"),
            ours("ours default"),
        ],
        work=work,
        rounds=3,
    )


def cold_start(work: Work) -> Scenario:
    """From process start to the first picture."""
    return Scenario(
        name="cold_start",
        title="From process start to the first picture on disk",
        prediction=(
            "Naive 27 s with the files in the page cache, 57 s without; device_map 25 s. This runner's default: 5 s "
            "and 15 s (disk-bound), because it neither imports diffusers nor casts 24.6 GB on the CPU."
        ),
        variants=[
            NAIVE,
            ours("ours default", "warmup=none"),
            ours("ours engine=diffusers", "engine=diffusers", "warmup=none"),
            DEVICE_MAP,
        ],
        work=Work(model=work.model, images=1, size=work.size, steps=work.steps, device=work.device),
        rounds=5,
        caches=("warm", "dropped"),
    )


def throughput(work: Work) -> Scenario:
    """Images per second in the steady state of one process."""
    return Scenario(
        name="throughput",
        title="Images per second in one process, after the first picture",
        prediction=(
            "Naive 1.57 s a picture, tuned diffusers 1.18 s, this runner's default engine 0.70 s, engine=diffusers "
            "with compiled blocks 1.0 s."
        ),
        variants=[
            ours("ours default", "warmup=generate"),
            NAIVE,
            TUNED,
            ours(
                "ours engine=diffusers, regional",
                "engine=diffusers",
                "compile=regional",
                "engine.vae_channels_last=true",
                "warmup=generate",
            ),
            ours("ours engine=diffusers", "engine=diffusers", "warmup=generate"),
        ],
        work=work,
        rounds=3,
    )


def ablation(work: Work) -> Scenario:
    """The article's four steps, alone and added up, each against doing without."""
    regional = ("compile=regional", *GENERATE)
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
            ours("step 1: allocator", *PLAIN, *STEP_1),
            ours("step 2: CPU first", *PLAIN, *STEP_2),
            ours("step 3 corrected: compile, then warm up", *PLAIN, *regional, fresh_compiler=True),
            ours("step 3 corrected, compiled before", *PLAIN, *regional, primed=True),
            ours("step 4: wake the hardware", *PLAIN, *STEP_4),
            ours("steps 1+2", *PLAIN, *STEP_1, *STEP_2),
            ours("steps 1+2+3", *PLAIN, *STEP_1, *STEP_2, *regional),
            ours("steps 1+2+3+4", *PLAIN, *STEP_1, *STEP_2, *regional, "warmup=article"),
            ours("warm-up without compiling", *PLAIN, *GENERATE),
            ours("direct loading", *PLAIN, "memory.loading=direct"),
            ours("step 3 as printed: sequential offload", *PLAIN, "memory=sequential_offload", images=2),
        ],
        work=work,
        rounds=2,
    )


def compilers(work: Work) -> Scenario:
    """Eager, regional and full compilation."""
    base = ("engine=diffusers", "warmup=generate")
    regional, full, graphs = ("compile=regional",), ("compile=full",), "compile.mode=reduce-overhead"
    return Scenario(
        name="compile",
        title="Compilation: what it costs once and saves each picture",
        prediction=(
            "With cuDNN attention eager 1.12 s, regional 1.0 s after 15 s of compiling, full the same after 60 s; "
            "CUDA graphs gain nothing at 4160 tokens, where launches are hidden."
        ),
        variants=[
            ours("eager", *base),
            ours("regional", *base, *regional, fresh_compiler=True),
            ours("regional, compiled before", *base, *regional, primed=True),
            ours("regional, reduce-overhead", *base, *regional, graphs, fresh_compiler=True),
            ours("full", *base, *full, fresh_compiler=True),
            ours("full, reduce-overhead", *base, *full, graphs, fresh_compiler=True),
            ours("regional + VAE", *base, *regional, "compile.vae=true", fresh_compiler=True),
            ours("regional, max-autotune", *base, *regional, "compile.mode=max-autotune", fresh_compiler=True),
        ],
        work=work,
        rounds=2,
    )


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
        rounds=2,
    )


def offload(work: Work) -> Scenario:
    """Where the weights live: speed against peak memory."""
    base = ("engine=diffusers", "warmup=generate")
    return Scenario(
        name="offload",
        title="Where the weights live: speed against peak memory",
        prediction=(
            "Resident 23 GB; staged 14.5 GB at the same speed; model_offload 14.5 GB and some seconds for each new "
            "prompt; group_offload with streams 4 GB and 1.5 s a picture; sequential_offload 2 GB and over 20 s."
        ),
        variants=[
            ours("resident", *base, "memory=resident"),
            ours("staged", *base, "memory=staged"),
            ours("group_offload, streams", *base, "memory=group_offload", images=4),
            ours("model_offload", *base, "memory=model_offload", images=4),
            ours("sequential_offload", *base, "memory=sequential_offload", "warmup=none", images=2),
        ],
        work=work,
        rounds=2,
    )


SCENARIOS: dict[str, Callable[[Work], Scenario]] = {
    "main_job": main_job,
    "throughput": throughput,
    "cold_start": cold_start,
    "ablation": ablation,
    "compile": compilers,
    "attention": attention,
    "offload": offload,
}
"""Scenarios by name, most important first."""

TINY = Path(__file__).resolve().parent.parent / "zimage_runner" / "assets" / "zimage_nano"
