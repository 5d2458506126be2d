"""The article's script: corrected it runs, as printed it is refused, one reason at a time."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from zimage_runner.runner.article import article_table

Cli = Callable[..., tuple[int, str, str]]
VERBATIM = ("+experiment=article_verbatim", "model=zimage_nano", "sampling.height=128", "sampling.width=128")


@pytest.mark.parametrize(
    ("corrections", "says"),
    [
        ([], ["compile.target=unet: ZImagePipeline has no unet", "compile.target=transformer, or +experiment=article"]),
        (["compile.target=transformer"], ["memory=sequential_offload moves each layer's", "use memory=resident"]),
    ],
)
def test_verbatim_is_refused_in_one_line(cli: Cli, tmp_path: Path, corrections: list[str], says: list[str]) -> None:
    code, out, err = cli(*VERBATIM, *corrections)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert all(part in err for part in says)
    assert not list(tmp_path.iterdir())


def test_corrected_runs_on_the_embedded_model_and_prints_the_articles_figures(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("+experiment=article", "model=zimage_nano", "compile=none", "sampling.num_inference_steps=2")
    assert code == 0
    summary = json.loads((Path(out.splitlines()[-1]) / "summary.json").read_text(encoding="utf-8"))
    assert [p["label"] for p in summary["session"]["warmup_passes"]] == ["128x128 c32 #1", "hardware"]
    lines = err.splitlines()
    figures = lines[next(i for i, line in enumerate(lines) if "the article, RTX 4090D" in line) :]
    assert [line.split("  ")[1].strip() for line in figures[1:5]] == [
        "first load", "one image", "peak GPU memory", "later images",
    ]  # fmt: skip
    assert f"{summary['phases']['load']:.1f} s" in figures[1]
    assert f"{summary['images']['first_seconds']:.2f} s" in figures[2]
    assert "no GPU" in figures[3]
    assert f"{summary['images']['mean_seconds']:.2f} s each" in figures[4]


def test_one_image_only_says_what_is_missing() -> None:
    summary = {
        "phases": {"load": 2.0, "warm_up": 0.0},
        "images": {"first_seconds": 1.5},
        "session": {"device_name": "GPU X", "gpu_memory": {"peak_reserved_gb": 23.34}},
    }
    lines = article_table(summary).splitlines()
    assert lines[0].endswith("this run, GPU X")
    assert lines[1].endswith("2.0 s")
    assert lines[3].endswith("23.3 GB")
    assert lines[4].endswith("give more prompts or seeds")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["memory.device_map=auto"], "memory.device_map=auto would split one model over several GPUs"),
        (["memory.alloc_conf=max_split_size:512"], "did you mean max_split_size_mb?"),
        (["memory.alloc.max_split_size_mb=1"], "memory.alloc.max_split_size_mb=1 is too small"),
        (["memory.per_process_fraction=1.5"], "memory.per_process_fraction=1.5 is out of range"),
        (["memory.health.action=recycle"], "memory.health.action=recycle needs a threshold"),
        (["memory=sequential_offload", "engine=diffusers"], "memory=sequential_offload needs a GPU"),
        (["memory=group_offload", "memory.num_blocks_per_group=0"], "memory.num_blocks_per_group=0 is below 1"),
        (["warmup=generate", "warmup.passes=0"], "warmup.passes=0 is below 1"),
        (["engine=diffusers", "engine.attention=flash"], "engine.attention=flash cannot run here: it needs a CUDA GPU"),
        (["engine=diffusers", "engine.attention=flsh"], "engine.attention=flsh: no such backend; use auto or one of"),
        (["compile=full", "compile.mode=fast"], "compile.mode=fast"),
    ],
)
def test_bad_settings(cli: Cli, tmp_path: Path, argv: list[str], says: str) -> None:
    code, out, err = cli("prompt=a cat", *argv)
    assert (code, out) == (2, "")
    assert says in err
    assert [line for line in err.splitlines() if line.startswith("zimage_runner: ")] == [err.splitlines()[-1]]
    assert not list(tmp_path.iterdir())


def test_low_cpu_mem_usage_false_is_warned_of(cli: Cli) -> None:
    words = ("prompt=a cat", "memory.low_cpu_mem_usage=false", "sampling.num_inference_steps=1")
    nothing = "memory.low_cpu_mem_usage=false does nothing for engine=native"
    code, _, err = cli(*words, "engine=native")
    assert (code, nothing in err) == (2, True)
    code, _, err = cli(*words)
    assert (code, f"engine=auto takes diffusers: {nothing}" in err) == (0, True)
    assert "memory.low_cpu_mem_usage=false initialises all weights before loading them" in err


def test_make_clean_touches_no_model_cache_environment_or_output() -> None:
    """The article's third warning: never delete the model cache."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        ["make", "-n", "clean"], cwd=root, capture_output=True, text=True, check=True, encoding="utf-8"
    )
    removed = {word for line in done.stdout.splitlines() for word in line.split() if not line.startswith("#")}
    kept = ("modelscope", "huggingface", "hf_home", ".cache", "zimage_runner/assets", "outputs", ".venv", "$home", "~")
    assert not [word for word in removed for name in kept if word.lower().rstrip("/").endswith(name)]
    assert "rm" in removed


def test_no_code_deletes_inside_a_hubs_cache() -> None:
    """Nothing in the package that resolves or downloads checkpoints removes a tree."""
    weights = Path(__file__).parents[2] / "zimage_runner" / "weights" / "find"
    hub_modules = [weights / name for name in ("hubs.py", "resolve.py", "layout.py", "verify.py", "digest.py")]
    for module in hub_modules:
        text = module.read_text(encoding="utf-8")
        assert not any(call in text for call in ("rmtree", ".unlink(", "os.remove", "rmdir")), module.name


def test_what_is_about_a_gpu_is_not_ignored_in_silence(cli):
    words = [
        "memory.per_process_fraction=0.5",
        "memory.alloc.expandable_segments=true",
        "memory.health.interval_seconds=1",
    ]
    code, _, err = cli("prompt=a cat", "sampling.num_inference_steps=1", *words)
    assert code == 0, err
    said = "memory.alloc, memory.per_process_fraction, memory.health: about a GPU's memory, without effect on a CPU"
    assert err.count(said) == 1
