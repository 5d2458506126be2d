"""The page says what the JSON says, and verdicts follow from figures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.report import (
    CLAIMS,
    IMPOSSIBLE,
    PHASES,
    PLAIN,
    START,
    Row,
    Spread,
    judge,
    load,
    page,
    percentile,
    phases_of,
    verdict,
)
from tests.support.measured import results, run


def test_medians_and_spreads(tmp_path: Path) -> None:
    runs = [run("plain", first, [1.0, 2.0, 3.0], n) for n, first in enumerate([10.0, 30.0, 11.0])]
    _, (row,) = load(results(tmp_path, runs))
    assert row.figures["first_png"] == Spread(median=11.0, low=10.0, high=30.0, count=3)
    assert median(row, "seconds_per_image") == 2.0
    assert median(row, "p95") == 3.0
    assert median(row, "peak_reserved") == 23.0


def median(row: Row, metric: str) -> float | None:
    spread = row.figures[metric]
    return None if spread is None else spread.median


def test_phases_add_up_to_the_first_picture() -> None:
    phases = phases_of(run("plain", 4.0, []))
    assert tuple(phases) == PHASES
    assert phases == pytest.approx(
        {"start": 1.0, "import": 1.0, "load": 0.5, "move": 0.5, "compile": 0.0, "warm-up": 0.25, "first picture": 0.75}
    )
    assert sum(phases.values()) == pytest.approx(4.0)


def test_failures_count_in_no_figure_and_are_shown(tmp_path: Path) -> None:
    runs = [run("plain", 10.0, [1.0]), run("plain", 99.0, [9.0], 1, returncode=1, log_tail="why\nCUDA out of memory\n")]
    path = results(tmp_path, runs)
    _, (row,) = load(path)
    assert row.figures["first_png"] == Spread(median=10.0, low=10.0, high=10.0, count=1)
    text = page(tmp_path, tmp_path)
    assert "plain (warm): exit 1: CUDA out of memory" in text
    assert "99.00" not in text


def test_contestants_without_figures_are_shown_with_the_reason(tmp_path: Path) -> None:
    """One whose processes all failed, and one for which no time was left."""
    log = "Traceback\nRuntimeError: no such kernel\nlast words\n"
    dead = run("dead", 1.0, [], returncode=1, log_tail=log, failure="exit 1 with 0 of 4 pictures")
    path = results(tmp_path, [run("plain", 10.0, [1.0]), dead, run("late", 1.0, [])])
    data = json.loads(path.read_text(encoding="utf-8"))
    data["runs"].pop()
    data["skipped"] = [{"variant": "late", "cache": "warm", "round": n} for n in range(2)]
    data["note"] = "another scenario ran on the second GPU meanwhile"
    data["work"]["images"] = 1
    data["gpu"] = {"index": 1, "uuid": "GPU-1", "name": "NVIDIA H200"}
    path.write_text(json.dumps(data), encoding="utf-8")
    text = page(tmp_path, tmp_path)
    assert "| **dead** | warm | failed |" in text
    assert "- dead (warm): exit 1 with 0 of 4 pictures: RuntimeError: no such kernel" in text
    assert "| **late** | warm | not run |" in text
    assert "late (warm) 2" in text
    assert "Note: another scenario ran on the second GPU meanwhile." in text
    assert "GPU 1 of the machine" in text
    assert ". 1 picture of " in text


def test_medians_of_several_processes_show_spread_and_count(tmp_path: Path) -> None:
    results(tmp_path, [run("plain", first, [1.0, first], n) for n, first in enumerate([10.0, 30.0, 11.0])])
    text = page(tmp_path, tmp_path)
    assert "| 11.00 (10.00-30.00) |" in text
    assert "| 6.000 (5.500-15.500) |" in text
    assert "| 11.000 (10.000-30.000) |" in text  # p95
    assert " | 3 |\n" in text


def test_single_intervals_of_batches_are_no_figures(tmp_path: Path) -> None:
    intervals = [0.01, 0.01, 0.01, 1.97, 0.01, 0.01, 0.01]
    results(tmp_path, [run("plain", 5.0, intervals, batch_sizes=[4] * 8)], "throughput")
    _, (row,) = load(tmp_path / "throughput.json")
    assert median(row, "seconds_per_image") == pytest.approx(0.5)
    assert (row.figures["p95"], row.figures["jitter"], row.largest_batch) == (None, None, 4)
    assert "up to 4 at a time" in page(tmp_path, tmp_path)


def test_jobs_of_a_sweep_beside_one_picture(tmp_path: Path) -> None:
    one, sweep = run("one job", 5.0, [0.5, 0.5]), run("sweep", 5.0, [0.54, 0.56])
    sweep["readings"]["jobs"] = [
        {"load": 3.0, "warm_up": 0.5, "image": 0.5},
        {"load": 0.0, "warm_up": 0.0, "image": 0.5},
        {"load": 0.0, "warm_up": 0.0, "image": 0.5},
    ]
    results(tmp_path, [one, sweep], "multirun")
    text = page(tmp_path, tmp_path)
    assert "to the next job's: 0.550 (0.540-0.560) s, n = 2; in a job of several 0.500 s: 1.10x" in text
    assert "load 0.000 s, warm-up 0.000 s at most" in text


def test_page_holds_the_figures_the_expectation_and_every_claim(tmp_path: Path) -> None:
    runs = [run(name, first, [each, each]) for name, first, each in
            [("plain", 20.0, 2.0), ("step 4: wake the hardware", 10.0, 2.0)]]  # fmt: skip
    results(tmp_path, runs)
    results(tmp_path, runs, START)
    text = page(tmp_path, tmp_path)
    assert "Expected: we expect" in text
    assert "| 10.00 | 2.00x | 2.000 | 1.00x |" in text
    assert "confirmed: 20.00 -> 10.00 s (-50%)" in text
    assert text.count("compared with *plain*, whose figure comes first. Less than 2 % apart is no effect;") == 2
    assert all(claim.text in text for claim in CLAIMS)
    assert all(claim in text for claim in IMPOSSIBLE)
    assert text.count("not measured") == len(CLAIMS) - 1
    assert (tmp_path / "plots" / "ablation.svg").exists() == ("plots/ablation.svg" in text)


def test_the_same_figures_give_the_same_page(tmp_path: Path) -> None:
    results(tmp_path, [run("plain", 20.0, [2.0, 2.0])])
    first = page(tmp_path, tmp_path)
    plot = tmp_path / "plots" / "ablation.svg"
    drawn = plot.read_bytes() if plot.exists() else b""
    assert page(tmp_path, tmp_path) == first
    assert (plot.read_bytes() if plot.exists() else b"") == drawn


def test_other_json_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "resident.json").write_text("{}", encoding="utf-8")
    assert "##" not in page(tmp_path, tmp_path)


def test_claims_compare_contestants_that_exist() -> None:
    from benchmarks.scenarios import SCENARIOS, TINY
    from benchmarks.variants import Work

    work = Work(model=TINY, images=2, size=128, steps=2, device="cpu")
    for claim in CLAIMS:
        assert {PLAIN, claim.variant} <= {v.name for v in SCENARIOS[claim.scenario](work).variants}


def spread(median: float, half: float = 0.0) -> Spread:
    return Spread(median=median, low=median - half, high=median + half, count=3)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (spread(1.0), spread(2.0), "confirmed"),
        (spread(2.0), spread(1.0), "harmful"),
        (spread(1.99), spread(2.0), "no effect"),  # below 2 %
        (spread(1.5, 0.3), spread(2.0, 0.3), "not decided"),  # within both spreads
        (spread(1.5, 0.2), spread(2.0, 0.2), "confirmed"),
    ],
)
def test_judge(one: Spread, other: Spread, expected: str) -> None:
    assert judge(one, other) == expected


@pytest.mark.parametrize(
    ("seconds", "count", "expected"),
    [
        (23.4, 1, "not decided"),
        (23.4, 3, "harmful"),
        (35.0, 1, "harmful"),
        (13.0, 1, "confirmed"),
        (21.7, 1, "no effect"),
    ],
)
def test_few_processes_decide_only_what_is_beyond_their_usual_differences(
    seconds: float, count: int, expected: str
) -> None:
    one, other = (Spread(median=value, low=value, high=value, count=count) for value in (seconds, 21.7))
    assert judge(one, other, "first_png") == expected


@given(st.floats(0.1, 100), st.floats(0, 5), st.floats(0.1, 100), st.floats(0, 5))
def test_a_verdict_turns_round_when_the_contestants_do(a: float, da: float, b: float, db: float) -> None:
    one, other = spread(a, da), spread(b, db)
    mirror = {"confirmed": "harmful", "harmful": "confirmed", "not decided": "not decided"}
    there, back = judge(one, other), judge(other, one)
    # The 2 % are of the baseline, so just at that edge one direction may see an effect and the other none.
    assert "no effect" in (there, back) or back == mirror[there]
    assert judge(one, one) == "no effect"


def test_verdict_without_figures_is_not_measured() -> None:
    assert verdict(CLAIMS[0], {}) == "not measured"


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50))
def test_percentile_is_one_of_the_values_and_bounds_most(values: list[float]) -> None:
    p95 = percentile(values, 0.95)
    assert p95 in values
    assert sum(v <= p95 for v in values) >= 0.95 * len(values)


def test_several_files_of_a_scenario_have_headings_of_their_own(tmp_path: Path) -> None:
    results(tmp_path, [run("plain", 20.0, [2.0, 2.0])])
    shutil.copy(tmp_path / "ablation.json", tmp_path / "ablation_second_machine.json")
    headings = [line for line in page(tmp_path, tmp_path).splitlines() if line.startswith("## ")]
    assert headings == ["## The title", "## The title, second machine"]
