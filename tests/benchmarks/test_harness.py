"""The harness: what it times, how it takes turns, and that it keeps what it has when time runs out."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import harness, machine
from benchmarks.harness import Budget, Results, Scenario, in_turn, measure, run_once, seconds_a_picture
from benchmarks.report import result_files
from benchmarks.scenarios import SCENARIOS, TINY
from benchmarks.variants import HERE, NAIVE, Variant, Work, ours
from tests.support.controlnets import write_controlnet
from tests.support.fault_runs import all_gone

WORK = Work(model=TINY, images=3, size=128, steps=2, device="cpu")
DRAWS = """
import json, sys, time
from pathlib import Path
from types import SimpleNamespace
out = Path(sys.argv[1])
time.sleep(0.3)
for n in range(3):
    (out / f"{n:03d}.png").write_bytes(b"picture")
    time.sleep(0.2)
(out / "phases.json").write_text(json.dumps({"phases": {"import": 0.1}, "memory": {"peak_allocated_gb": 2.5}}))
"""
QUICK = """
import sys
from pathlib import Path
for n in range(3):
    (Path(sys.argv[1]) / f"{n:03d}.png").write_bytes(b"picture")
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own may hold digests of another version's embedded model."""
    monkeypatch.setenv("ZIMAGE_RUNNER_CACHE", str(tmp_path_factory.mktemp("cache")))


class Script(Variant):
    """A contestant that is a few lines of Python."""

    def __init__(self, name: str, code: str) -> None:
        super().__init__(name=name, script=code)

    def command(self, work: Work, out: Path, kept: Path | None = None) -> list[str]:
        assert self.script is not None
        return [sys.executable, "-c", self.script, str(out)]


def scenario(*variants: Variant, rounds: int = 1, **more: Any) -> Scenario:
    return Scenario(name="throughput", title="t", prediction="p", variants=variants, work=WORK, rounds=rounds, **more)


def once(variant: Variant, timeout: float = 30.0) -> harness.Run:
    return run_once(scenario(variant), variant, "warm", 0, timeout)


def test_times_are_from_process_start_to_files_on_disk() -> None:
    started = time.monotonic()
    run = once(Script("s", DRAWS))
    assert run.returncode == 0
    assert run.first_png_seconds is not None
    assert run.first_png_seconds >= 0.3
    assert len(run.intervals) == 2
    assert all(interval > 0.15 for interval in run.intervals)
    assert run.first_png_seconds + sum(run.intervals) + 0.15 < run.wall_seconds < time.monotonic() - started
    assert run.readings["memory"] == {"peak_allocated_gb": 2.5}
    assert run.log_tail == ""


def test_a_failure_keeps_its_last_words() -> None:
    run = once(Script("s", "import sys; print('out of luck'); sys.exit(3)"))
    assert (run.returncode, run.first_png_seconds) == (3, None)
    assert "out of luck" in run.log_tail
    assert run.failure == "exit 3 with 0 of 3 pictures"
    assert "exit 3 with 0 of 3 pictures: out of luck" in harness.line(run)


def test_missing_pictures_are_a_failure() -> None:
    assert once(Script("s", "print('all fine')")).log_tail != ""


def test_a_hanging_process_and_its_children_are_ended(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = f"import os, time\nif pid := os.fork(): open({str(child)!r}, 'w').write(str(pid))\ntime.sleep(600)"
    assert once(Script("s", code), timeout=1.0).returncode == -9
    assert all_gone([int(child.read_text(encoding="utf-8"))])


def test_every_other_round_runs_backwards() -> None:
    a, b, c = (Script(name, DRAWS) for name in "abc")
    assert [v.name for v in in_turn([a, b, c], 0)] == ["a", "b", "c"]
    assert [v.name for v in in_turn([a, b, c], 1)] == ["c", "b", "a"]


def test_results_are_complete_after_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "throughput.json"
    quick = scenario(Script("a", QUICK), Script("b", QUICK), rounds=2)
    seen = []
    write = Results.write
    monkeypatch.setattr(
        Results, "write", lambda self: (write(self), seen.append(json.loads(path.read_text(encoding="utf-8"))))
    )
    measure(quick, Results(quick, path, {"cores": 2}), 60)
    assert [len(value["runs"]) for value in seen] == [1, 2, 3, 4]
    assert [run["variant"] for run in seen[-1]["runs"]] == ["a", "b", "b", "a"]
    assert seen[-1]["prediction"] == "p"
    assert seen[-1]["machine"] == {"cores": 2}


def test_budget_lets_nothing_start_that_would_not_end_in_time() -> None:
    budget = Budget(10.0)
    assert budget.allows("a")
    budget.took("a", 9.0)
    assert budget.allows("a")
    budget.took("a", 11.0)
    assert not budget.allows("a")
    assert budget.allows("b")  # not tried yet
    assert not Budget(-1.0).allows("b")


def test_dropping_caches_without_permission_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "drop_page_cache", lambda: False)
    variant = Script("s", DRAWS)
    with pytest.raises(SystemExit, match="cannot drop the page cache: run as root"):
        run_once(scenario(variant), variant, "dropped", 0, 5.0)


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenarios_are_well_formed(name: str, tmp_path: Path) -> None:
    built = SCENARIOS[name](WORK)
    assert built.name == name
    assert len(built.prediction) > 40
    names = [variant.name for variant in built.variants]
    assert len(set(names)) == len(names)
    for variant in built.variants:
        command = variant.command(WORK, tmp_path)
        assert command[0] == sys.executable
        assert variant.script is None or Path(command[1]).is_file()


@pytest.mark.parametrize("path", result_files(HERE / "results"), ids=lambda path: path.stem)
def test_results_are_of_the_scenarios_contestants(path: Path) -> None:
    measured = json.loads(path.read_text(encoding="utf-8"))
    built = SCENARIOS[measured["scenario"]](Work(**(measured["work"] | {"model": TINY})))
    settings = {variant.name: variant.script or list(variant.overrides or ()) for variant in built.variants}
    for name, about in measured["variants"].items():
        assert settings[name] == about.get("script", about.get("overrides")), name


OURS = {v.overrides: v for name in SCENARIOS for size in (128, 1024) for v in SCENARIOS[name](
    dataclasses.replace(WORK, size=size)).variants if v.script is None}  # fmt: skip


@pytest.mark.parametrize("variant", OURS.values(), ids=lambda v: v.name)
def test_our_command_lines_plan(variant: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    """Every override exists and is accepted together with the others; nothing is drawn."""
    from zimage_runner.cli.main import main

    eight_bits = any(override.startswith("engine.precision=") for override in variant.overrides or ())
    work = dataclasses.replace(WORK, device="cuda") if eight_bits else WORK
    if any("{beside}" in override for override in variant.overrides or ()):
        (tmp_path / "nano").symlink_to(work.model)
        work = dataclasses.replace(work, model=tmp_path / "nano")
        write_controlnet(tmp_path / "controlnet.safetensors", "2.1")
    command = variant.command(work, tmp_path)
    monkeypatch.chdir(tmp_path)
    code = main([*command[3:], "dry_run=true"])
    out, err = capfd.readouterr()
    assert code == 0, err
    assert "3" in out


@pytest.mark.parametrize("variant", [NAIVE, ours("ours", "engine=native")], ids=lambda v: v.name)
def test_a_peer_and_this_runner_end_to_end(variant: Variant) -> None:
    # diffusers decodes in bfloat16, for which this CPU is slow; the embedded model draws 128 pixels in our runner alone
    work = dataclasses.replace(WORK, size=32) if variant.script else WORK
    drawn = dataclasses.replace(scenario(variant), work=work)
    run = run_once(drawn, variant, "warm", 0, 120.0)
    assert run.log_tail == ""
    assert run.first_png_seconds is not None
    assert run.first_png_seconds > 0
    assert len(run.intervals) == 2
    assert run.readings["phases"]["import" if variant.script else "load"] > 0
    assert run.readings.get("engine") == (None if variant.script else "native")


def test_rounds_and_caches_of_a_contestant_are_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "drop_page_cache", lambda: True)
    a, b = Script("a", QUICK), Script("b", QUICK)
    object.__setattr__(b, "rounds", 1)
    object.__setattr__(b, "caches", ("warm",))
    quick = scenario(a, b, rounds=2, caches=("warm", "dropped"))
    results = Results(quick, tmp_path / "r.json", {})
    measure(quick, results, 60)
    assert [(run.variant, run.cache) for run in results.runs] == [
        ("a", "warm"), ("b", "warm"), ("a", "warm"), ("a", "dropped"), ("a", "dropped"),
    ]  # fmt: skip


def test_what_no_time_is_left_for_is_noted(tmp_path: Path) -> None:
    quick = scenario(Script("a", QUICK), rounds=2)
    results = Results(quick, tmp_path / "r.json", {}, note="something else ran")
    measure(quick, results, -1.0)
    data = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert data["runs"] == []
    assert data["skipped"] == [{"variant": "a", "cache": "warm", "round": number} for number in (0, 1)]
    assert data["note"] == "something else ran"


@pytest.mark.parametrize(
    ("code", "drawn", "wall", "expected"),
    [
        (0, 3, 1.0, ""),
        (0, 2, 1.0, "exit 0 with 2 of 3 pictures"),
        (1, 3, 1.0, "exit 1 with 3 of 3 pictures"),
        (-9, 1, 5.0, "ended after 5 s, when the scenario's time was spent, with 1 of 3 pictures"),
        (-9, 1, 1.0, "ended by SIGKILL with 1 of 3 pictures"),
        (-11, 0, 1.0, "ended by SIGSEGV with 0 of 3 pictures"),
    ],
)
def test_why_a_process_failed(code: int, drawn: int, wall: float, expected: str) -> None:
    assert harness.why_failed(code, drawn, 3, wall, timeout=4.0) == expected


KEEPS = """
import sys
from pathlib import Path
out, kept = Path(sys.argv[1]), Path(sys.argv[2])
for n in range(3):
    (out / f"{n}.png").write_bytes(b"picture")
kept.mkdir(parents=True, exist_ok=True)
print("found", len(list(kept.iterdir())), file=sys.stderr)
(kept / f"file{len(list(kept.iterdir()))}").write_text("left")
"""


class Keeper(Script):
    """Leaves a file in the folder that outlives it."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, KEEPS)
        object.__setattr__(self, "keeps", {"x": "folder"})
        for option, value in options.items():
            object.__setattr__(self, option, value)

    def command(self, work: Work, out: Path, kept: Path | None = None) -> list[str]:
        assert kept is not None
        return [*super().command(work, out), str(self.folders(kept)[0])]


@pytest.mark.parametrize(
    ("options", "files"), [({}, [1, 2]), ({"primed": True}, [2, 3]), ({"starts_empty": True}, [1, 1])]
)
def test_folders_outlive_a_process(
    options: dict[str, Any], files: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A primed contestant finds what an uncounted process left; one that starts empty finds nothing."""
    seen = []
    variant = Keeper("keeper", **options)
    real = harness.run_once

    def spy(*args: Any) -> harness.Run:
        run = real(*args)
        if run.round >= 0:
            seen.append(len(list(variant.folders(args[-1])[0].iterdir())))
        return run

    monkeypatch.setattr(harness, "run_once", spy)
    quick = scenario(variant, rounds=2)
    results = Results(quick, tmp_path / "r.json", {})
    measure(quick, results, 60)
    assert seen == files
    assert len(results.runs) == 2


@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=20), st.integers(1, 20))
def test_seconds_a_picture_leave_out_the_first_batch(intervals: list[float], batch: int) -> None:
    times = [0.0, *itertools.accumulate(intervals)]
    found = seconds_a_picture(intervals, [min(batch, len(times))] * len(times))
    if batch >= len(times):
        assert found is None
    else:
        assert found == pytest.approx((times[-1] - times[batch - 1]) / (len(times) - batch))


def test_pictures_of_batches_are_counted_right() -> None:
    """Two batches of four, two seconds each, files written at once: half a second a picture, whatever their spread."""
    assert seconds_a_picture([0.01, 0.01, 0.01, 1.97, 0.01, 0.01, 0.01], [4] * 8) == pytest.approx(0.5025, abs=0.01)


def test_the_machine_is_described_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(machine, "describe", lambda: {"cores": 2})
    monkeypatch.setattr(machine, "matmul_tflops", lambda: calls.append(1) or 700.0)
    path = tmp_path / "sub" / "machine.json"
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: machine.facts(path), range(4)))
    assert found == [{"cores": 2, "bf16_matmul_tflops": 700.0}] * 4
    assert len(calls) == 1


def test_filling_the_page_cache_reads_models_and_prepared_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZIMAGE_RUNNER_CACHE", str(tmp_path))
    copy = tmp_path / "prepared" / "x" / "model.safetensors"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(b"1")
    read = []
    monkeypatch.setattr(machine, "_read", read.append)
    machine.fill_page_cache(TINY, libraries=False)
    assert copy in read
    assert {path for path in TINY.rglob("*") if path.is_file()} <= set(read)
