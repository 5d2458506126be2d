"""The sweep's table and the grid's layout."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support import ROOT
from zimage_runner.cli.sweep.report import (
    JobResult,
    csv_table,
    markdown_table,
    read_job,
    split_overrides,
)
from zimage_runner.collect import fonts
from zimage_runner.collect.fonts import can_show, default_font, font_for
from zimage_runner.collect.grid import MAX_PAGES, layout, write_grids
from zimage_runner.collect.overrides import varying_fields
from zimage_runner.collect.sheet import COLUMN_LINES, ELLIPSIS, LINE, Page, clean, draw, drawable, wrapped
from zimage_runner.outputs.beneath import Inside
from zimage_runner.outputs.ledger import record_head


def job(root: Path, number: int, overrides: dict[str, str], items=((0, 1),), size=(32, 16), prompt="a 猫") -> JobResult:
    directory = root / str(number)
    lines = []
    for index, seed in items:
        item = f"items/{index:05d}_x/seed_{seed}"
        (directory / item).mkdir(parents=True)
        Image.new("RGB", size, (number * 20 % 255, index * 40 % 255, 90)).save(directory / item / "image.png")
        (directory / item / "record.json").write_text(json.dumps({"prompt": prompt}))
        size_of_file = (directory / item / "image.png").stat().st_size
        head = record_head(item, "ok", index, seed, "f", image="image.png", sha256="0" * 64, bytes=size_of_file)
        lines.append(json.dumps(head) + "\n")
    (directory / "records.jsonl").write_text("".join(lines))
    return JobResult(number=number, directory=directory, overrides=overrides, summary={"status": "complete"})


def test_overrides_and_what_varies():
    assert split_overrides(["+experiment=q", 'prompt="a, b"', "x="]) == {"experiment": "q", "prompt": "a, b", "x": ""}
    assert varying_fields([{"a": "1", "b": "2"}, {"a": "1"}]) == ["b"]
    assert varying_fields([{"a": 1}, {"a": "1"}]) == []


def test_what_only_a_resumed_job_names_was_not_swept():
    """Resuming an interrupted multirun writes the groups and resume= into the jobs that it draws anew."""
    resumed = {"steps": "6", "engine": "auto", "resume": "outputs/multirun/x"}
    assert varying_fields([{"steps": "4"}, resumed, {}]) == ["steps"]
    assert varying_fields([]) == []


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_csv_cells_are_never_formulas(text):
    jobs = [JobResult(number=0, directory=Path("0"), overrides={"f": text})]
    (_, row) = csv.reader(io.StringIO(csv_table(jobs, ["f"]), newline=""))
    plain = text.replace("\r", " ")
    assert row[1] in (plain, f"'{plain}")
    if row[1].startswith(("=", "+", "-", "@", "\t", "\r")):
        float(row[1])


@given(st.text(max_size=30))
def test_markdown_keeps_one_line_a_job(text):
    jobs = [JobResult(number=0, directory=Path("0"), overrides={"f": text})]
    table = markdown_table(jobs, ["f"])
    assert table.count("\n") == 3
    assert "\n" not in text or "\n" not in table.split("\n")[2]


def test_unreadable_jobs_stay_empty(tmp_path):
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "summary.json").write_text("{broken", encoding="utf-8")
    found = read_job(tmp_path / "3")
    assert (found.summary, found.overrides, found.status, found.code) == ({}, {}, "not run", 1)


def test_two_fields_are_rows_and_columns(tmp_path):
    jobs = [job(tmp_path, n, {"s": str(n // 2), "g": str(n % 2)}) for n in range(4)]
    (page,) = layout(jobs, ["s", "g"])
    assert (page.rows, page.columns) == (["s=0", "s=1"], ["g=0", "g=1"])
    assert {place: file.path.parts[-5] for place, file in page.pictures.items()} == {
        (0, 0): "0", (0, 1): "1", (1, 0): "2", (1, 1): "3",
    }  # fmt: skip


def test_prompts_and_further_fields_are_pages(tmp_path):
    items = ((0, 1), (1, 1))
    jobs = [job(tmp_path, n, {"a": str(n // 4), "s": str(n // 2 % 2), "g": str(n % 2)}, items) for n in range(8)]
    pages = layout(jobs, ["a", "s", "g"])
    assert len(pages) == 4
    assert len({page.name for page in pages}) == 4
    assert all(len(page.pictures) == 4 for page in pages)
    files = write_grids(tmp_path, jobs, ["a", "s", "g"], tile=64)
    assert sorted(f.parent.name for f in files) == ["grid"] * 4


def test_one_field_puts_prompts_in_rows(tmp_path):
    jobs = [job(tmp_path, n, {"g": str(n)}, ((0, 1), (0, 2), (1, 1))) for n in range(2)]
    (page,) = layout(jobs, ["g"])
    assert (len(page.rows), page.columns, len(page.pictures)) == (3, ["g=0", "g=1"], 6)


def test_missing_pictures_leave_holes(tmp_path):
    jobs = [job(tmp_path, n, {"s": str(n // 2), "g": str(n % 2)}) for n in range(4)]
    next(jobs[2].directory.glob("items/*/*/image.png")).unlink()
    (path,) = write_grids(tmp_path, jobs, ["s", "g"], tile=64)
    with Image.open(path) as grid:
        grid.load()


def test_a_job_that_was_refused_leaves_a_column_without_a_word(tmp_path, caplog):
    jobs = [job(tmp_path, n, {"g": str(n)}) for n in range(2)]
    shutil.rmtree(jobs[1].directory)
    (page,) = layout(jobs, ["g"])
    assert (page.columns, {column for _, column in page.pictures}) == (["g=0", "g=1"], {0})
    assert not caplog.records


@pytest.mark.parametrize("size", [(2000, 1000), (16, 16), (64, 4000)])
def test_tiles_are_capped(tmp_path, size):
    jobs = [job(tmp_path, n, {"g": str(n)}, size=size) for n in range(2)]
    (page,) = layout(jobs, ["g"])
    sheet = draw(page, 100)
    assert sheet.width <= 160 + 2 * 104 + 4
    assert sheet.height <= 44 + 104 + 4


def test_pages_are_capped(tmp_path):
    items = tuple((n, 1) for n in range(MAX_PAGES + 3))
    jobs = [job(tmp_path, n, {"s": str(n // 2), "g": str(n % 2)}, items, size=(4, 4)) for n in range(4)]
    assert len(write_grids(tmp_path, jobs, ["s", "g"], tile=8)) == MAX_PAGES


@settings(max_examples=20)  # fontconfig is asked each time
@given(st.text(max_size=60))
def test_any_label_can_be_drawn(text):
    page = Page(title=text, name="x", rows=[text], columns=[text])
    page.pictures[0, 0] = Inside(PICTURE.parent, PICTURE.name)
    draw(page, 32)


FONT = default_font()


@given(st.text(max_size=200), st.integers(1, 4), st.integers(90, 300))
def test_wrapping_loses_nothing_but_what_the_ellipsis_stands_for(text, lines, width):
    pieces = wrapped(text, width, lines, FONT)
    assert len(pieces) <= lines
    shown = "".join("".join(pieces).split())
    is_cut = shown.endswith(ELLIPSIS)
    whole = "".join("".join(wrapped(text, 10**6, 1, FONT)).split())
    assert shown == whole or (is_cut and whole.startswith(shown.removesuffix(ELLIPSIS)))
    assert all(FONT.getlength(piece) <= width for piece in pieces)


def test_labels_wrap_at_words_and_an_ellipsis_ends_what_is_cut():
    assert wrapped("num_inference_steps=4", 116, 3, FONT) == ["num_inference_", "steps=4"]
    assert wrapped("guidance_scale=2", 116, 3, FONT) == ["guidance_scale=", "2"]
    first, *_, last = wrapped(
        "a lighthouse on a steep cliff above the stormy sea at dusk, in oil", 116, COLUMN_LINES, FONT
    )
    assert first == "a lighthouse on a"
    assert last.endswith(ELLIPSIS)
    assert wrapped("seed=1", 116, 3, FONT) == ["seed=1"]


def test_columns_have_the_lines_that_the_longest_label_needs(tmp_path):
    jobs = [job(tmp_path, n, {"g": value}, size=(128, 64)) for n, value in enumerate(["1", "2", "x" * 25, "y" * 300])]
    heights = [draw(layout(jobs[:n], ["g"])[0], 128).height for n in (2, 3, 4)]
    assert [height - heights[0] for height in heights] == [0, LINE, (COLUMN_LINES - 1) * LINE]


def test_swept_prompts_are_their_own_labels(tmp_path):
    jobs = [job(tmp_path, n, {"prompt": text}, prompt=text) for n, text in enumerate(["a cat", "a dog"])]
    (page,) = layout(jobs, ["prompt"])
    assert (page.columns, page.rows) == (["a cat", "a dog"], ["0: seed 1"])


def test_no_picture_of_a_swept_prompt_is_lost(tmp_path):
    fields = [("a cat", "1"), ("a cat", "2"), ("a dog", "1"), ("a dog", "2")]
    jobs = [job(tmp_path, n, {"prompt": text, "s": s}, prompt=text) for n, (text, s) in enumerate(fields)]
    (page,) = layout(jobs, ["prompt", "s"])
    assert (page.rows, page.columns) == (["a cat", "a dog"], ["s=1", "s=2"])
    assert len(set(page.pictures.values())) == 4


PICTURE = ROOT / "zimage_runner" / "assets" / "none.png"


@pytest.fixture(autouse=True, scope="module")
def _picture(tmp_path_factory):
    global PICTURE
    PICTURE = tmp_path_factory.mktemp("picture") / "p.png"
    Image.new("RGB", (8, 8)).save(PICTURE)


def test_what_a_font_cannot_show_is_known_from_its_box():
    assert can_show(FONT, "a")
    assert can_show(FONT, "é")
    assert not can_show(FONT, "猫")
    assert drawable("a 猫猫 b 猫", FONT) == f"a {ELLIPSIS} b {ELLIPSIS}"
    assert clean("a\n猫") == "a 猫"


@pytest.mark.parametrize("text", ["猫", "Привет", "ñandú", "สวัสดี"])
def test_the_font_shows_the_text_or_no_font_of_fontconfig_does(text, tmp_path):
    font = font_for([text, "x"])
    shown = all(can_show(font, c) for c in text)
    assert shown or not list(fonts._fonts_of_fontconfig(frozenset(text)))


def test_without_a_font_labels_are_numbered_and_a_table_says_what_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr("zimage_runner.collect.sheet.font_for", lambda texts: FONT)
    jobs = [job(tmp_path, n, {"prompt": text}, prompt=text) for n, text in enumerate(["一只猫", "a dog", "狗, red"])]
    (path,) = write_grids(tmp_path, jobs, ["prompt"], tile=64)
    assert path.name == "grid.png"
    rows = list(csv.reader((tmp_path / "grid_labels.csv").open(encoding="utf-8")))
    assert rows == [
        ["page", "label", "text"],
        ["all", "column 1: ...", "一只猫"],
        ["all", "column 3: ..., red", "狗, red"],
    ]


def test_no_table_where_every_label_can_be_read(tmp_path):
    jobs = [job(tmp_path, n, {"g": str(n)}, prompt="a cat") for n in range(2)]
    write_grids(tmp_path, jobs, ["g"], tile=64)
    assert not (tmp_path / "grid_labels.csv").exists()
