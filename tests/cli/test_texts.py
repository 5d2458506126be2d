"""A field that holds text keeps what was typed, on the command line and in YAML; paths mean one thing everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from zimage_runner.cli.fields import texts
from zimage_runner.cli.quoting import quote_free_text
from zimage_runner.cli.typed_texts import keep_texts
from zimage_runner.errors import UserError

LOOK_LIKE_OTHERS = ["2024_01_05", "1_1_1", "1e3", "3.10", "true", "on", "12345e67", "1_0", "007", "0x1F", "12:30",
                    "NULL", "-1", "+5", ".5", "1.", "nan", "inf", "0o17", "0b1", "Yes", "~x", "2024-01-05",
                    "a b"]  # fmt: skip
"""What YAML 1.1 or Hydra takes for a number, a time or a truth value."""
TEXT_FIELDS = sorted(name for name, kind in texts().items() if kind == "text")


def test_the_fields_that_hold_text() -> None:
    assert {"name", "prompt", "output.root", "model.revision", "model.cache_dir", "sampling.negative_prompt"} <= {
        *TEXT_FIELDS
    }
    assert texts()["prompts.texts"] == texts()["prompts.metadata"] == "list"
    assert texts()["prompts.columns"] == "dict"
    assert not {"seeds", "sampling.width"} & set(texts())


def read(word: str, *before: str) -> Any:
    override = OverridesParser.create().parse_override(quote_free_text([*before, word])[-1])
    if override.is_sweep_override():
        return [read(f"{override.key_or_group}={value}") for value in override.sweep_string_iterator()]
    return OmegaConf.create({"v": override.value()}).v


@pytest.mark.parametrize("field", TEXT_FIELDS)
def test_typed_on_the_command_line(field: str) -> None:
    for text in LOOK_LIKE_OTHERS:
        assert read(f"{field}={text}") == text
    assert read(f"{field}=null") is None


def test_typed_in_a_sweep() -> None:
    assert read("name=1_1,1e3, a", "-m") == ["1_1", "1e3", "a"]
    assert read("model.revision=007,true", "-m") == ["007", "true"]
    assert read("seeds=1,2", "-m") == [1, 2]


@given(st.text(st.sampled_from("0123456789_.:-+eExXoObBnNaAyYsStTrRuU~"), min_size=1, max_size=10))
def test_any_word_in_yaml(word: str) -> None:
    text = f"prompts:\n  texts: [{word}, a]\nname: {word}\n"
    try:
        was = yaml.load(text, Loader=yaml.BaseLoader)["name"]
        config: Any = OmegaConf.create(text)
    except (yaml.YAMLError, ValueError):
        return
    if config.name is None or not isinstance(was, str):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda self: text.encode())
        keep_texts(config, "", Path("x.yaml"), "x.yaml")
    assert (config.name, config.prompts.texts[0]) == (was, was)


YAML = """\
# @package _global_
name: 1_1_1
prompts: {texts: [on, 12:30, 007, 1.10, 0x1F]}
sampling: {negative_prompt: 1_000, guidance_scale: 2.50}
model: {revision: 12345e67}
output: {root: 2024_01_05}
"""


def mine(tmp_path: Path, text: str, name: str = "experiment/mine") -> str:
    (path := tmp_path / "conf" / f"{name}.yaml").parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return "--config-dir=conf"


def test_texts_of_a_file(cli, tmp_path: Path) -> None:
    code, out, err = cli(mine(tmp_path, YAML), "+experiment=mine", "--cfg", "job")
    assert code == 0, err
    config = yaml.load(out, Loader=yaml.BaseLoader)
    assert config["prompts"]["texts"] == ["on", "12:30", "007", "1.10", "0x1F"]
    assert (config["name"], config["model"]["revision"]) == ("1_1_1", "12345e67")
    assert (config["sampling"]["negative_prompt"], config["output"]["root"]) == ("1_000", "2024_01_05")
    assert float(config["sampling"]["guidance_scale"]) == 2.5


def test_texts_of_an_option_of_ones_own(cli, tmp_path: Path) -> None:
    text = "defaults: [csv]\npath: 2024_01_05\ncolumns: {text: 1_0, id: on}\n"
    code, out, err = cli(mine(tmp_path, text, "prompts/mine"), "prompts=mine", "--cfg", "job")
    assert code == 0, err
    prompts = yaml.load(out, Loader=yaml.BaseLoader)["prompts"]
    assert (prompts["path"], prompts["columns"]) == ("2024_01_05", {"text": "1_0", "id": "on"})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x: &x {name: 1_0}\n<<: *x\n", "name=10: this is a text: put it in quotation marks"),
        ("prompt: ???\n", "prompt: ??? alone stands for a value that is missing: write other words"),
        ("prompts:\n  texts: [a, '???']\n",
         "prompts.texts[1]: ??? alone stands for a value that is missing: write other words"),
    ],
)  # fmt: skip
def test_texts_of_a_file_that_cannot_be_kept(cli, tmp_path: Path, text: str, told: str) -> None:
    code, _, err = cli(mine(tmp_path, f"# @package _global_\n{text}"), "+experiment=mine", "dry_run=true")
    assert code == 2
    assert err == f"zimage_runner: experiment/mine.yaml: {told}\n"


@pytest.mark.parametrize("word", ["prompt=???", 'prompt="???"', "prompts.texts=[a,???]", "name=???"])
def test_three_question_marks_are_refused(word: str) -> None:
    with pytest.raises(UserError, match=r"\?\?\? alone stands for a value that is missing: write other words"):
        quote_free_text([word])


FAST = ["prompt=a", "sampling.num_inference_steps=1", "output.fsync=never", "seeds=1"]


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("output.root=~/out", "output.root=~/out: ~ has no meaning here, because HOME is not set: write the"),
        ("output_file=~/a.png", "output_file=~/a.png: ~ has no meaning here, because HOME is not set"),
        ("model.cache_dir=~/c", "model.cache_dir=~/c: ~ has no meaning here, because HOME is not set"),
        ("hydra.run.dir=~/r", "hydra.run.dir=~/r: ~ has no meaning here, because HOME is not set"),
        ("hydra.job.chdir=true", "hydra.job.chdir=true: relative paths are read from where the program was started"),
    ],
)  # fmt: skip
def test_paths_that_would_mean_something_else(cli, tmp_path, monkeypatch: pytest.MonkeyPatch, word, told) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    code, _, err = cli(*FAST, word)
    assert (code, err.count("\n")) == (2, 1), err
    assert told in err
    assert list(tmp_path.iterdir()) == []


def test_a_home_for_hydras_own_directories(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    code, out, err = cli(*FAST, "hydra.run.dir=~/run")
    assert code == 0, err
    assert Path(out.strip()) == tmp_path / "home" / "run"


@pytest.mark.parametrize("value", ["pics_(1)", "a (copy)", "x[1]", "day=1", "choice_(a)", "choices(1)"])
def test_brackets_are_part_of_a_text(cli, value: str) -> None:
    """Hydra would read a function, and answers with its grammar."""
    for words in ([], ["-m"]):
        code, out, err = cli(*words, "prompt=a", f"output.root={value}", "dry_run=true")
        assert code == 0, err
        assert f"in {value}, " in out


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (["prompt=a cat,a dog"], """prompt='"a cat","a dog"'"""),
        (["prompt=x", "sampling.negative_prompt=red,blue"], """sampling.negative_prompt='"red","blue"'"""),
        (["prompt=a cat, on 1,000 roofs"], None),
        (["prompt='a,b'"], None),
        (["""prompt="a cat","a dog\""""], None),
    ],
)
def test_quotation_marks_that_the_shell_has_removed(cli, words: list[str], written: str | None) -> None:
    _, _, err = cli("-m", *words, "sampling.guidance_scale=1", "dry_run=true")
    hint = [line for line in err.splitlines() if "for a job of each write" in line]
    assert [line.rpartition(" write ")[2] for line in hint] == ([written] if written else [])
    _, _, err = cli(*words, "sampling.guidance_scale=1", "dry_run=true")
    assert "for a job of each" not in err


def test_a_prompt_that_is_a_files_name_is_told(cli, tmp_path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n")
    _, _, err = cli("prompt=p.txt", "dry_run=true")
    assert err == (
        "zimage_runner: prompt=p.txt is drawn as text; for what is in the file write prompts=text_file "
        "prompts.path=p.txt\n"
    )
    assert cli("prompt=a sign that says q.txt", "dry_run=true")[2] == ""
