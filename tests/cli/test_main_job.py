"""The main job, end to end on the embedded model: what a user finds on disk and on the terminal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.command import SMALL

pytestmark = pytest.mark.usefixtures("model_stays")
Cli = Callable[..., tuple[int, str, str]]
FEW_STEPS = "sampling.num_inference_steps=2"


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).copy()


def items(run: Path) -> dict[str, Path]:
    return {str(p.parent.relative_to(run / "items")): p for p in sorted(run.glob("items/*/*/image.png"))}


def test_prompts_x_seeds_on_disk(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("prompts.texts=['a red apple','一只猫']", "seeds=[3,5]", "name=demo", FEW_STEPS)
    assert code == 0, err
    run = Path(out.strip().splitlines()[-1])
    assert run.parent == tmp_path / "outputs" / "demo"
    assert list(items(run)) == [
        "00000_a_red_apple/seed_3", "00000_a_red_apple/seed_5", "00001_一只猫/seed_3", "00001_一只猫/seed_5",
    ]  # fmt: skip
    assert {p.name for p in (run / ".hydra").iterdir()} == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["status"] == "complete"
    assert summary["items"]["ok"] == 4
    assert {"load", "warm_up"} <= summary["phases"].keys()
    assert {"first_seconds", "mean_seconds", "median_seconds", "p95_seconds"} <= summary["images"].keys()
    assert "images/s" in err
    lines = [json.loads(line) for line in (run / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["item"] for line in lines} == {f"items/{name}" for name in items(run)}


def test_record_and_png_tell_everything(cli: Cli) -> None:
    code, out, err = cli("prompt=a red apple", "seeds=7", "sampling.num_inference_steps=2", "warmup=none")
    assert code == 0, err
    folder = next(Path(out.strip()).glob("items/*/*"))
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    assert record["status"] == "ok"
    assert record["prompt"] == "a red apple"
    assert record["seed"] == 7
    assert record["params"]["num_inference_steps"] == 2
    assert record["params"]["height"] == 128
    assert record["numerics"]["engine"] in ("diffusers", "native")
    assert record["numerics"]["dtype"] == "float32"
    assert record["sha256"] == hashlib.sha256((folder / "image.png").read_bytes()).hexdigest()
    assert {"torch", "zimage_runner"} <= record["versions"].keys()
    with Image.open(folder / "image.png") as image:
        image.load()
        assert image.info["parameters"].startswith("a red apple\nSteps: 2, ")
        assert "Seed: 7" in image.info["parameters"]
        assert json.loads(image.info["zimage_runner"])["params"] == record["params"]


def test_one_shot_with_free_text(cli: Cli, tmp_path: Path) -> None:
    code, _, err = cli("prompt=a cat, neon (8k)", "output_file=sub/cat.png", "warmup=none", FEW_STEPS, *SMALL)
    assert code == 0, err
    assert pixels(tmp_path / "sub" / "cat.png").shape == (64, 64, 3)


def test_batches_give_the_pictures_of_singles(cli: Cli) -> None:
    """Noise is drawn per item, so neighbours change nothing beyond rounding: at most one grey level."""
    texts = "prompts.texts=['a red apple','a cute cat face']"
    runs = []
    for size in (1, 3, 4):
        code, out, err = cli(texts, "seeds=[1,2]", f"engine.batch_size={size}", "warmup=none", *SMALL)
        assert code == 0, err
        runs.append(items(Path(out.strip())))
    for name in runs[0]:
        single = pixels(runs[0][name]).astype(int)
        for other in runs[1:]:
            assert np.abs(pixels(other[name]).astype(int) - single).max() <= 1
    first, second = (pixels(runs[0][f"00000_a_red_apple/seed_{seed}"]).astype(int) for seed in (1, 2))
    assert np.abs(first - second).max() > 8


def test_same_item_same_picture_whatever_the_order(cli: Cli) -> None:
    _, out, _ = cli("prompts.texts=['a red apple','一只猫']", "seeds=[1,2]", "warmup=none", FEW_STEPS, *SMALL)
    _, alone, _ = cli("prompts.texts=['一只猫']", "seeds=[2]", "warmup=generate", FEW_STEPS, *SMALL)
    both, one = items(Path(out.strip())), items(Path(alone.strip()))
    assert both["00001_一只猫/seed_2"].read_bytes() != b""
    assert np.array_equal(pixels(both["00001_一只猫/seed_2"]), pixels(one["00000_一只猫/seed_2"]))


def test_multirun(cli: Cli, tmp_path: Path) -> None:
    code, _, err = cli(
        "-m", "prompt=a red apple", "sampling.num_inference_steps=1,2", "name=sweep", "warmup=none", *SMALL
    )
    assert code == 0, err
    sweep = next((tmp_path / "outputs" / "multirun" / "sweep").iterdir())
    assert all((sweep / job / "summary.json").is_file() for job in ("0", "1"))
    steps = [json.loads((sweep / j / "records.jsonl").read_text(encoding="utf-8"))["item"] for j in ("0", "1")]
    assert steps[0] == steps[1]


def test_a_failing_job_of_a_multirun_fails_the_command(cli: Cli) -> None:
    code, _, err = cli("-m", "prompt=a red apple", "sampling.height=100,128", "warmup=none")
    assert code == 2
    assert "sampling.height=100 is not a positive multiple" in err


@pytest.mark.parametrize("length", [16, 512])
def test_truncated_prompt_is_named_and_recorded(cli: Cli, length: int) -> None:
    words = "apple " * 600
    code, out, err = cli(f"prompt={words}", f"sampling.max_sequence_length={length}", "warmup=none", FEW_STEPS, *SMALL)
    assert code == 0, err
    assert f"max_sequence_length={length}" in err
    summary = json.loads((Path(out.strip()) / "summary.json").read_text(encoding="utf-8"))
    assert len(summary["truncated"]) == 1


def test_no_bar_when_stderr_is_no_terminal(cli: Cli) -> None:
    _, _, err = cli("prompt=a red apple", "warmup=none", FEW_STEPS, *SMALL)
    assert "\r" not in err
    assert "%|" not in err


def test_a_dry_run_downloads_nothing(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIMAGE_RUNNER_CACHE", str(tmp_path / "cache"))
    code, out, err = cli("model=zimage_turbo", "prompt=a cat", "dry_run=true", f"model.cache_dir={tmp_path}/hub")
    assert code == 0, err
    assert "Tongyi-MAI/Z-Image-Turbo is not downloaded yet" in out
    assert not (tmp_path / "hub").exists()
    assert not (tmp_path / "outputs").exists()
