"""log.format=json: each line of run.log and of stderr is an object for programs; stdout stays as it is."""

from __future__ import annotations

import io
import json
import sys
from datetime import datetime
from pathlib import Path

import pytest

from tests.support.faulty_session import FaultySession
from zimage_runner import logs, signals
from zimage_runner.runner import pool

JSON = "log.format=json"
WORDS = ("prompt=a cat", "seeds=0-3", "warmup=none", "output.min_free_gb=0")


@pytest.fixture(autouse=True)
def instant(monkeypatch: pytest.MonkeyPatch):
    """Sessions that draw at once; the format is the process's own."""
    monkeypatch.setattr(pool, "Session", FaultySession)
    monkeypatch.setenv("FAULTS", "[]")
    yield
    logs.use_format(logs.LogFormat.text)


def lines(text: str) -> list[dict]:
    found = [json.loads(line) for line in text.splitlines()]
    assert all(list(line)[:4] == ["time", "level", "message", "run"] for line in found)
    assert all(datetime.fromisoformat(line["time"]).tzinfo is not None for line in found)
    return found


def test_a_run_and_its_end(cli) -> None:
    code, out, err = cli(*WORDS, JSON)
    assert code == 0, err
    run = Path(out.strip())
    told = lines(err)
    assert told
    assert {line["run"] for line in told} == {str(run)}
    assert "4 done" in told[-1]["message"]
    logged = lines((run / "run.log").read_text(encoding="utf-8"))
    assert {line["run"] for line in logged} == {str(run)}
    assert {line["level"] for line in logged} == {"info"}
    code, _, err = cli(f"resume={run}")
    assert (code, [line["message"] for line in lines(err)]) == (0, ["nothing to draw: 4 pictures are done"])
    code, _, err = cli(f"resume={run}", "log.format=text")
    assert (code, err) == (0, "nothing to draw: 4 pictures are done\n")


def test_a_failed_picture(cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fault = {"kind": "raise", "on": 2, "times": 9}
    monkeypatch.setenv("FAULTS", json.dumps([fault]))
    monkeypatch.setenv("FAULTS_DIR", str(tmp_path))
    code, out, err = cli(*WORDS, JSON)
    assert code == 1, err
    logged = (Path(out.strip()) / "run.log").read_text(encoding="utf-8")
    for text in (err, logged):
        assert "failed: items/00000_a_cat/seed_2: ValueError: this item" in lines(text)[-1]["message"]


def test_an_error_of_the_program_comes_with_its_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logs.log_to_terminal()
    logs.use_format(logs.LogFormat.json)
    with logs.run_log(tmp_path / "run.log"):
        try:
            _ = 1 // 0
        except ZeroDivisionError:
            logs.LOGGER.exception("it broke")
    for text in (capfd.readouterr().err, (tmp_path / "run.log").read_text(encoding="utf-8")):
        (line,) = lines(text)
        assert (line["level"], line["message"], line["run"]) == ("error", "it broke", str(tmp_path))
        assert line["traceback"].endswith("ZeroDivisionError: integer division or modulo by zero")


@pytest.mark.parametrize("word", ["sampling.steps=4", "sampling.height=100", "model=no_such", "--steps=4"])
def test_a_refusal_is_one_line_too(cli, word: str) -> None:
    code, out, err = cli("prompt=a cat", word, JSON)
    assert (code, out) == (2, "")
    (line,) = lines(err)
    assert (line["level"], line["run"]) == ("error", None)
    assert word.lstrip("-").partition("=")[0] in line["message"]
    code, _, err = cli("prompt=a cat", word)
    assert err == f"zimage_runner: {line['message']}\n"


def test_an_experiment_may_say_so(cli, tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "quiet.yaml").write_text("# @package _global_\nlog: {format: json}\n", encoding="utf-8")
    code, _, err = cli("--config-dir=mine", "+experiment=quiet", *WORDS)
    assert code == 0
    assert lines(err)


def test_another_format_is_refused(cli) -> None:
    code, _, err = cli(*WORDS, "log.format=yaml")
    assert code == 2
    assert err.startswith("zimage_runner: log.format=yaml: ")
    assert "text, json" in err


def test_letters_that_the_terminal_lacks_stay_json(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(raw := io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stderr", terminal)
    logs.use_format(logs.LogFormat.json)
    text = "é 一只猫 🐈 \x1b[31m\x9b\u202e"
    logs.say(text)
    logs.log_to_terminal()
    logs.LOGGER.warning("%s", text)
    terminal.flush()
    written = raw.getvalue().decode("latin-1")
    assert [line["message"] for line in lines(written)] == [text, text]
    assert "é" in written
    assert not {"\x1b", "\x9b"} & set(written)


def test_signals_too(capfd: pytest.CaptureFixture[str]) -> None:
    logs.use_format(logs.LogFormat.json)
    signals._say("SIGTERM: finishing the pictures in flight")
    (line,) = lines(capfd.readouterr().err)
    assert (line["level"], line["message"]) == ("warning", "SIGTERM: finishing the pictures in flight")
