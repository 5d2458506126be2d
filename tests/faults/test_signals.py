"""Asked to end: what is in flight is finished, the summary is there, and the printed command finishes the run."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import random
import shlex
import signal
import subprocess
import sys
import termios
import threading
import time

import pytest

from tests.support.fault_runs import Run, all_gone, children_of, kill
from zimage_runner.outputs.summary import resume_command
from zimage_runner.signals import graceful_stop

INLINE: list[str] = []
PROCESS = ["executor=process"]


def interrupted(run: Run, number: signal.Signals, **variables: object) -> int | None:
    """Send a signal once the first pictures are there; the exit code."""
    process = run.start(ITEM_SECONDS=0.3, **variables)
    run.wait_for_pictures(process, 2)
    assert process.pid is not None
    kill(process.pid, number)
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize(
    ("number", "overrides"),
    [
        (signal.SIGINT, INLINE),
        (signal.SIGTERM, PROCESS),
        # that each of them asks to stop: test_handlers_are_there_during_a_run_and_gone_after_it
        pytest.param(signal.SIGHUP, INLINE, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, INLINE, marks=pytest.mark.slow),
        pytest.param(signal.SIGXCPU, PROCESS, marks=pytest.mark.slow),
    ],
)
def test_the_first_signal_finishes_what_is_in_flight(tmp_path, overrides, number):
    run = Run(tmp_path, seeds=30, overrides=overrides)
    assert interrupted(run, number) == 130
    run.check(complete=False)
    summary = json.loads((run.run_dir / "summary.json").read_bytes())
    assert summary["stopped"] == number.name
    assert summary["items"]["remaining"] > 0
    assert summary["items"]["failed"] == 0
    assert shlex.split(summary["resume"])[1:] == ["-m", "zimage_runner", f"resume={run.run_dir}"]
    assert f"{number.name}: finishing the pictures in flight" in run.log
    assert f"to finish this run: {summary['resume']}" in run.log
    assert "Traceback" not in run.log
    assert run.execute() == 0
    run.check()


def test_one_signal_ends_a_whole_multirun(tmp_path):
    sweep = Run(tmp_path, seeds=20)
    sweep.argv = lambda: [  # type: ignore[method-assign]
        "-m", "sampling.num_inference_steps=2,4,8", "prompt=a cat", 'seeds="0-19"', f"hydra.sweep.dir={tmp_path}/sweep",
        "output.min_free_gb=0", "warmup=none",
    ]  # fmt: skip
    process = sweep.start(ITEM_SECONDS=0.3)
    sweep.run_dir = tmp_path / "sweep" / "0"
    sweep.wait_for_pictures(process, 2)
    assert process.pid is not None
    kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 130
    summary = json.loads((tmp_path / "sweep/0/summary.json").read_bytes())
    assert summary["stopped"] == "SIGTERM"
    assert not list((tmp_path / "sweep").glob("[12]/records.jsonl"))
    assert "Traceback" not in sweep.log
    assert f"to finish the whole multirun: {resume_command(tmp_path / 'sweep')}" in sweep.log
    sweep.argv = lambda: [f"resume={tmp_path}/sweep"]  # type: ignore[method-assign]
    assert sweep.execute() == 0
    assert [len(list((tmp_path / f"sweep/{n}").glob("items/*/*/image.png"))) for n in range(3)] == [20] * 3


@pytest.mark.parametrize("overrides", [INLINE, PROCESS])
def test_the_second_signal_exits_at_once_even_when_the_engine_hangs(tmp_path, overrides):
    run = Run(tmp_path, overrides=overrides)
    process = run.start({"on": 3, "kind": "hang"})
    run.wait_for_pictures(process, 2)
    assert process.pid is not None
    workers = children_of(process.pid)
    kill(process.pid, signal.SIGINT)
    time.sleep(0.3)
    assert process.is_alive()
    kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    assert all_gone(workers)
    run.check(complete=False)
    assert run.execute() == 0
    run.check()


@pytest.mark.parametrize("overrides", [INLINE, PROCESS])
def test_while_the_model_is_loading_one_signal_is_enough(tmp_path, overrides):
    run = Run(tmp_path, overrides=overrides)
    process = run.start(START_SECONDS=30)
    time.sleep(1.0)
    assert process.pid is not None
    kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    assert not run.run_dir.exists()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU"])
def test_handlers_are_there_during_a_run_and_gone_after_it(name):
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with graceful_stop() as stop:
        assert signal.getsignal(number) != before
        assert not stop
        assert not stop.wait(0)
        os.kill(os.getpid(), number)
        assert stop.wait(60)
        assert stop.signal_name == name
    assert signal.getsignal(number) == before


def test_one_signal_interrupts_a_phase_with_nothing_to_lose():
    def load() -> None:
        with stop.interruptible():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)

    with graceful_stop() as stop:
        with pytest.raises(KeyboardInterrupt):
            load()
        with pytest.raises(KeyboardInterrupt):  # asked for before it began
            load()


def test_outside_the_main_thread_there_are_no_handlers():
    found = []

    def run() -> None:
        with graceful_stop() as stop:
            found.append((bool(stop), signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(False, before)]


def test_a_terminal_that_closes_does_not_end_a_run_under_nohup(tmp_path):
    run = Run(tmp_path, seeds=15)
    ours, theirs = pty.openpty()

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does

    environment = {**os.environ, "FAULTS_ITEM_SECONDS": "0.05", "FAULTS_DIR": str(tmp_path)}
    environment.pop("PYTHONUNBUFFERED", None)  # what cannot be written waits in a buffer until the process ends
    command = [sys.executable, "-m", "tests.support.fault_runs", *run.argv()]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=own_terminal, env=environment
    )  # the progress bar is on: stderr is a terminal
    os.close(theirs)
    records = run.run_dir / "records.jsonl"
    deadline = time.monotonic() + 30
    while not (records.exists() and records.read_bytes().count(b"\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.close(ours)  # SIGHUP, and from now on every write to the terminal fails
    assert process.wait(30) == 0
    run.check()


def _random_instants(tmp_path, overrides: list[str], rounds: int, seed: int) -> None:
    rng = random.Random(seed)
    run = Run(tmp_path, seeds=rounds * 6, overrides=overrides)
    for _ in range(rounds):
        process = run.start(ITEM_SECONDS=0.01)
        run.wait_for_pictures(process, 1)
        time.sleep(rng.uniform(0, 0.1))
        assert process.pid is not None
        kill(process.pid, rng.choice([signal.SIGTERM, signal.SIGINT]))
        process.join(60)
        assert process.exitcode in (0, 130), run.log
        run.check(complete=False)
    assert run.execute() == 0
    run.check()


def test_a_few_random_instants(tmp_path):
    _random_instants(tmp_path, INLINE, 3, 1)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [INLINE, PROCESS])
@pytest.mark.parametrize("seed", range(2))
def test_many_random_instants(tmp_path, overrides, seed):
    _random_instants(tmp_path, overrides, 10, seed)
