"""``zimage-runner status``: what it says of runs in each state, to people and to programs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.made_runs import MadeRun
from zimage_runner.__main__ import _run
from zimage_runner.view.__main__ import parse


@pytest.fixture
def status(capsys, tmp_path: Path, monkeypatch):
    """``status(words)``: exit code, lines of stdout and stderr, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, list[str], str]:
        code = _run(["status", *words])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return call


def made(name: str, prompts: int = 2, seeds: tuple[int, ...] = (1, 2), **options: Any) -> MadeRun:
    return MadeRun(Path("outputs") / name, [f"a cat {n}" for n in range(prompts)], seeds, **options)


def test_each_state(status):
    made("cats/a").add_all().finish()
    made("cats/b").add_all(failed=[(0, 2)]).finish()
    made("cats/c").add(1, 2)
    made("cats/d", prompts=1, seeds=(7,))
    code, lines, err = status("outputs/cats")
    assert (code, err) == (0, "")
    assert lines == [
        "outputs/cats/a: finished, 4 of 4 pictures, 2 pictures a second, took 10 s",
        "outputs/cats/b: some failed, 3 of 4 pictures, 1 failed, 2 pictures a second, took 10 s",
        "  items/00000_p/seed_2: BadPictureError: all black",
        "  to draw the rest: python -m zimage_runner resume=outputs/cats/b",
        "outputs/cats/c: interrupted, 1 of 4 pictures",
        "  to draw the rest: python -m zimage_runner resume=outputs/cats/c",
        "outputs/cats/d: empty, 0 pictures",
    ]


def test_a_run_that_draws(status):
    run = made("a")
    run.add(0, 1)
    lock = run.hold()
    try:
        code, lines, _ = status("outputs/a")
        report = json.loads(status("outputs/a", "json=true")[1][0])
    finally:
        lock.release()
    assert code == 0
    assert lines == ["outputs/a: running, 1 of 4 pictures"]
    assert [run["state"] for run in report["runs"]] == ["running"]
    assert status("outputs/a")[1][0] == "outputs/a: interrupted, 1 of 4 pictures"


def multirun() -> None:
    folder = Path("outputs/multirun/x")
    for number, steps in enumerate((4, 8)):
        made(f"multirun/x/{number}", overrides=(f"model.variant={steps}",)).add_all(
            failed=[(0, 1)] if number else []
        ).finish()
    (folder / "multirun.yaml").write_text("{}", encoding="utf-8")


def test_a_multirun_is_one_thing(status):
    multirun()
    code, lines, _ = status("outputs/multirun/x")
    assert code == 0
    assert lines == [
        "outputs/multirun/x: some failed, 7 of 8 pictures, 1 failed, took 19 s",
        "  0 model.variant=4: finished, 4 of 4 pictures, 2 pictures a second, took 10 s",
        "  1 model.variant=8: some failed, 3 of 4 pictures, 1 failed, 2 pictures a second, took 10 s",
        "    items/00000_p/seed_1: BadPictureError: all black",
    ]


def shard(name: str, which: str | None, path: str = "p.txt", **settings: Any) -> MadeRun:
    return made(name, settings={"prompts": {"path": path, "shard": which}, "name": name, **settings})


def test_shards_are_one_set_wherever_they_are(status):
    shard("part1", "1/3").add_all().finish(total_seconds=9.5)
    shard("part2", "2/3").add_all(failed=[(0, 1)]).finish(total_seconds=20.0)
    shard("other", "1/3", path="q.txt").add_all().finish()
    shard("steps", "3/3", sampling={"height": 64}).add_all().finish()
    shard("whole", None).add_all().finish()
    parts = [
        "  1/3 outputs/part1: finished, 4 of 4 pictures, 2 pictures a second, took 10 s",
        "  2/3 outputs/part2: some failed, 3 of 4 pictures, 1 failed, 2 pictures a second, took 20 s",
        "    items/00000_p/seed_1: BadPictureError: all black",
        "    to draw the rest: python -m zimage_runner resume=outputs/part2",
    ]
    expected = ["set of 3 shards: interrupted, 7 pictures, 1 failed, took 20 s", *parts, "  not among these runs: 3/3"]
    assert status("outputs/part2", "outputs/part1")[1] == expected
    code, lines, _ = status("outputs")
    assert code == 0
    assert [line.partition(":")[0] for line in lines[:3]] == ["outputs/other", "outputs/steps", "outputs/whole"]
    assert lines[3:] == expected
    shard("part3", "3/3", executor={"item_timeout_s": 3}).add(0, 1)
    lines = status("outputs")[1]
    assert "set of 3 shards: interrupted, 8 of 12 pictures, 1 failed, took 20 s" in lines
    assert lines[-2:] == [
        "  3/3 outputs/part3: interrupted, 1 of 4 pictures",
        "    to draw the rest: python -m zimage_runner resume=outputs/part3",
    ]


def test_a_set_that_draws_and_one_that_was_drawn_twice(status):
    first = shard("a1", "1/2")
    first.add(0, 1)
    shard("a2", "2/2").add_all().finish()
    shard("b1", "1/2").add_all().finish()
    shard("b2", "2/2").add_all().finish()
    lock = first.hold()
    try:
        report = json.loads(status("outputs", "json=true")[1][0])
    finally:
        lock.release()
    one, two = report["sets"]
    assert one["runs"] == {"1": "outputs/a1", "2": "outputs/a2"}
    assert (one["of"], one["missing"], one["state"], one["done"], one["planned"]) == (2, [], "running", 5, 8)
    assert two["runs"] == {"1": "outputs/b1", "2": "outputs/b2"}
    assert (two["state"], two["done"], two["failed"], two["seconds"]) == ("finished", 8, 0, 9.5)


def test_a_multirun_of_shards_is_a_multirun(status):
    for number in (1, 2):
        settings = {"prompts": {"shard": f"{number}/2"}}
        overrides = (f"prompts.shard={number}/2",)
        made(f"multirun/x/{number}", settings=settings, overrides=overrides).add_all().finish()
    Path("outputs/multirun/x/multirun.yaml").write_text("{}", encoding="utf-8")
    report = json.loads(status("outputs", "json=true")[1][0])
    assert [sweep["path"] for sweep in report["multiruns"]] == ["outputs/multirun/x"]
    assert report["sets"] == []
    assert status("outputs")[1][0] == "outputs/multirun/x: finished, 8 of 8 pictures, took 19 s"


def test_json_has_all_of_it(status):
    multirun()
    made("a").add_all(failed=[(n, s) for n in range(2) for s in (1, 2)]).finish(stopped="the disk \x7f is full")
    code, lines, _ = status("outputs/a", "outputs/multirun", "json=true")
    assert (code, len(lines)) == (0, 1)
    report = json.loads(lines[0])
    assert [run["path"] for run in report["runs"]] == ["outputs/a", "outputs/multirun/x/0", "outputs/multirun/x/1"]
    first = report["runs"][0]
    assert (first["state"], first["planned"], first["done"], first["failed"]) == ("failures", 4, 0, 4)
    assert first["failures"][3] == {"item": "items/00001_p/seed_2", "error": "BadPictureError: all black"}
    assert first["stopped"] == "the disk \x7f is full"
    assert first["pictures_per_second"] == 2.0
    assert report["runs"][2]["multirun"] == "outputs/multirun/x"
    (sweep,) = report["multiruns"]
    assert (sweep["path"], sweep["state"], sweep["done"], sweep["varying"]) == (
        "outputs/multirun/x", "failures", 7, ["model.variant"],
    )  # fmt: skip


def test_many_failures_are_counted(status):
    made("a", prompts=4).add_all(failed=[(n, s) for n in range(4) for s in (1, 2)]).finish()
    lines = status("outputs/a")[1]
    assert len(lines) == 8
    assert lines[6] == "  and 3 more (json=true lists all)"


@pytest.mark.parametrize("last", ["a", "multirun/x"])
def test_without_a_name_it_is_the_newest(status, last):
    made("a").add_all().finish()
    multirun()
    os.utime(f"outputs/{last}{'/0' if last != 'a' else ''}/records.jsonl", (4e9, 4e9))
    code, lines, _ = status()
    assert code == 0
    assert lines[0].startswith(f"outputs/{last}: ")
    assert len(lines) == (1 if last == "a" else 4)


def test_latest_is_the_run_that_was_started_last(status):
    for name, started in (("cats/a", 2), ("cats/b", 1)):
        made(name).add_all().finish()
        settings = Path("outputs", name, ".hydra/overrides.yaml")
        settings.parent.mkdir(exist_ok=True)
        settings.touch()
        os.utime(settings, (started, started))
    code, lines, err = status("latest")
    assert (code, err, len(lines)) == (0, "", 1)
    assert lines[0].startswith(f"{Path.cwd()}/outputs/cats/a: finished, 4 of 4 pictures")
    assert parse(["latest"]).folder == f"{Path.cwd()}/outputs/cats/a"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["latest"], "latest: there is no run in "),
        ([], "there is no run below outputs: "),
        (["gone"], "gone is no folder: "),
        (["empty"], "empty: there is no run in it: "),
        (["empty", "jsn=true"], "jsn=true: no such field; the only one here is json"),
        (["json=yes"], "json=yes: write json=true or json=false"),
    ],
)
def test_bad_input_is_one_line(status, words, said):
    Path("empty").mkdir()
    code, lines, err = status(*words)
    assert (code, lines, err.count("\n")) == (2, [], 1)
    assert err.startswith(f"zimage_runner: {said}")
