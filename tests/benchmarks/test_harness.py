"""The harness: what it times, how it takes turns, and that it keeps what it has when time runs out."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import device_memory, harness, machine
from benchmarks.harness import Budget, Results, Scenario, in_turn, measure, run_once
from benchmarks.scenarios import SCENARIOS, TINY
from benchmarks.variants import NAIVE, Variant, Work, ours

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


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own may hold digests of another version's embedded model."""
    monkeypatch.setenv("ZIMAGE_RUNNER_CACHE", str(tmp_path_factory.mktemp("cache")))


class Script(Variant):
    """A contestant that is a few lines of Python."""

    def __init__(self, name: str, code: str) -> None:
        super().__init__(name=name, script=code, is_ours=False)

    def command(self, work: Work, out: Path) -> list[str]:
        assert self.script is not None
        return [sys.executable, "-c", self.script, str(out)]


def scenario(*variants: Variant, rounds: int = 1) -> Scenario:
    return Scenario(name="main_job", title="t", prediction="p", variants=variants, work=WORK, rounds=rounds)


def once(variant: Variant, timeout: float = 30.0) -> harness.Run:
    return run_once(scenario(variant), variant, "warm", 0, timeout, {"published": TINY})


def test_times_are_from_process_start_to_files_on_disk() -> None:
    run = once(Script("s", DRAWS))
    assert run.returncode == 0
    assert run.first_png_seconds is not None
    assert 0.3 <= run.first_png_seconds < 2.0
    assert len(run.intervals) == 2
    assert all(0.15 < interval < 0.6 for interval in run.intervals)
    assert run.wall_seconds >= run.first_png_seconds + 0.6
    assert run.readings["memory"] == {"peak_allocated_gb": 2.5}
    assert run.log_tail == ""


def test_a_failure_keeps_its_last_words() -> None:
    run = once(Script("s", "import sys; print('out of luck'); sys.exit(3)"))
    assert (run.returncode, run.first_png_seconds) == (3, None)
    assert "out of luck" in run.log_tail


def test_missing_pictures_are_a_failure() -> None:
    assert once(Script("s", "print('all fine')")).log_tail != ""


def test_a_hanging_process_and_its_children_are_ended(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(3); open({str(alive)!r}, 'w').close()"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    started = time.monotonic()
    assert once(Script("s", code), timeout=1.0).returncode == -9
    assert time.monotonic() - started < 10
    time.sleep(3)
    assert not alive.exists()


def test_every_other_round_runs_backwards() -> None:
    a, b, c = (Script(name, DRAWS) for name in "abc")
    assert [v.name for v in in_turn([a, b, c], 0)] == ["a", "b", "c"]
    assert [v.name for v in in_turn([a, b, c], 1)] == ["c", "b", "a"]


def test_results_are_complete_after_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "main_job.json"
    quick = scenario(Script("a", DRAWS), Script("b", DRAWS), rounds=2)
    seen = []
    write = Results.write
    monkeypatch.setattr(Results, "write", lambda self: (write(self), seen.append(json.loads(path.read_text()))))
    measure(quick, Results(quick, path, {"cores": 2}), 60, {"published": TINY})
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
        run_once(scenario(variant), variant, "dropped", 0, 5.0, {"published": TINY})


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


@pytest.mark.parametrize(
    "variant",
    [v for name in SCENARIOS for v in SCENARIOS[name](WORK).variants if v.script is None],
    ids=lambda v: v.name,
)
def test_our_command_lines_plan(variant: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    """Every override exists and is accepted together with the others; nothing is drawn."""
    from zimage_runner.cli import main

    command = variant.command(WORK, tmp_path)
    monkeypatch.chdir(tmp_path)
    code = main([*command[3:], "dry_run=true"])
    out, err = capfd.readouterr()
    assert code == 0, err
    assert "3" in out


@pytest.mark.parametrize("variant", [NAIVE, ours("ours", "engine=diffusers")], ids=lambda v: v.name)
def test_a_peer_and_this_runner_end_to_end(variant: Variant) -> None:
    run = once(dataclasses.replace(variant), timeout=120.0)
    assert run.log_tail == ""
    assert run.first_png_seconds is not None
    assert run.first_png_seconds > 0
    assert len(run.intervals) == 2
    assert run.readings["phases"]["import"] > 0
    assert run.readings.get("engine") == (None if variant.script else "diffusers")


def test_device_memory_counts_what_was_added_since_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nvml:
        """20 GB were in use before, then 21, then 20.5."""

        values = iter([20.0, 21.0, 20.5])
        last = 0.0

        def nvmlDeviceGetMemoryInfo(self, handle: object) -> SimpleNamespace:
            self.last = next(self.values, self.last)
            return SimpleNamespace(used=self.last * 1e9)

    monkeypatch.setattr(device_memory, "_open", lambda: (Nvml(), None))
    with device_memory.PeakDeviceMemory() as memory:
        time.sleep(0.4)
    assert memory.peak_gb == pytest.approx(1.0)


def test_without_a_gpu_device_memory_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "_open", lambda: (None, None))
    with device_memory.PeakDeviceMemory() as memory:
        pass
    assert memory.peak_gb is None
