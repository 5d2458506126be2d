"""One command for all: the first word says what is done, the bare form draws."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zimage_runner import __main__ as program
from zimage_runner.cli.commands import COMMANDS, DRAWING, MODULES, RUN, command_of
from zimage_runner.errors import RunStopped, UserError, called
from zimage_runner.logs import command
from zimage_runner.outputs.beneath import NotPlain


@pytest.mark.parametrize("command", MODULES)
def test_a_command_gets_its_words_and_gives_its_code(command, monkeypatch):
    got = []
    monkeypatch.setattr(import_module(MODULES[command]), "main", lambda argv: got.append(list(argv)) or 7)
    monkeypatch.setattr("zimage_runner.startup.process.begin", lambda: got.append("begun"))
    assert program._run([command, "a", "into=b", "--open"]) == 7
    assert got == [*(["begun"] if command in DRAWING else []), ["a", "into=b", "--open"]]


@pytest.mark.parametrize("words", [["x=1", "+experiment=y"], [], ["-m", "x=1,2"]])
def test_run_is_the_bare_form(words, monkeypatch):
    drawn = []
    monkeypatch.setattr("zimage_runner.startup.process.begin", lambda: False)
    monkeypatch.setattr("zimage_runner.cli.main.main", lambda argv: drawn.append(list(argv)) or 0)
    assert program._run(words) == program._run([RUN, *words]) == 0
    assert drawn == [words, words]


@given(st.lists(st.sampled_from([*COMMANDS, "--help", "-h", "a=b", "+x=y", "-m", "cat", "prompts"])))
def test_only_the_first_word_is_a_command(words: list[str]):
    command, own = command_of(words)
    if words and words[0] in COMMANDS:
        assert (command, own) == (words[0], words[1:])
    elif command != RUN:
        assert words == [own[0], command]
        assert own in (["--help"], ["-h"])
    else:
        assert own == words


@pytest.mark.parametrize("command", MODULES)
def test_each_explains_itself(command, capsys):
    told = []
    for words in ([command, "--help"], ["--help", command], ["-h", command]):
        assert program._run(words) == 0
        told.append(capsys.readouterr().out)
    assert told == [told[0]] * 3
    assert f"python -m zimage_runner {command} " in told[0]


def test_help_names_the_commands_and_run_is_still_a_group(capsys):
    assert program._run([RUN, "--help"]) == program._run(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, description in COMMANDS.items():
        assert lines.count(f"  {name:<22} {description}") == 2
    assert program._run(["--help", RUN]) == 0
    assert capsys.readouterr().out.startswith("Fields of a run")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["colect"], "colect: no such command; did you mean python -m zimage_runner collect? Commands: run, collect,"),
        (["veiw", "port=0"], "veiw: no such command; did you mean python -m zimage_runner view?"),
        (["cat"], "cat: write field=value; for the text of a picture prompt='...', or see --help; commands: run, "),
        (["model=zimage_nano", "collect"], "collect: a command is the first word: python -m zimage_runner collect ..."),
        (["run", "a cat"], "a cat: write field=value; for the text of a picture prompt='...', or see --help\n"),
        (["model"], "model: write field=value, here model=..."),
        (["quickstart"], "quickstart: write +experiment=quickstart"),
        (["collect", "intoo=x"], "intoo=x: no such field; fields here: into, "),
    ],
)
def test_another_word_is_answered_in_one_line(words, said, capsys, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("zimage_runner.startup.process.begin", lambda: False)
    assert program._run(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"zimage_runner: {said}")


@pytest.mark.parametrize(
    ("program_name", "text"),
    [
        ("/usr/bin/zimage-runner", "zimage-runner view"),
        ("/x/zimage_runner/__main__.py", "python -m zimage_runner view"),
        ("", "python -m zimage_runner view"),
    ],
)
def test_hints_name_the_program_as_it_was_called(program_name, text, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program_name])
    assert called("python -m zimage_runner view") == text


def test_a_command_is_interrupted_in_its_own_way(monkeypatch):
    found = {}
    numbers = (signal.SIGINT, signal.SIGTERM)
    monkeypatch.setattr(
        import_module(MODULES["collect"]),
        "main",
        lambda argv: found.update({number: signal.getsignal(number) for number in numbers}) or 0,
    )
    before = {number: signal.getsignal(number) for number in program.SIGNALS}
    try:
        for number in program.SIGNALS:
            signal.signal(number, program._stop)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert program._run(["collect"]) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert found == {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_IGN}


@pytest.mark.parametrize("name", ["vary", "collect"])
def test_ctrl_c_before_a_command_listens_is_no_traceback(name: str, monkeypatch) -> None:
    def interrupted(argv: Sequence[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module(MODULES[name]), "main", interrupted)
    monkeypatch.setattr("zimage_runner.startup.process.begin", lambda: None)
    assert program._run([name, "outputs"]) == 130


def test_a_command_imports_neither_hydra_nor_torch_to_be_found():
    code = (
        "import sys\n"
        "from zimage_runner.__main__ import _run\n"
        "assert _run(['view', '/no/such/folder']) == 2\n"
        "assert not {'torch', 'hydra', 'omegaconf', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (UserError("no such run"), 2, "zimage_runner: no such run\n"),
        (RunStopped("a.safetensors has changed"), 2, "zimage_runner: a.safetensors has changed\n"),
        (PermissionError(13, "Permission denied", "a.png"), 2, "zimage_runner: a.png: Permission denied\n"),
        (NotPlain("a.png", "a link"), 2, "zimage_runner: a.png is a link: put a plain file or folder there, "),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_ends_a_command_is_told_in_one_line(capsys, error: BaseException, code: int, told: str) -> None:
    def do(words: Sequence[str]) -> int:
        raise error

    assert command(["word"], "doc", do) == code
    assert (err := capsys.readouterr().err).startswith(told)
    assert len(err.splitlines()) == (1 if told else 0)


@pytest.mark.parametrize(
    "words",
    [
        ["collect", "~no_such_user/a", "into=b"],
        ["compare", "~no_such_user/a", "b"],
        ["vary", "~no_such_user/a.png"],
        ["prepare", "info", "~no_such_user/a"],
        ["resume=~no_such_user/a"],
    ],
)
def test_the_home_of_nobody_is_told_in_one_line(words: list[str], capsys, monkeypatch) -> None:
    monkeypatch.setattr("zimage_runner.startup.process.begin", lambda: False)
    assert program.whatever_happens(words) == 2
    told = "zimage_runner: a path begins with ~, and there is no such home directory: write the whole path"
    assert (err := capsys.readouterr().err).startswith(told)
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("words", [["collect", "latest", "into=x"], ["resume=latest"], ["prompt=a cat"], ["compare"]])
def test_a_current_folder_that_is_gone_is_told(words: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert program._run(words) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "zimage_runner: the current folder has been deleted: cd to another one, or make it again "
                          "and cd to it\n")  # fmt: skip


def test_a_command_without_words_says_how_it_is_used_unless_they_are_left_out_often(capsys) -> None:
    assert (command([], "how", len), command(["-h"], "how", len), command([], "how", len, bare=True)) == (2, 0, 0)
    assert capsys.readouterr().out == "how\nhow\n"
