"""``dry_run=true``: what it says, and that it costs little."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.slowness import quiet_seconds
from zimage_runner.weights.find import hubs

Cli = Callable[..., tuple[int, str, str]]


def table(out: str) -> dict[str, str]:
    rows = [line.strip().partition("  ") for line in out.splitlines() if line[2:3].strip()]
    return {name.strip(): value.strip() for name, _, value in rows}


def test_what_it_says(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(f"a cat\na cat\n{'very ' * 600}long\na dog --g 2\n", encoding="utf-8")
    code, out, err = cli(
        "prompts=text_file", "prompts.path=p.txt", "seeds=[1,2]", "engine.batch_size=2", "dry_run=true"
    )
    assert code == 0, err
    said = table(out)
    assert said["items"] == "8 pictures of 4 prompts"
    assert said["batches"] == "4 of at most 2, 3 shapes"
    assert said["prompts to encode"] == "4"  # one text twice, one empty negative prompt
    assert said["truncated"] == "1"
    assert re.search(r"p\.txt:3: the prompt has \d{3,} tokens, the last \d+ are cut off", out)
    assert "p.txt:2 is the same picture as p.txt:1, seed 1,2" in out
    assert "unknown: no earlier run" in said["time"]
    assert not (tmp_path / "outputs").exists()


def test_disk_shapes_and_what_is_not_known(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(
        "".join(f'{{"text": "a", "width": {16 * n}}}\n' for n in range(1, 40)), encoding="utf-8"
    )
    argv = [
        "model=zimage_turbo",
        f"model.cache_dir={tmp_path}",
        "prompts=jsonl",
        "prompts.path=p.jsonl",
        "dry_run=true",
    ]
    code, out, err = cli(*argv)
    assert code == 0, err
    assert "... and 19 more shapes" in out
    assert table(out)["caption tokens"] == "not counted, and so not what is cut off: the weights are not there"
    assert "truncated" not in table(out)
    assert re.fullmatch(r"about [\d.]+ MB in outputs, [\d.]+ [GT]B free", table(out)["disk"])
    assert "NOT ENOUGH" in table(cli(*argv, "output.min_free_gb=1e6")[1])["disk"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sampling.image=no.png"], "sampling.image=.*no.png does not exist"),
        (["loras=[no.safetensors]"], "loras.0.path: no.safetensors is no file here"),
        (["seeds=1-2", "output_file=cat.png"], "takes one picture, but this run draws 2"),
        ([], "cannot download Tongyi-MAI/Z-Image-Turbo"),
    ],
)
def test_mistakes_are_found_before_a_download(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    asked = []

    def fetch(*_: object) -> str:
        asked.append("the hub")
        raise OSError("no network")

    monkeypatch.setattr(hubs, "_from_modelscope", fetch)
    code, _, err = cli(
        "model=zimage_turbo", f"model.cache_dir={tmp_path / 'hub'}", "engine.device=cpu", "prompt=a", *words
    )
    assert code == 2
    (line,) = err.splitlines()
    assert re.search(message, line)
    assert bool(asked) == (words == [])


def test_time_goes_by_the_last_comparable_run(cli: Cli) -> None:
    code, out, err = cli("prompt=a", "seeds=[1,2,3]", "sampling.num_inference_steps=2", "warmup=none")
    assert code == 0, err
    run = Path(out.strip())
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    summary["images"]["mean_seconds"], summary["phases"] = 10.0, {"load": 7.0}
    (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    for steps, said in ((2, "about 47 s"), (4, "about 87 s")):
        code, out, _ = cli("prompt=b", "seeds=0-3", f"sampling.num_inference_steps={steps}", "dry_run=true")
        assert code == 0
        assert table(out)["time"].startswith(f"{said}, going by {run.relative_to(Path.cwd())}")
        assert ("scaled" in out) == (steps == 4)


@pytest.mark.parametrize("text", ["{", "[]", '{"comparable": 3}', '{"comparable": {"digest": "x"}}', "\xff"])
def test_foreign_summaries_are_passed_over(cli: Cli, tmp_path: Path, text: str) -> None:
    (tmp_path / "outputs" / "a" / "b").mkdir(parents=True)
    (tmp_path / "outputs" / "a" / "b" / "summary.json").write_bytes(text.encode("latin-1"))
    code, out, err = cli("prompt=a", "dry_run=true")
    assert code == 0, err
    assert "unknown: no earlier run" in out


def test_no_torch_and_quick(tmp_path: Path) -> None:
    """CPU seconds of a fresh process; the promise for 1,000 prompts is one second on a quiet machine."""
    write_prompts(tmp_path, 1000)
    code = (
        "import sys, resource; from zimage_runner.cli.main import main\n"
        "rc = main(['prompts=text_file', 'prompts.path=p.txt', 'dry_run=true'])\n"
        "heavy = {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "use = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(rc, sorted(heavy), use.ru_utime + use.ru_stime)"
    )

    def cost() -> float:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, encoding="utf-8"
        )
        rc, heavy, seconds = done.stdout.splitlines()[-1].rsplit(" ", 2)
        assert (rc, heavy) == ("0", "[]"), done.stderr
        return float(seconds)

    assert quiet_seconds(cost, 2.0) < 2.0


def test_many_prompts(cli: Cli, tmp_path: Path) -> None:
    """A tenth of the promise (100,000 prompts x 10 seeds in 20 s on a quiet machine), in this process's CPU seconds."""
    write_prompts(tmp_path, 10_000)

    def cost() -> float:
        started = time.process_time()
        code, out, err = cli("prompts=text_file", "prompts.path=p.txt", "seeds=0-9", "dry_run=true")
        seconds = time.process_time() - started
        assert code == 0, err
        assert table(out)["items"] == "100,000 pictures of 10,000 prompts"
        return seconds

    assert quiet_seconds(cost, 2.5) < 2.5


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_hundred_thousand_prompts_x_ten_seeds(tmp_path: Path) -> None:
    """No more than 20 starts (of about a second each), and each prompt costs what it costs among a quarter of them.

    All is measured at the same time: whatever else loads the machine stretches both sides of a comparison.
    """
    with ThreadPoolExecutor() as pool:
        all_at_once = pool.submit(dry_run, tmp_path / "many", 100_000)
        parts = [(dry_run(tmp_path / "one", 1), dry_run(tmp_path / "few", 25_000)) for _ in range(4)]
        many = all_at_once.result()
    starts, quarters = sum(one.seconds for one, _ in parts), sum(few.seconds for _, few in parts)
    assert many.seconds < 20 * starts / 4
    assert many.seconds - starts / 4 < 1.5 * (quarters - starts)
    assert many.max_rss_kb < 1_000_000


class Cost(NamedTuple):
    seconds: float
    """Of CPU."""
    max_rss_kb: int


def dry_run(folder: Path, prompts: int) -> Cost:
    """Return what the plan of so many prompts x 10 seeds costs a fresh process."""
    folder.mkdir(exist_ok=True)
    write_prompts(folder, prompts)
    argv = [sys.executable, "-m", "zimage_runner", "prompts=text_file", "prompts.path=p.txt", "seeds=0-9"]
    process = subprocess.Popen([*argv, "dry_run=true"], cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return Cost(usage.ru_utime + usage.ru_stime, usage.ru_maxrss)


def write_prompts(folder: Path, count: int) -> None:
    lines = (f"a photo of thing {n}, in style {n % 7}\n" for n in range(count))
    (folder / "p.txt").write_text("".join(lines), encoding="utf-8")


def test_shipped_sets_are_good(cli: Cli) -> None:
    for name, count in (("everyday", 50), ("emoji", 32)):
        code, out, err = cli(f"prompts={name}", "dry_run=true")
        assert code == 0, err
        assert f"{count} pictures of {count} prompts" in out
        assert table(out)["drawn twice"] == "none"
        assert table(out)["truncated"] == "none"
