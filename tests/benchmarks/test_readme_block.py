"""The README's table and the measurements' page say what the JSON files say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import report
from benchmarks.report import BEGIN, END, FP8, OURS, front_table, page, replaced
from benchmarks.variants import HERE, NAIVE, NAIVE_BYTECODE
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


def test_without_results_there_is_nothing_to_say(tmp_path: Path) -> None:
    assert front_table(tmp_path) == ""


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
    assert "precision" not in front_table(tmp_path)
    results(tmp_path, [run(NAIVE.name, 20.0, [1.5]), run(OURS, 5.0, [0.5]), run(FP8, 5.0, [0.25])], "throughput")
    assert "`engine.precision=fp8` | 1.500 s | 0.250 s | **6.0x** |" in front_table(tmp_path)


@pytest.mark.parametrize("gone", [NAIVE.name, OURS])
def test_no_table_without_both(gone: str, tmp_path: Path) -> None:
    runs = [each for each in (run(NAIVE.name, 20.0, [1.5]), run(OURS, 5.0, [0.75])) if each["variant"] != gone]
    results(tmp_path, runs, "throughput")
    starts(tmp_path, 3.0, 12.0, 18.0)
    assert front_table(tmp_path) == ""


def test_failures_are_no_figures(tmp_path: Path) -> None:
    dead = run(OURS, 1.0, [0.1], returncode=1, log_tail="RuntimeError")
    results(tmp_path, [run(NAIVE.name, 20.0, [1.5]), dead], "throughput")
    starts(tmp_path, 3.0, 12.0, 18.0)
    assert front_table(tmp_path) == ""


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
