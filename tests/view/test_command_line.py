"""The command line of the gallery: what it understands, and one line for what it does not."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.support.made_runs import MadeRun
from zimage_runner.view.__main__ import main, parse


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["prot=80"], "prot=80: no such field; fields here: port, host, token, cache_gb"),
        (["--opne"], "--opne: no such option; there are --open"),
        (["port=x"], "port=x: write a number from 0 to 65535"),
        (["port=99999"], "port=99999: write a number from 0 to 65535"),
        (["cache_gb=nan"], "cache_gb=nan: write a number of GB, such as 2"),
        (["token=short"], "token=short: use 12 to 200 letters, digits, - and _"),
        (["nowhere"], "nowhere is no folder: name the one that holds runs"),
        (["a", "b"], "a b: name one folder"),
        (["host=no.such.host.invalid"], "host=no.such.host.invalid: there is no such address"),
    ],
)
def test_bad_words(
    words: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "outputs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"zimage_runner: {text}")
    assert err.count("\n") == 1


def test_help_names_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("port", "host", "token", "cache_gb", "--open", "stars.json"))


def test_others_need_a_token(tmp_path: Path) -> None:
    assert parse([str(tmp_path)]).token is None
    assert parse([str(tmp_path), "host=::1"]).token is None
    made_up = parse([str(tmp_path), "host=0.0.0.0"]).token
    assert made_up is not None
    assert len(made_up) >= 20
    assert parse([str(tmp_path), "host=0.0.0.0", "token=abcdefgh-1234"]).token == "abcdefgh-1234"


def test_a_taken_port(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main([str(tmp_path), f"port={port}"]) == 2
    assert f"port={port}: Address already in use: choose another port, or port=0" in capfd.readouterr().err


def test_it_serves_and_ends(tmp_path: Path) -> None:
    MadeRun(tmp_path / "runs/one", ["a cat"], [1]).add_all()
    command = [sys.executable, "-m", "zimage_runner.view", "runs", "port=0"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            with urllib.request.urlopen(address, timeout=20) as answer:
                assert b"zimage gallery" in answer.read()
            with urllib.request.urlopen(f"{address}api/events", timeout=20) as events:  # as a page that is open has it
                assert events.readline().startswith(b"data: ")
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (0, "", "")
