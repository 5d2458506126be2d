"""The README's table and the measurements' page say what the JSON files say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import report
from benchmarks.report import BATCHED, BEGIN, CACHED, END, OURS, front_table, page, replaced, summary
from benchmarks.variants import HERE, NAIVE, NAIVE_BYTECODE, TUNED
from tests.support.measured import results, run


def test_the_readme_holds_the_table_of_the_results() -> None:
    readme = (HERE.parent / "README.md").read_text(encoding="utf-8")
    assert replaced(readme, front_table(HERE / "results")) == readme, "run python -m benchmarks.report --readme"


def test_the_page_is_that_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one of the plots: they are not compared."""
    draw, asked = report.draw, []

    def draw_once(*args: Any) -> Path | None:
        asked.append(args)
        return draw(*args) if len(asked) == 1 else None

    def without_plots(text: str) -> list[str]:
        return [line for line in text.splitlines() if line and not line.startswith("![")]

    monkeypatch.setattr(report, "draw", draw_once)
    written = (HERE / "README.md").read_text(encoding="utf-8")
    made = page(HERE / "results", tmp_path)
    assert without_plots(made) == without_plots(written), "run python -m benchmarks.report"
    assert len(asked) > 1


def test_the_pages_links_begin_where_the_page_is() -> None:
    text = (HERE / "README.md").read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]*)\)", text)]
    assert [link for link in links if not (HERE / link).exists()] == []


def named(path: Path, name: str, *, size: int = 1024) -> None:
    """Give a results file another name, as --suffix does."""
    data = json.loads(path.read_text(encoding="utf-8"))
    data["work"]["size"] = size
    path.unlink()
    (path.parent / name).write_text(json.dumps(data), encoding="utf-8")


def test_without_results_there_is_nothing_to_say(tmp_path: Path) -> None:
    assert summary(tmp_path) == ""


def starts(folder: Path, ours: float, kept: float, none: float) -> None:
    """Write the starts of both kinds of naive script."""
    firsts = [run(OURS, ours, []), run(NAIVE_BYTECODE.name, kept, []), run(NAIVE.name, none, [])]
    results(folder, firsts, "cold_start")


def test_the_table(tmp_path: Path) -> None:
    results(tmp_path, [run(NAIVE.name, 20.0, [1.5]), run(OURS, 5.0, [0.5])], "throughput")
    assert front_table(tmp_path) == ""
    starts(tmp_path, 3.0, 12.0, 18.0)
    first, picture, killed = [line for line in front_table(tmp_path).splitlines() if line.startswith("| ")][1:]
    assert "| 12.0 s; 18.0 s where Python keeps no bytecode | 3.00 s | **4.0x**; 6.0x |" in first
    assert "1024x1024 | 1.500 s | 0.500 s | **3.0x** |" in picture
    assert "resume=latest" in killed
    assert "One test, torch 2;\nsynthetic full-size weights" in front_table(tmp_path)
    first = summary(tmp_path).splitlines()[0]
    assert "3.0 s (n=1) against 18.0 s (n=1): **6.00x** as fast" in first
    assert "; against 12.0 s (n=1) where Python keeps the bytecode of the naive script's imports: **4.00x**" in first


@pytest.mark.parametrize("gone", [NAIVE.name, OURS])
def test_no_table_without_both(gone: str, tmp_path: Path) -> None:
    runs = [each for each in (run(NAIVE.name, 20.0, [1.5]), run(OURS, 5.0, [0.75])) if each["variant"] != gone]
    results(tmp_path, runs, "throughput")
    starts(tmp_path, 3.0, 12.0, 18.0)
    assert front_table(tmp_path) == ""


def test_all_points(tmp_path: Path) -> None:
    dropped: dict[str, Any] = {"cache": "dropped"}
    named(
        results(tmp_path, [run(NAIVE.name, 57.0, [], **dropped), run(OURS, 15.0, [], **dropped)], "cold_start"),
        "cold_start_dropped.json",
    )
    warm = [run(NAIVE.name, first, [], n) for n, first in enumerate([24.0, 25.0, 26.0])]
    results(tmp_path, [*warm, run(OURS, 5.0, []), run(CACHED, 4.0, [])], "cold_start")
    small = [run(NAIVE.name, 20.0, [0.45]), run(BATCHED, 5.0, [0.0, 0.3, 0.0], batch_sizes=[2] * 4)]
    named(results(tmp_path, small, "throughput"), "throughput_512.json", size=512)
    big = [run(NAIVE.name, 20.0, [1.5]), run(OURS, 5.0, [0.75]), run(TUNED.name, 40.0, [1.2])]
    results(tmp_path, big, "throughput")
    steps = [run("plain", 20.0, [2.0]), run("step 4: wake the hardware", 10.0, [2.0]),
             run("step 2: CPU first", 30.0, [2.0])]  # fmt: skip
    results(tmp_path, steps)
    first, large, little, article, machine = summary(tmp_path).splitlines()
    assert "5.0 s (n=1) against 25.0 s (24.0-26.0, n=3): **5.00x**" in first
    assert "cached by an earlier run 4.0 s (n=1): 6.25x" in first
    assert "page cache dropped 15.0 s (n=1) against 57.0 s (n=1): **3.80x**" in first
    assert "0.750 s (n=1) against naive diffusers 1.500 s (n=1): **2.00x**" in large
    assert "the fastest settings of diffusers measured (tuned diffusers) 1.200 s: 1.60x" in large
    assert "512x512** in batches of up to 2" in little
    assert "0.150 s (n=1) against naive diffusers 0.450 s (n=1): **3.00x**" in little
    assert "helps: step 4, first picture -50%" in article
    assert "harms: step 2, first picture +50%" in article
    assert "one test, torch 2" in machine


@pytest.mark.parametrize("gone", [NAIVE.name, OURS])
def test_no_ratio_without_both(gone: str, tmp_path: Path) -> None:
    runs = [each for each in (run(NAIVE.name, 20.0, [1.5]), run(OURS, 5.0, [0.75])) if each["variant"] != gone]
    results(tmp_path, runs, "throughput")
    assert summary(tmp_path) == ""


def test_failures_are_no_figures(tmp_path: Path) -> None:
    dead = run(OURS, 1.0, [0.1], returncode=1, log_tail="RuntimeError")
    results(tmp_path, [run(NAIVE.name, 20.0, [1.5]), dead], "throughput")
    assert summary(tmp_path) == ""


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40))
def test_nothing_outside_the_markers_changes(before: str, old: str, after: str) -> None:
    text = f"{before}{BEGIN}\n{old}{END}{after}"
    if text.count(BEGIN) == text.count(END) == 1:
        once = replaced(text, "- new\n")
        assert once == f"{before}{BEGIN}\n- new\n{END}{after}"
        assert replaced(once, "- new\n") == once


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}"])
def test_a_readme_without_the_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="once and in this order"):
        replaced(text, "")


def test_what_qualifies_a_figure_stands_behind_it(tmp_path: Path) -> None:
    cold = [run("naive diffusers", 20.0, []), run("ours default", 4.0, [])]
    path = results(tmp_path, cold, "cold_start")
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(data | {"caveat": "Imports were compiled anew"}), encoding="utf-8")
    first = summary(tmp_path).splitlines()[0]
    assert first.endswith("**5.00x** as fast. Imports were compiled anew")


def test_settings_of_diffusers_slower_than_the_naive_loop_are_not_named(tmp_path: Path) -> None:
    rows = [run("naive diffusers", 20.0, [1.0]), run("ours default", 4.0, [0.5]), run("tuned diffusers", 30.0, [1.1])]
    results(tmp_path, rows, "throughput")
    assert "fastest settings" not in summary(tmp_path)
