"""A later choice replaces the one before it: the command line over experiments over their base over a resumed run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from zimage_runner.cli.layers import later_choices_replace
from zimage_runner.cli.messages import typed
from zimage_runner.cli.sweep.launcher import register_launcher
from zimage_runner.config.paths import CONFIG_DIR
from zimage_runner.config.registry import register
from zimage_runner.config.schema import RunConfig
from zimage_runner.errors import UserError
from zimage_runner.runner.spec import prompt_source

GROUPS = sorted(path for path in CONFIG_DIR.iterdir() if path.is_dir() and path.name not in ("experiment", "server"))
OPTIONS = {
    path.name: sorted(option.stem for option in path.glob("*.yaml")) for path in GROUPS if any(path.glob("*.yaml"))
}
ROUNDS = max(map(len, OPTIONS.values()))
"""In so many compositions, which choose in every group at once, each option has its turn."""
EXPERIMENTS = sorted(path.stem for path in CONFIG_DIR.glob("experiment/*.yaml"))
CSV = "defaults: [{override /prompts: csv}]\nprompts: {path: p.csv, columns: {text: caption}}"


def composed(*words: str) -> RunConfig:
    with later_choices_replace(words):
        config = typed(compose("config", list(words)))
    assert isinstance(config, RunConfig)
    return config


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_with_every_option(experiment: str) -> None:
    register()
    register_launcher()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        for turn in range(ROUNDS):
            chosen = {group: options[turn % len(options)] for group, options in OPTIONS.items()}
            words = [f"{group}={option}" for group, option in chosen.items()]
            try:
                path = "x.safetensors model.variant=turbo" if chosen["model"] == "file" else "."
                config = composed(f"+experiment={experiment}", *words, *f"model.path={path}".split())
            except UserError as error:  # the article's script as printed cannot work, and says so
                if (experiment, chosen["compile"]) != ("article_verbatim", "full") or "compile.target" not in str(
                    error
                ):
                    pytest.fail(f"{words}: {error}")
                continue
            assert prompt_source(config) is config.prompts or chosen["prompts"] == "inline", words
            assert config.model.name == chosen["model"]


def in_folder(tmp_path: Path, **files: str) -> str:
    folder = tmp_path / "my_conf" / "experiment"
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n", encoding="utf-8")
    (tmp_path / "p.csv").write_text("caption\na\nb\nc\n", encoding="utf-8")
    (tmp_path / "p.txt").write_text("a\nb\n", encoding="utf-8")
    return "--config-dir=my_conf"


TEXTS = "prompts: {texts: [a, b, c]}"
OUT_OF_MINE = "of experiment/mine.yaml"


@pytest.mark.parametrize(
    ("files", "argv", "prompts", "told"),
    [
        ({}, ["+experiment=quickstart", "prompts=text_file", "prompts.path=p.txt"], 2,
         ["prompts=text_file replaces prompts=inline: left out prompts.texts of experiment/quickstart.yaml"]),
        ({}, ["+experiment=quickstart", "prompts=inline"], 6, []),
        ({"mine": TEXTS}, ["+experiment=mine", "prompts=emoji"], 32,
         [f"prompts=emoji replaces prompts=inline: left out prompts.texts {OUT_OF_MINE}"]),
        ({"mine": CSV}, ["+experiment=mine"], 3, []),
        ({"mine": CSV}, ["+experiment=mine", "prompts=emoji"], 32,
         [f"prompts=emoji replaces prompts=csv: left out prompts.path, prompts.columns {OUT_OF_MINE}"]),
        ({"mine": CSV}, ["+experiment=mine", "prompt=a fox"], 1,
         [f"prompts=inline replaces prompts=csv: left out prompts.path, prompts.columns {OUT_OF_MINE}"]),
        ({"mine": "defaults: [turbo, _self_, {override /model: zimage_nano}]\n" + TEXTS}, ["+experiment=mine"], 3,
         ["prompts replaces prompt: left out prompt of experiment/turbo.yaml"]),
        ({"base": TEXTS, "mine": "defaults: [base, _self_, {override /prompts: emoji}]"}, ["+experiment=mine"], 32,
         ["prompts=emoji replaces prompts=inline: left out prompts.texts of experiment/base.yaml"]),
        ({"base": CSV, "mine": "defaults: [base, _self_]\nprompt: a fox"}, ["+experiment=mine"], 1,
         ["prompts=inline replaces prompts=csv: left out prompts.path, prompts.columns of experiment/base.yaml"]),
        ({"mine": "prompts: {columns: {text: caption}}"}, ["+experiment=mine", "prompts=csv", "prompts.path=p.csv"],
         3, []),
        ({"one": TEXTS, "two": CSV}, ["+experiment=[one,two]"], 3,
         ["prompts=csv replaces prompts=inline: left out prompts.texts of experiment/one.yaml"]),
        ({"one": CSV, "two": TEXTS}, ["+experiment=[one,two]", "prompts=inline"], 3,
         ["prompts=inline replaces prompts=csv: left out prompts.path, prompts.columns of experiment/one.yaml"]),
        ({"mine": "prompt: a fox\nprompts: {texts: [a]}"}, ["+experiment=mine", "prompts=emoji"], 32, None),
        ({"mine": "defaults: [{override /executor: process}]\nprompt: a\nexecutor: {item_timeout_s: 3.0}"},
         ["+experiment=mine", "executor=inline"], 1,
         [f"executor=inline replaces executor=process: left out executor.item_timeout_s {OUT_OF_MINE}"]),
    ],
)  # fmt: skip
def test_what_is_drawn_and_what_is_told(
    cli, tmp_path: Path, files: dict[str, str], argv: list[str], prompts: int, told: list[str] | None
) -> None:
    code, out, err = cli(in_folder(tmp_path, **files), "dry_run=true", "seeds=1", *argv)
    assert code == 0, err
    assert f"{prompts} picture" in out
    assert told is None or err.splitlines() == told


LIST, COUNT = "prompt: a\nseeds: [1, 2]", "prompt: a\nseeds: {count: 3, base: 7}"


@pytest.mark.parametrize(
    ("files", "argv", "seeds"),
    [
        ({"base": COUNT, "mine": "defaults: [base]\nseeds: [1, 2]"}, [], [1, 2]),
        ({"base": LIST, "mine": "defaults: [base]\nseeds: {count: 4}"}, [], {"count": 4}),
        ({"base": COUNT, "mine": "defaults: [base]\nseeds: {count: 4}"}, [], {"count": 4, "base": 7}),
        ({"base": COUNT, "b": "defaults: [base]\nseeds: 0-9", "mine": "defaults: [b]\nseeds: {count: 4}"}, [],
         {"count": 4}),
        ({"base": COUNT, "mine": "defaults: [base]"}, ["seeds=[3]"], [3]),
        ({"base": COUNT, "mine": "defaults: [base]"}, ["seeds.count=4"], {"count": 4, "base": 7}),
        ({"base": LIST, "mine": "defaults: [base]"}, ["seeds={count:4}"], "{count:4}"),
    ],
)  # fmt: skip
def test_seeds_replace_those_of_another_form(
    cli, tmp_path: Path, files: dict[str, str], argv: list[str], seeds: object
) -> None:
    code, out, err = cli(in_folder(tmp_path, **files), "+experiment=mine", *argv, "--cfg", "job")
    assert (code, err) == (0, "")
    assert yaml.safe_load(out)["seeds"] == seeds


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["seeds.count=4"], "seeds.count: seeds is a list here, and has no names: give it as a whole, seeds=..."),
        (["++loras.a=1"], "loras.a: loras is a list here, and has no names: give it as a whole, loras=..."),
        (["-m", "seeds.count=4,5"], "seeds.count: seeds is a list here"),
        (["seeds=1", "seeds.count=4"], "seeds.count: no such field; give it as a whole, seeds=..."),
    ],
)
def test_a_name_within_what_has_none(cli, tmp_path: Path, words: list[str], told: str) -> None:
    code, out, err = cli(in_folder(tmp_path, mine=LIST), "+experiment=mine", *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"zimage_runner: {told}")


@pytest.mark.parametrize(
    ("text", "which"),
    [
        ("prompt: a fox\nprompts: {texts: [a]}", "prompts.texts"),
        ("defaults: [{override /prompts: csv}]\nprompt: a fox\nprompts: {path: p.csv}", "prompts.path"),
        ("defaults: [{override /prompts: emoji}]\nprompt: a fox", "prompts=emoji"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(cli, tmp_path: Path, text: str, which: str) -> None:
    code, _, err = cli(in_folder(tmp_path, mine=text), "+experiment=mine", "dry_run=true")
    assert code == 2
    assert err == (
        f"zimage_runner: experiment/mine.yaml: prompt and {which} are both set: use prompt for one prompt, or prompts "
        "for many\n"
    )


def test_each_job_of_a_sweep_over_options(cli, tmp_path: Path) -> None:
    code, out, err = cli(
        in_folder(tmp_path, mine=TEXTS), "-m", "+experiment=mine", "prompts=inline,emoji", "dry_run=true", "seeds=1"
    )
    assert code == 0, err
    assert [line.split()[1] for line in out.splitlines() if line.split()[:1] == ["items"]] == ["3", "32"]
    assert err.count("left out prompts.texts") == 1


def test_a_resumed_run_with_another_option(cli) -> None:
    fast = ["sampling.num_inference_steps=1", "prompt=a", "seeds=1", "output.fsync=never", "hydra.run.dir=run"]
    code, _, err = cli(*fast, "executor=process", "executor.max_restarts=1", "dry_run=false", "executor=inline")
    assert code != 0, "the same layer says both"
    code, _, err = cli(*fast, "memory=staged", "memory.health.interval_seconds=600")
    assert code == 0, err
    code, _, err = cli("resume=run", "memory=resident")
    assert code == 0, err
    told = "memory=resident replaces memory=staged: left out memory.health.interval_seconds of the earlier run"
    assert told in err.splitlines()
