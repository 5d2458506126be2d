"""A worker as its parent sees it, at the moments that a whole run meets only by chance."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from multiprocessing.connection import Connection

import pytest

from zimage_runner.executors import child as child_module
from zimage_runner.executors.child import Child, WorkerBroken, WorkerDied
from zimage_runner.executors.messages import Broken, LogLine, Started


@pytest.fixture
def gone() -> tuple[Child, Connection]:
    """A worker whose process has ended, and its end of the connection."""
    child = Child.__new__(Child)
    child._connection, theirs = multiprocessing.Pipe()
    child._process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"], process_group=0)
    child._process.wait()
    child._pidfd = -1
    return child, theirs


def test_why_it_ended_is_known_even_if_it_is_noticed_while_sending(gone):
    child, theirs = gone
    theirs.send(LogLine(20, "worker", "about to fail"))
    theirs.send(Broken("an illegal memory access was encountered"))
    theirs.close()
    child.send("the next item")
    with pytest.raises(WorkerBroken, match="ended: an illegal memory access"):
        child.receive(10, 10)


def test_without_last_words_it_is_the_exit_code(gone):
    child, theirs = gone
    theirs.close()
    child.send("the next item")
    with pytest.raises(WorkerDied, match="ended with exit code 1"):
        child.receive(10, 10)


@pytest.mark.parametrize("noticed", ["while sending", "by its process"])
def test_what_it_said_before_its_end_is_heard(gone, noticed, monkeypatch):
    """What it had begun is what it died of: an item that only waited is not to blame."""
    child, theirs = gone
    theirs.send(Started(7))
    theirs.close()
    if noticed == "by its process":
        monkeypatch.setattr(child_module, "wait", lambda watched, seconds: [child._pidfd])
    child.send("the next item")
    assert child.receive(10, 10) == Started(7)
    with pytest.raises(WorkerDied, match="ended with exit code 1"):
        child.receive(10, 10)


def test_modules_of_the_current_folder_are_not_the_workers(tmp_path, monkeypatch):
    """A16: a json.py beside the prompts was imported instead of Python's own."""
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the current folder')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    child = Child()
    child._connection.close()
    assert child._process.wait(30) == 0
    child.kill()
