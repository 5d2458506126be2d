"""Words of a command line in any order, and what the command line says against an experiment file."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zimage_runner.cli.words import readable
from zimage_runner.errors import UserError

CONFIG_DIR = ["--config-dir", "my conf"]
OVERRIDES = ["seeds=[1,2]", "prompt=-m", "+sampling.width=128", "~x", "a=--b", "hydra.mode=RUN"]
OPTIONS = [["-m"], ["--multirun"], CONFIG_DIR, ["--cfg=job"], ["--info"], ["-i", "defaults"], ["-r"]]
INSTEAD = {("-i", "defaults"): ["--info=defaults"], ("--cfg=job",): ["--cfg", "job"]}
"""Other forms of the same that Hydra's parser reads in any place."""


PARTS = st.lists(st.sampled_from([*([word] for word in OVERRIDES), *OPTIONS]))


@given(PARTS.filter(lambda parts: parts.count(CONFIG_DIR) < 2))
def test_options_may_stand_anywhere(parts: list[list[str]]) -> None:
    words = readable([word for part in parts for word in part])
    options = [part for part in parts if part in OPTIONS]
    joined = [INSTEAD.get(tuple(part), part) for part in options]
    overrides = [part for part in parts if part not in OPTIONS]
    assert words == [word for part in (*joined, *overrides) for word in part]


@given(st.lists(st.text(max_size=12)))
def test_any_words_are_kept_or_refused(words: list[str]) -> None:
    try:
        kept = readable(words)
    except UserError:
        return
    assert {word for word in words if not word.startswith(("-", "experiment=")) and word.strip()} <= set(kept)


def test_an_option_after_the_overrides(cli, tmp_path: Path) -> None:
    folder = tmp_path / "my_conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# @package _global_\nprompt: a fox\n", encoding="utf-8")
    code, out, err = cli("dry_run=true", "--config-dir", "my_conf", "experiment=mine", "-m", "seeds=[1,2],[3]")
    assert (code, err) == (0, "")
    assert out.count(" of 1 prompt\n") == 2


def test_an_option_is_not_taken_for_the_folder_of_its_name(cli, tmp_path: Path) -> None:
    (tmp_path / "emoji").mkdir()
    code, _, err = cli("prompts=emoji", "prompts.limit=1", "dry_run=true")
    assert (code, err) == (0, "")
    own = tmp_path / "conf" / "prompts"
    own.mkdir(parents=True)
    (own / "cats.yaml").write_text("defaults: [inline]\ntexts: [a cat]\n", encoding="utf-8")
    (tmp_path / "cats").mkdir()
    assert cli("--config-dir", "conf", "prompts=cats", "dry_run=true")[0] == 0


@pytest.mark.parametrize(
    ("yaml", "argv", "pictures"),
    [
        ("prompts: {texts: [a, b, c]}", ["prompt=a dog"], 1),
        ("prompts: {texts: [a, b, c]}", ["prompts.texts=[x,y]"], 2),
        ("prompt: a fox", ["prompts.texts=[x,y]"], 2),
        ("prompts: {texts: [a, b, c]}", ["prompts=inline", "prompt=a dog"], 1),
        ("prompt: a fox", ["prompts=inline"], 1),
        ("prompt: a fox", ["prompts=emoji", "prompts.limit=4"], 4),
        ("prompt: a {x} fox", ["prompts.template.fill={x:[red,blue]}"], 2),
        ("prompts: {texts: [a], template: {fill: {x: [red, blue]}}}", ["prompt=a {x} dog"], 2),
    ],
)
def test_the_command_lines_prompt_stands_for_the_experiments(
    cli, tmp_path: Path, yaml: str, argv: list[str], pictures: int
) -> None:
    folder = tmp_path / "my_conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(f"# @package _global_\n{yaml}\n", encoding="utf-8")
    code, out, err = cli("--config-dir", "my_conf", "+experiment=mine", "dry_run=true", *argv)
    assert code == 0, err
    assert all(" replaces " in line for line in err.splitlines())
    assert f"{pictures} picture" in out


def test_an_experiments_own_contradiction_is_refused(cli, tmp_path: Path) -> None:
    folder = tmp_path / "my_conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# @package _global_\nprompt: a fox\nprompts: {texts: [a]}\n", encoding="utf-8")
    code, _, err = cli("--config-dir", "my_conf", "+experiment=mine", "dry_run=true")
    assert code == 2
    assert "experiment/mine.yaml: prompt and prompts.texts are both set" in err


def test_a_home_directory_is_found(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    code, out, err = cli(
        "prompt=a fox", "output.root=~/runs", "output_file=~/fox.png", "sampling.num_inference_steps=1"
    )
    assert code == 0, err
    assert Path(out.strip()).is_relative_to(tmp_path / "home" / "runs")
    assert (tmp_path / "home" / "fox.png").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
