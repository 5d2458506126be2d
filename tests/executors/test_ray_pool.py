"""The pool of executor=ray over workers that are simulated: faults, order, sizes. No Ray."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.faulty_session import PARAMS, drawn, item
from tests.support.simulated_fleet import REPORT, SimulatedFleet
from zimage_runner.errors import RunStopped, UserError
from zimage_runner.executors.base import Batch
from zimage_runner.executors.ray_config import RayExecutorConfig
from zimage_runner.executors.ray_pool import RayExecutor
from zimage_runner.memory.policies import Action, Health
from zimage_runner.plan import Bucket
from zimage_runner.signals import StopRequest


@contextlib.contextmanager
def executor(
    fleet: SimulatedFleet, *, health: Health | None = None, stop: StopRequest | None = None, **options: Any
) -> Iterator[RayExecutor]:
    config = RayExecutorConfig(**{"backoff_s": 0.0, **options})
    made = RayExecutor(config, fleet, health or Health(), StopRequest() if stop is None else stop)
    try:
        yield made
    finally:
        made.close()
        assert fleet.closed


def batches(count: int, size: int = 1) -> Iterator[Batch]:
    for n in range(0, count, size):
        yield Batch(items=[item(seed) for seed in range(n, min(count, n + size))])


@settings(max_examples=40)
@given(
    places=st.integers(1, 6), count=st.integers(0, 30), size=st.integers(1, 4), seed=st.integers(0, 10**6),
    deadly=st.dictionaries(st.integers(0, 29), st.integers(1, 3), max_size=5),
)  # fmt: skip
def test_every_item_comes_back_once_whatever_dies(places, count, size, seed, deadly):
    fleet = SimulatedFleet(places, deadly=deadly, seed=seed)
    with executor(fleet, max_restarts=1000) as made:
        made.start()
        errors = drawn(list(made.run(batches(count, size))))
        assert errors.keys() == set(range(count))
        failed = {n for n, error in errors.items() if error is not None}
        assert failed >= {n for n, times in deadly.items() if n < count and times >= 2}
        assert failed <= deadly.keys(), "what never ended a worker by itself is drawn"
        assert all("given up: 2 worker processes died drawing this" in (errors[n] or "") for n in failed)
        assert len(made.report()["executor"]["quarantined"]) == len(failed)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), kills=st.lists(st.booleans(), min_size=1, max_size=12))
def test_workers_and_nodes_that_end_from_outside(seed, kills):
    fleet = SimulatedFleet(3, seed=seed)
    todo, errors = list(kills), {}
    with executor(fleet, max_restarts=1000) as made:
        made.start()
        for result in made.run(batches(40, 2)):
            errors |= drawn([result])
            if todo and fleet.living:
                fleet.kill(fleet.living[seed % len(fleet.living)], blameless=todo.pop())
        assert errors.keys() == set(range(40))
        given_up = {n for n, error in errors.items() if error is not None}
        assert len(given_up) <= kills.count(False) // 2  # two deaths at the same item that were not a node's
        assert made.report()["executor"]["restarts"] == len(kills) - len(todo)


def test_a_node_is_no_items_fault():
    fleet = SimulatedFleet(2)
    fleet.fails_node = Counter({1: 5})
    with executor(fleet, max_restarts=100) as made:
        made.start()
        assert drawn(list(made.run(batches(3)))) == dict.fromkeys(range(3))
        assert made.report()["executor"]["restarts"] == 5


def test_memory_is_bounded_by_the_workers():
    fleet = SimulatedFleet(4)
    taken = 0

    def counted() -> Iterator[Batch]:
        nonlocal taken
        for batch in batches(1000):
            taken += 1
            yield batch

    with executor(fleet) as made:
        made.start()
        for given_out, _ in enumerate(made.run(counted()), 1):
            assert taken - given_out <= 4 * (8 + 2) + 8
        assert fleet.most_in_flight <= 4 * 2


def test_a_worker_keeps_its_shape():
    fleet = SimulatedFleet(2)
    sizes = (32, 64)
    buckets = {side: Bucket.of(replace(PARAMS, width=side), 32, 0) for side in sizes}

    def mixed() -> Iterator[Batch]:
        for seed in range(40):
            side = sizes[seed % 2]
            yield Batch(items=[replace(item(seed), params=replace(PARAMS, width=side), bucket=buckets[side])])

    with executor(fleet) as made:
        made.start()
        assert len(list(made.run(mixed()))) == 40
    changes = sum(a != b for shapes in fleet.shapes_of.values() for a, b in itertools.pairwise(shapes))
    assert changes <= 2, "each changes at most once, when its own shape is drawn to the end"


def test_a_hanging_item_is_cut_off_and_given_up_the_second_time(monkeypatch):
    monkeypatch.setattr("zimage_runner.executors.ray_pool.POLL_S", 0.0)
    fleet = SimulatedFleet(2)
    fleet.hangs = {3}
    with executor(fleet, item_timeout_s=0.05) as made:
        made.start()
        errors = drawn(list(made.run(batches(6))))
        assert "gave no sign of life for 0.05 s and was killed" in (errors.pop(3) or "")
        assert errors == dict.fromkeys([0, 1, 2, 4, 5])


def test_workers_join_and_leave_while_it_runs():
    fleet = SimulatedFleet(1)
    with executor(fleet) as made:
        made.start()
        run = made.run(batches(60))
        results = [next(run)]
        fleet.room = 3
        results += [next(run) for _ in range(20)]
        assert len(fleet.living) == 3
        fleet.room = 2
        fleet.kill(fleet.living[0], blameless=True)
        results += list(run)
        assert drawn(results) == dict.fromkeys(range(60))
        assert len(fleet.hired) == 3


def test_no_more_workers_than_work():
    fleet = SimulatedFleet(1)
    with executor(fleet) as made:
        made.start()
        fleet.room = 50
        assert len(list(made.run(batches(3)))) == 3
        assert len(fleet.hired) <= 3


def test_a_signal_leaves_what_is_in_flight_alone():
    stop, fleet = StopRequest(), SimulatedFleet(2)
    with executor(fleet, stop=stop) as made:
        made.start()
        run = made.run(batches(100))
        results = [next(run)]
        stop.set("SIGTERM")
        results += list(run)
        assert len(results) <= 1 + 4
        assert all(result.images is not None for result in results)


@pytest.mark.parametrize(
    ("health", "options"),
    [(Health(), {"max_items_per_worker": 4}), (Health(max_reserved_gb=5.0, action=Action.recycle), {})],
)
def test_a_worker_that_is_due_is_replaced(health, options):
    fleet = SimulatedFleet(1)
    with executor(fleet, health=health, **options) as made:
        made.start()
        run = made.run(batches(12))
        results = [next(run)]
        if health.max_reserved_gb:
            fleet.reports[1] = {**REPORT, "gpu_memory": {"reserved_gb": 6.0}}
        results += list(run)
        assert drawn(results) == dict.fromkeys(range(12))
        assert made.report()["executor"]["recycled"] >= 1
        assert made.report()["executor"]["restarts"] == 0


def test_it_never_mixes_numerics():
    fleet = SimulatedFleet(1)
    fleet.reports[2] = {**REPORT, "numerics": {"engine": "another"}}
    with executor(fleet) as made:
        made.start()
        fleet.room = 2
        with pytest.raises(RunStopped, match=r"computes with .*another.*executor\.resources"):
            list(made.run(batches(20)))


def test_deaths_in_a_row_end_the_run():
    fleet = SimulatedFleet(1, deadly=dict.fromkeys(range(100), 1))
    with executor(fleet, max_restarts=3) as made:
        made.start()
        with pytest.raises(RunStopped, match="4 workers died one after the other"):
            list(made.run(batches(50, 10)))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"refusal": "model.path=/nowhere has no model_index.json"}, "model.path=/nowhere has no model_index.json"),
        ({"room": 0}, "no worker finds room: a worker asks for GPU: 1; the nodes have GPU: 0"),
    ],
)
def test_what_the_user_can_mend_is_said_at_the_start(change, text):
    fleet = SimulatedFleet(1)
    vars(fleet).update(change)
    with executor(fleet) as made, pytest.raises(UserError, match=text):
        made.start()


def test_a_lower_bound_that_finds_no_room(monkeypatch):
    monkeypatch.setattr("zimage_runner.executors.ray_pool.POLL_S", 0.0)
    fleet = SimulatedFleet(1)
    with (
        executor(fleet, workers="2-4", start_timeout_s=0.05) as made,
        pytest.raises(UserError, match="1 more workers are needed and found no room"),
    ):
        made.start()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"workers": "many"}, "executor.workers=many: write auto, a number like 4, or bounds like 2-8"),
        ({"workers": "8-2"}, "executor.workers=8-2: use 1 to 100,000 workers, the smaller bound first"),
        ({"workers": 0}, "executor.workers=0: use 1 to 100,000 workers"),
        ({"num_gpus": "one"}, "executor.num_gpus=one: write auto or a number"),
        ({"num_cpus": -1}, "executor.num_cpus=-1 is out of range"),
        ({"resources": {"tpu": 0}}, "executor.resources.tpu=0 is out of range"),
        (
            {"address": "auto", "object_store_gb": 1.0},
            "object_store_gb=1 is decided when a cluster is started",
        ),
        ({"item_timeout_s": 0}, "executor.item_timeout_s=0 is out of range"),
    ],
)
def test_options_that_are_refused(options, text):
    with pytest.raises(UserError) as error:
        RayExecutorConfig(**options)
    assert text in str(error.value)


def test_without_ray_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^executor=ray needs Ray, .*: pip install 'zimage-runner\[ray\]'$"):
        RayExecutorConfig().create(lambda: None)  # type: ignore[arg-type,return-value]


def test_figures_of_each_worker():
    fleet = SimulatedFleet(2)
    with executor(fleet) as made:
        made.start()
        list(made.run(batches(20)))
        workers = made.report()["executor"]["workers"]
    assert sum(worker["images"] for worker in workers) == 20
    assert {worker["worker"] for worker in workers} == {"worker 1 on node1", "worker 2 on node0"}
    assert all(worker["images_per_second"] == pytest.approx(100) for worker in workers if worker["images"])
    assert all(0 <= worker["idle_share"] <= 1 and not worker["died"] for worker in workers)
    assert all((worker["first_image_seconds"] is not None) == (worker["images"] > 0) for worker in workers)
