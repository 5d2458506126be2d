from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.drawing import session_config
from tests.support.faulty_session import FaultySession, drawn, item
from zimage_runner.engines.diffusers.engine import DiffusersEngine
from zimage_runner.errors import BadPictureError, RunStopped, UserError
from zimage_runner.executors.base import Batch, BatchResult, Executor
from zimage_runner.executors.inline import InlineExecutorConfig
from zimage_runner.executors.process import ProcessExecutor, ProcessExecutorConfig
from zimage_runner.memory.policies import Action, Health, Resident
from zimage_runner.signals import StopRequest


@contextlib.contextmanager
def executor(*, health: Health | None = None, stop: StopRequest | None = None, **options) -> Iterator[ProcessExecutor]:
    """A process executor over FaultySession; afterwards no worker may be left."""
    config = ProcessExecutorConfig(**{"backoff_s": 0.01, "item_timeout_s": 30.0, **options})
    made = config.create(FaultySession, health=health, stop=stop)
    assert isinstance(made, ProcessExecutor)
    try:
        yield made
    finally:
        made.close()
        assert not workers_of(os.getpid())


def workers_of(parent: int) -> list[int]:
    """Living worker processes of a process."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, ppid = stat.read_text(encoding="utf-8").rpartition(")")[2].split()[:2]
            if int(ppid) == parent and state != "Z" and b"executors.worker" in (stat.parent / "cmdline").read_bytes():
                found.append(int(stat.parent.name))
    return found


def batches(seeds: Iterable[int], size: int = 1) -> Iterator[Batch]:
    seeds = list(seeds)
    for n in range(0, len(seeds), size):
        yield Batch(items=[item(s) for s in seeds[n : n + size]])


def run(made: Executor, seeds: Iterable[int], size: int = 1) -> list[BatchResult]:
    return list(made.run(batches(seeds, size)))


def test_the_same_pictures_as_inline_from_another_process(faults):
    faults()
    with executor() as made:
        report = made.start()
        assert report["pid"] in workers_of(os.getpid())
        assert drawn(run(made, range(7), 3)) == dict.fromkeys(range(7))
        assert drawn(run(made, range(2))) == dict.fromkeys(range(2))
        assert made.report()["executor"] == {
            "kind": "process", "restarts": 0, "deaths": [], "recycled": 0, "quarantined": []
        }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "how"), [("exit", "exit code 3"), ("segv", "SIGSEGV"), ("kill", "SIGKILL"), ("lost", "illegal memory")]
)
def test_a_worker_that_dies_once_is_replaced_and_its_item_drawn_again(faults, kind, how):
    faults({"on": 2, "kind": kind, "times": 1})
    with executor() as made:
        first = made.start()["pid"]
        assert drawn(run(made, range(5), 2)) == dict.fromkeys(range(5))
        story = made.report()["executor"]
        assert (story["restarts"], story["quarantined"]) == (1, [])
        assert how in story["deaths"][0]
        assert made.report()["pid"] != first


@pytest.mark.parametrize("size", [1, 3])
def test_an_item_that_kills_two_workers_is_given_up_and_the_others_are_not(faults, size):
    faults({"on": 2, "kind": "kill"})
    with executor() as made:
        made.start()
        errors = drawn(run(made, range(6), size))
        assert errors.keys() == set(range(6))
        assert "given up: 2 worker processes died drawing this" in (errors.pop(2) or "")
        assert set(errors.values()) == {None}
        assert made.report()["executor"]["quarantined"] == ["items/00000_a_cat/seed_2"]
        assert made.report()["executor"]["restarts"] == 2


def test_a_hanging_item_is_cut_off(faults):
    faults({"on": 1, "kind": "hang", "times": 1})
    with executor(item_timeout_s=2.0) as made:
        made.start()
        assert drawn(run(made, range(3))) == dict.fromkeys(range(3))
        assert made.report()["executor"]["deaths"] == ["gave no sign of life for 2 s and was killed"]


def test_the_start_of_the_next_worker_is_no_time_of_its_item(faults):
    """Where starting took longer than an item may, each new worker was killed as soon as it was ready."""
    faults({"on": 1, "kind": "exit", "times": 1}, START_SECONDS=1.2)
    with executor(item_timeout_s=1.0) as made:
        made.start()
        assert drawn(run(made, range(3))) == dict.fromkeys(range(3))
        assert made.report()["executor"]["deaths"][0] == "ended with exit code 3"


def test_the_limit_grows_with_the_batch(faults):
    faults(ITEM_SECONDS=0.5)
    with executor(item_timeout_s=1.0) as made:
        made.start()
        assert drawn(run(made, range(4), 4)) == dict.fromkeys(range(4))
        assert made.report()["executor"]["restarts"] == 0


def test_a_slow_reader_is_no_hang(faults):
    faults()
    with executor(item_timeout_s=1.0) as made:
        made.start()
        results = []
        for result in made.run(batches(range(2))):
            time.sleep(1.2)
            results.append(result)
        assert drawn(results) == dict.fromkeys(range(2))
        assert made.report()["executor"]["restarts"] == 0


def test_errors_and_bad_pictures_cross(faults):
    faults({"on": 0, "kind": "raise", "text": "no"}, {"on": 1, "kind": "nan"})
    with executor() as made:
        made.start()
        results = {r.items[0].seed: r for r in run(made, range(3))}
        assert results[0].error == "ValueError: no"
        broken = results[1].images
        assert broken is not None
        with pytest.raises(BadPictureError, match=r"^the decoder's output holds NaN or Inf$"):
            broken.wait()
        assert results[2].error is None


def test_steps_down_are_reported_across_restarts(faults):
    faults({"on": 0, "kind": "oom", "above": 1}, {"on": 2, "kind": "exit", "times": 1})
    with executor() as made:
        made.start()
        assert drawn(run(made, range(4), 2)) == dict.fromkeys(range(4))
        assert made.report()["recovery"] == ["out of memory with 2 pictures of 32x32: 1 at a time from now on"]


def test_replaced_after_so_many_items(faults):
    faults()
    with executor(max_items_per_worker=2) as made:
        made.start()
        assert drawn(run(made, range(7))) == dict.fromkeys(range(7))
        assert made.report()["executor"]["recycled"] >= 2
        assert made.report()["executor"]["restarts"] == 0


def test_peaks_are_those_of_all_workers(faults):
    faults({"on": 4, "kind": "exit", "times": 1}, LEAK_GB=1.0)
    with executor() as made:
        made.start()
        run(made, range(5))
        assert made.report()["gpu_memory"]["peak_reserved_gb"] >= 3.0


def test_replaced_when_it_has_grown(faults):
    faults(LEAK_GB=1.0)
    with executor(health=Health(max_reserved_gb=2.5, action=Action.recycle)) as made:
        made.start()
        assert drawn(run(made, range(9))) == dict.fromkeys(range(9))
        assert 1 <= made.report()["executor"]["recycled"] <= 3


def test_a_session_in_a_worker_leaves_replacing_to_the_parent():
    memory = Resident(health=Health(max_reserved_gb=2.5, action=Action.recycle))
    session = session_config(DiffusersEngine(), memory)
    assert InlineExecutorConfig().adapt(session) is session
    adapted = ProcessExecutorConfig().adapt(session)
    assert adapted.memory.health == Health(max_reserved_gb=2.5, action=Action.warn)
    assert session.memory.health.action is Action.recycle


def test_cannot_start(faults):
    faults({"on": "start", "kind": "raise", "text": "no such kernel"})
    with executor() as made, pytest.raises(RunStopped, match=r"cannot start: it ended: ValueError: no such kernel"):
        made.start()


def test_dies_while_starting(faults):
    faults({"on": "start", "kind": "kill"})
    with executor(max_restarts=2) as made, pytest.raises(RunStopped, match=r"^3 worker processes died one after"):
        made.start()


def test_starts_at_the_second_try(faults):
    faults({"on": "start", "kind": "kill", "times": 1})
    with executor() as made:
        made.start()
        assert drawn(run(made, range(2))) == dict.fromkeys(range(2))


def test_hangs_while_starting(faults):
    faults({"on": "start", "kind": "hang"})
    with executor(start_timeout_s=0.5, max_restarts=0) as made, pytest.raises(RunStopped, match=r"no sign of life"):
        made.start()


def test_what_the_user_can_mend_stays_a_user_error(faults):
    faults({"on": "start", "kind": "refuse"})
    with executor() as made, pytest.raises(UserError, match=r"model\.path=/nowhere"):
        made.start()


@pytest.mark.parametrize(
    ("where", "step"), [(1, lambda made: run(made, range(3))), ("extend", lambda made: made.extend([], []))]
)
def test_for_what_no_worker_could_draw_none_is_replaced_and_no_item_given_up(faults, where, step):
    faults({"on": where, "kind": "refuse"})
    with executor() as made:
        made.start()
        with pytest.raises(UserError, match=r"^model\.path=/nowhere"):
            step(made)
        assert made.report()["executor"]["deaths"] == []


def test_an_endless_series_of_deaths_stops_the_run(faults):
    faults(*({"on": s, "kind": "kill"} for s in range(20)))
    with executor(max_restarts=3) as made:
        made.start()
        results = []
        with pytest.raises(RunStopped, match="4 worker processes died one after the other"):
            results += made.run(batches(range(20)))


def test_a_worker_that_would_draw_other_pictures_stops_the_run(faults):
    faults({"on": 1, "kind": "exit", "times": 1}, {"on": "report", "kind": "numerics", "engine": "cpu", "after": 2})
    with executor() as made:
        made.start()
        with pytest.raises(RunStopped, match=r"computes with .*'cpu'"):
            run(made, range(3))


def test_asked_to_end_it_finishes_what_is_in_flight(faults):
    faults(ITEM_SECONDS=0.05)
    stop = StopRequest()
    with executor(stop=stop) as made:
        made.start()
        results = []
        for result in made.run(b for b in batches(range(100)) if not stop):
            results.append(result)
            stop.set("SIGINT")
        # The generator above ends only when its next batch is asked for.
        assert 1 <= len(results) <= 3


def test_asked_to_end_a_dead_worker_is_not_replaced(faults):
    faults({"on": 1, "kind": "kill"}, ITEM_SECONDS=0.1)
    stop = StopRequest()
    with executor(stop=stop) as made:
        made.start()
        results = []
        for result in made.run(batches(range(50))):
            results.append(result)
            stop.set("SIGINT")
        assert drawn(results) == {0: None}


def test_an_abandoned_run_leaves_nothing_for_the_next(faults):
    faults()
    with executor() as made:
        made.start()
        abandoned = made.run(batches(range(10)))
        assert isinstance(abandoned, Generator)
        next(abandoned)
        abandoned.close()
        assert drawn(run(made, range(50, 53))) == dict.fromkeys(range(50, 53))


@pytest.mark.parametrize("trouble", [[], [{"on": "extend", "kind": "exit", "times": 1}]])
def test_ready_for_another_job(faults, trouble):
    faults(*trouble, {"on": 1, "kind": "exit", "times": 1})
    with executor() as made:
        made.start()
        assert made.extend([], [("a dog", 512)])
        assert made.report()["executor"]["restarts"] == len(trouble)
        assert drawn(run(made, range(3))) == dict.fromkeys(range(3))


PARENT = """
from itertools import count
from tests.support.faulty_session import FaultySession, item
from zimage_runner.executors.base import Batch
from zimage_runner.executors.process import ProcessExecutorConfig
made = ProcessExecutorConfig().create(FaultySession)
print(made.start()["pid"], flush=True)
for result in made.run(Batch(items=[item(seed)]) for seed in count()):
    pass
"""


@pytest.mark.parametrize(
    ("number", "busy"),
    [
        (signal.SIGKILL, True),
        (signal.SIGTERM, False),
        pytest.param(signal.SIGKILL, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, True, marks=pytest.mark.slow),
    ],
)
def test_no_orphan_when_the_parent_is_killed(faults, number, busy):
    faults(*([{"on": 0, "kind": "hang"}] if busy else []))
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, encoding="utf-8")
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    time.sleep(0.1)
    parent.send_signal(number)
    parent.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{worker}").exists()


def test_killed_again_and_again_every_item_comes_back_once(faults):
    faults(ITEM_SECONDS=0.02)
    rng = np.random.default_rng(3)
    with executor(max_restarts=100) as made:
        made.start()
        done = threading.Event()

        def killer() -> None:
            for _ in range(4):
                if done.wait(rng.uniform(0.3, 0.5)):
                    return
                for pid in workers_of(os.getpid()):
                    os.kill(pid, signal.SIGKILL)

        thread = threading.Thread(target=killer)
        thread.start()
        errors = drawn(run(made, range(60), 2))
        done.set()
        thread.join()
        assert errors.keys() == set(range(60))
        assert made.report()["executor"]["restarts"] >= 3
        assert all(e is None or "given up" in e for e in errors.values())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"item_timeout_s": 0.0}, "executor.item_timeout_s=0.0 is out of range: use 0.001 to"),
        ({"max_restarts": -1}, "executor.max_restarts=-1 is out of range"),
        ({"backoff_s": float("nan")}, "executor.backoff_s=nan is out of range"),
        ({"max_items_per_worker": 0}, "executor.max_items_per_worker=0 is out of range"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(UserError) as error:
        ProcessExecutorConfig(**options)
    assert text in str(error.value)


def test_without_a_process_descriptor_the_socket_tells_of_the_end(faults, monkeypatch):
    def refused(pid: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", refused)
    faults({"on": 1, "kind": "kill", "times": 1})
    with executor() as made:
        made.start()
        assert drawn(run(made, range(3))) == dict.fromkeys(range(3))
        assert made.report()["executor"]["restarts"] == 1
