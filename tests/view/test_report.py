"""report.html: one page with everything in it."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

from hypothesis import given
from hypothesis import strategies as st

from tests.support.made_runs import HOSTILE, PARAMS, MadeRun
from zimage_runner.view.plots import _round_up, plot
from zimage_runner.view.report import write_report


class Reader(HTMLParser):
    """Collects what a browser would act on."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.handlers: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "href":
                self.links.append(value or "")
            elif name == "src":
                self.sources.append(value or "")
            elif name.startswith("on"):
                self.handlers.append(name)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def test_one_run(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "2026-11-28_22-00-00", ["a cat", "été #1?"], [1, 2]).add_all(failed=[(1, 2)])
    run.finish(status="failures")
    page = read(write_report(run.folder))
    assert page.links == [f"{run.item(0, 1)}/image.png", f"{run.item(0, 2)}/image.png", f"{run.item(1, 1)}/image.png"]
    assert all((run.folder / unquote(link)).is_file() for link in page.links)
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    text = " ".join(page.text)
    for words in (
        "finished, with failures",
        "3 of 4",
        "2.00",
        "1.5 GB",
        "été #1?",
        "BadPictureError: all black",
        "64 x 48",
    ):
        assert words in text
    assert page.tags.count("svg") == 1
    assert page.tags.count("img") == 3


def test_hostile_prompts_are_text(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "one", HOSTILE, [1]).add_all().finish()
    page = read(write_report(run.folder))
    assert not page.handlers
    assert not {"script", "iframe", "object", "base", "form"} & set(page.tags)
    assert page.tags.count("svg") <= 1
    text = " ".join(page.text)
    assert all(prompt.replace("\0", "").split()[0] in text.replace("\0", "") for prompt in HOSTILE[:3])


def test_a_multirun_has_its_grid_and_no_picture_twice(tmp_path: Path) -> None:
    for job, (steps, scale) in enumerate([(4, 0.0), (4, 3.0), (8, 0.0), (8, 3.0)]):
        params = {**PARAMS, "num_inference_steps": steps, "guidance_scale": scale}
        overrides = [f"sampling.num_inference_steps={steps}", f"sampling.guidance_scale={scale}"]
        MadeRun(tmp_path / str(job), ["a cat", "a dog"], [1], params, overrides).add_all().finish()
    (tmp_path / "multirun.yaml").write_text("{}", encoding="utf-8")
    page = read(write_report(tmp_path))
    assert page.tags.count("table") == 3  # the jobs, and a table for each prompt
    assert len(page.sources) == len(set(page.links)) == 8
    text = " ".join(page.text)
    assert all(words in text for words in ("prompts 2", "steps 4", "guidance scale 3", "a cat", "a dog"))


def test_what_nobody_set_is_not_listed(tmp_path: Path) -> None:
    for job, strength in enumerate([None, 0.5]):
        params = {**PARAMS, "mask": None, "strength": strength}
        MadeRun(tmp_path / str(job), ["a cat"], [1], params, []).add_all().finish()
    text = " ".join(read(write_report(tmp_path)).text)
    assert "strength not set, 0.5" in text
    assert "mask" not in text
    assert "None" not in text


def test_a_missing_picture_and_an_empty_run(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "one", ["a cat"], [1, 2]).add_all()
    os.unlink(run.folder / run.item(0, 2) / "image.png")
    page = read(write_report(run.folder))
    assert len(page.sources) == 1
    assert "the file is missing" in " ".join(page.text)
    empty = MadeRun(tmp_path / "empty", ["a cat"], [1])
    (empty.folder / "records.jsonl").touch()
    assert "empty" in " ".join(read(write_report(empty.folder)).text)


def test_it_changes_nothing_else(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "one", ["a cat"], [1]).add_all().finish()
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    write_report(run.folder)
    after = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    assert after.keys() - before.keys() == {run.folder / "report.html"}
    assert all(after[path] == before[path] for path in before)
    json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e4)), max_size=60), st.lists(st.floats(0, 1e6), max_size=5))
def test_plots_stay_inside_their_frame(points: list[tuple[float, float]], marks: list[float]) -> None:
    svg = plot("a < b", sorted(points), "s", marks)
    assert bool(svg) == (len(points) >= 2)
    assert "a < b" not in svg
    for x, y in re.findall(r'cx="([^"]+)" cy="([^"]+)"', svg):
        assert 46 <= float(x) <= 552.1
        assert 10 <= float(y) <= 128.1


@given(st.floats(1e-6, 1e9))
def test_axes_end_just_above_the_values(value: float) -> None:
    assert value <= _round_up(value) <= max(2.6 * value, 1e-5)
