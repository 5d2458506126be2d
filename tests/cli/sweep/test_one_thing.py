"""A sweep is one thing whatever it varies: one directory, table, grid and plan, and it is resumed as it began."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.command import SMALL
from zimage_runner.cli.sweep.launcher import job_labels
from zimage_runner.cli.sweep.report import split_overrides

pytestmark = pytest.mark.usefixtures("model_stays")
Cli = Callable[..., tuple[int, str, str]]
FAST = ["sampling.num_inference_steps=1", "seeds=1", "output.fsync=never", *SMALL]


def experiments(**files: str) -> str:
    folder = Path("c/experiment")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n", encoding="utf-8")
    return "--config-dir=c"


def table_of(sweep: Path) -> list[dict[str, str]]:
    with (sweep / "summary.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("words", "field", "values", "folders"),
    [
        (["name=a,b", "prompt=x"], "name", ["a", "b"], ["0", "1"]),
        (["+experiment=a,b"], "experiment", ["a", "b"], ["0", "1"]),
        (["prompt=x", "output.root=p,q"], "output.root", ["p", "q"], ["0", "1"]),
        (["prompt='a cat','a dog'", "hydra.sweep.subdir=s_${hydra.job.num}"], "prompt", ["a cat", "a dog"],
         ["s_0", "s_1"]),
        (['prompt=choice("a cat","a sign \\"OPEN\\"")'], "prompt", ["a cat", 'a sign "OPEN"'], ["0", "1"]),
    ],
)  # fmt: skip
def test_one_directory_table_and_grid(
    cli: Cli, words: list[str], field: str, values: list[str], folders: list[str]
) -> None:
    mine = experiments(a="name: a\nprompt: x", b="name: b\nprompt: y")
    code, out, err = cli("-m", mine, *FAST, *words)
    assert code == 0, err
    sweep = Path(out.splitlines()[-1])
    assert [path.parents[1] for path in sorted(Path.cwd().rglob(".hydra/config.yaml"))] == [sweep / f for f in folders]
    assert [path.parent for path in Path.cwd().rglob("multirun.yaml") if path.parent.name != ".hydra"] == [sweep]
    rows = table_of(sweep)
    assert [row[field] for row in rows] == values
    assert [(row["status"], row["done"]) for row in rows] == [("complete", "1")] * 2
    assert (sweep / "grid.png").is_file()
    pictures = {path: path.stat().st_ino for path in sweep.rglob("image.png")}
    code, out, err = cli(f"resume={sweep}")
    assert code == 0, err
    assert {path: path.stat().st_ino for path in sweep.rglob("image.png")} == pictures, "nothing is drawn again"
    assert [row[field] for row in table_of(sweep)] == values


def test_labels_are_what_was_typed() -> None:
    words = [r"prompt=a\ cat", 'prompt="a sign \\"OPEN\\""', "prompt='a, b'", "prompt=a", "seeds=[1,2]"]
    plain = ["a cat", 'a sign "OPEN"', "a, b", "a", "[1,2]"]
    assert [next(iter(split_overrides([word]).values())) for word in words] == plain
    assert job_labels([[words[0]], [words[1]]], 0) == ["job 0 (prompt=a cat)", 'job 1 (prompt=a sign "OPEN")']


def test_the_plan_of_a_sweep(cli: Cli) -> None:
    code, out, err = cli("-m", 'prompt="a cat","a dog"', "seeds=[1,2],[3]", "dry_run=true")
    assert code == 0, err
    lines = out.splitlines()
    assert [line for line in lines if line.startswith("job ")] == [
        "job 0 (prompt=a cat, seeds=[1,2]):", "job 1 (prompt=a cat, seeds=[3]):",
        "job 2 (prompt=a dog, seeds=[1,2]):", "job 3 (prompt=a dog, seeds=[3]):",
    ]  # fmt: skip
    assert [line.split(maxsplit=1)[1] for line in lines if line.strip().startswith("prompts  ")] == [
        "a cat", "a cat", "a dog", "a dog",
    ]  # fmt: skip
    assert lines[-1] == "4 jobs, 6 pictures to draw in all"


def test_a_job_that_was_never_begun_is_as_it_was_or_refused(cli: Cli) -> None:
    texts = Path("p.txt")
    texts.write_text("a cat\n", encoding="utf-8")
    mine = experiments(cats="defaults: [{override /prompts: text_file}]\nprompts: {path: p.txt}")
    code, _, err = cli("-m", mine, "+experiment=cats", *FAST[:1], *FAST[2:], "seeds=1,2", "hydra.sweep.dir=sw")
    assert code == 0, err
    shutil.rmtree("sw/1")
    texts.write_text("a dog\n", encoding="utf-8")
    code, _, err = cli("resume=sw")
    assert code == 2
    assert (
        "job 1 was never begun, and would not draw what it was to draw when the multirun began: p.txt has changed: put"
        in err
    )
    assert not Path("sw/1").exists()
    texts.write_text("a cat\n", encoding="utf-8")
    code, _, err = cli("resume=sw")
    assert code == 0, err
    assert drawn("sw/1") == ("a cat", 2)


def test_a_folder_of_pictures_is_what_is_in_it(cli: Cli) -> None:
    for text in ("a cat", "a dog"):
        code, out, err = cli(*FAST, f"prompt={text}", "seeds=1")
        assert code == 0, err
        Path("pictures").mkdir(exist_ok=True)
        next(Path(out.split()[-1]).glob("items/*/*/image.png")).rename(f"pictures/{text[-3:]}.png")
    words = ("prompts=images", "prompts.path=pictures", "prompts.wins=command_line")
    code, _, err = cli("-m", *words, *FAST, "seeds=1,2", "hydra.sweep.dir=sw")
    assert code == 0, err
    shutil.rmtree("sw/1")
    Path("pictures/dog.png").rename("dog.png")
    code, _, err = cli("resume=sw")
    assert code == 2
    assert "job 1 was never begun" in err
    assert "pictures/dog.png is gone: put that back" in err
    Path("dog.png").rename("pictures/dog.png")
    code, _, err = cli("resume=sw")
    assert code == 0, err
    assert len(list(Path("sw/1").glob("items/*/*/image.png"))) == 2


def drawn(job: str) -> tuple[str, int]:
    (record,) = Path(job).glob("items/*/*/record.json")
    said = json.loads(record.read_text())
    return said["prompt"], said["seed"]


@pytest.mark.parametrize("fate", ["edited", "renamed", "broken", "folder gone", "moved with the folder"])
def test_a_multirun_needs_only_its_own_directory(cli: Cli, fate: str) -> None:
    """Its experiments and the bases that they build on are as they were when it began, for jobs not begun as well."""
    mine = experiments(base="name: b\nsampling: {num_inference_steps: 1}", a="defaults: [base, _self_]\nprompt: a cat",
                       b="defaults: [base, _self_]\nprompt: a fox")  # fmt: skip
    code, _, err = cli("-m", mine, "+experiment=a,b", *FAST[1:], "hydra.sweep.dir=sw")
    assert code == 0, err
    shutil.rmtree("sw/1")
    next(Path("sw/0").glob("items/*/*/image.png")).unlink()
    sweep = "sw"
    if fate == "edited":
        experiments(a="prompt: a dog", b="prompt: a dog")
    elif fate == "renamed":
        Path("c/experiment/b.yaml").rename("c/experiment/other.yaml")
    elif fate == "broken":
        Path("c/experiment/base.yaml").write_text("[: {", encoding="utf-8")
    else:
        shutil.rmtree("c")
        sweep = str(Path("sw").rename("elsewhere")) if "moved" in fate else sweep
    code, _, err = cli(f"resume={sweep}")
    assert code == 0, err
    assert [drawn(f"{sweep}/{job}") for job in (0, 1)] == [("a cat", 1), ("a fox", 1)]


def test_a_link_among_the_kept_config_files_is_refused(cli: Cli) -> None:
    code, _, err = cli("-m", experiments(a="prompt: a cat"), "+experiment=a", *FAST, "hydra.sweep.dir=sw")
    assert code == 0, err
    kept = Path("sw/.hydra/configs/experiment/a.yaml")
    kept.unlink()
    kept.symlink_to(Path("c/experiment/a.yaml").absolute())
    code, _, err = cli("resume=sw")
    assert code == 2
    assert err.endswith(".hydra/configs/experiment/a.yaml is a link: put a plain file there\n")


def test_a_launcher_chosen_in_an_experiment_is_refused(cli: Cli) -> None:
    mine = experiments(mine="defaults: [{override /hydra/launcher: basic}]\nprompt: a")
    code, _, err = cli("-m", mine, "+experiment=mine", "seeds=1,2")
    assert code == 2
    assert err == (
        "zimage_runner: experiment/mine.yaml: override /hydra/launcher: basic: an experiment cannot choose this: "
        "remove it, and put hydra/launcher=basic on the command line\n"
    )
