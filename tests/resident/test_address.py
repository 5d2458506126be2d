"""The socket: who may use it, and what is said through it."""

from __future__ import annotations

import importlib
import os
import socket
import sys
import threading
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest

from zimage_runner.errors import UserError
from zimage_runner.executors.handing import is_asked_for
from zimage_runner.resident import address, client, likeness
from zimage_runner.resident.address import Folder, name_here
from zimage_runner.resident.caller import Caller, _forget_modules
from zimage_runner.resident.messages import (
    LARGEST,
    LENGTH_BYTES,
    Closed,
    close_all,
    receive,
    receive_with_descriptors,
    send,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZIMAGE_RUNNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / f"resident-{os.getuid()}"


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair()
    with here, there:
        there.settimeout(10)
        yield here, there


def test_the_folder_is_this_users_alone(cache: Path) -> None:
    folder = Folder()
    assert cache.stat().st_mode & 0o777 == 0o700
    assert folder.connect("nobody.sock") is None
    folder.close()


def other_mode(cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o711)


def a_link(cache: Path) -> None:
    cache.parent.mkdir()
    (cache.parent / "elsewhere").mkdir(mode=0o700)
    cache.symlink_to(cache.parent / "elsewhere")


def a_file(cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("", encoding="utf-8")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (other_mode, "others may enter it (mode 711, not 700)"),
        (a_link, "Not a directory"),
        (a_file, "File exists"),
    ],
)
def test_another_folder_is_refused_in_one_line(cache: Path, capsys: pytest.CaptureFixture[str], make, why: str) -> None:
    make(cache)
    assert client.hand_over(["executor=resident"]) == 2
    assert capsys.readouterr().err == (
        f"zimage_runner: executor=resident needs a folder of its own for its socket, {cache}: {why}: set "
        "ZIMAGE_RUNNER_CACHE to a folder that only you can write to, or use executor=inline\n"
    )


def test_a_folder_or_a_listener_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder()
    listener = folder.listen("x.sock")
    monkeypatch.setattr(address, "peer_of", lambda connection: (1, os.geteuid() + 1))
    with pytest.raises(UserError, match="another user listens there"):
        folder.connect("x.sock")
    listener.close()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(UserError, match="it belongs to another user"):
        Folder()


def test_one_process_has_an_address_at_a_time() -> None:
    folder = Folder()
    lock = folder.lock("x.sock")
    assert lock is not None
    assert folder.lock("x.sock") is None
    os.close(lock)
    again = folder.lock("x.sock")
    assert again is not None
    os.close(again)


def test_each_choice_of_gpus_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    first = name_here()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert name_here() != first


def test_a_message_arrives_with_its_descriptors(pair, tmp_path: Path) -> None:
    here, there = pair
    message = {"words": ["一只猫", "\udcff", "x" * 300_000]}
    with (tmp_path / "file").open("wb") as file:
        sender = threading.Thread(target=send, args=(here, message, (file.fileno(),)))
        sender.start()
        received, descriptors = receive_with_descriptors(there)
        sender.join()
    assert received == message
    os.write(descriptors[0], b"written")
    close_all(descriptors)
    assert (tmp_path / "file").read_bytes() == b"written"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        (LARGEST + 1).to_bytes(LENGTH_BYTES, "little"),
        b"\x02\0\0\0[]",
        b"\x02\0\0\0{x",
        b"\x10\0\0\0{}",
        (200_000).to_bytes(LENGTH_BYTES, "little") + b"[" * 200_000,
    ],
)
def test_what_is_no_message_ends_the_connection(pair, data: bytes) -> None:
    here, there = pair
    sender = threading.Thread(target=lambda: (here.sendall(data), here.shutdown(socket.SHUT_WR)))
    sender.start()
    with pytest.raises(Closed):
        receive(there)
    sender.join()


def test_too_much_is_not_sent(pair) -> None:
    with pytest.raises(ValueError, match="larger than"):
        send(pair[0], {"words": ["x" * LARGEST]})


@pytest.mark.parametrize("change", [{"words": None}, {"streams": []}, {"environment": [1]}, {"umask": "x"}])
def test_a_run_that_is_not_whole_is_refused(change: dict) -> None:
    whole = {
        "words": [], "program": "x", "environment": {}, "umask": 0, "module_folder": None, "ignored": [],
        "streams": [["utf-8", "strict"]] * 3, "started": None, "repeats": False,
    }  # fmt: skip
    assert Caller.of(whole, [0, 1, 2, 3]).words == []
    with pytest.raises(Closed):
        Caller.of(whole | change, [0, 1, 2, 3])
    with pytest.raises(Closed):
        Caller.of(whole, [0, 1])


def test_what_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM_PROGRAM", "one")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    mine = likeness.of_this_process()
    monkeypatch.setenv("TERM_PROGRAM", "another")
    assert likeness.differences(mine, likeness.of_this_process()) == []
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("HF_HOME", "/somewhere")
    assert likeness.differences(mine, likeness.of_this_process()) == ["$HF_HOME", "$OMP_NUM_THREADS"]
    assert likeness.differences(mine, {**mine, "version": "0"}) == ["version"]


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["executor=resident"], True),
        (["executor=inline", "executor=resident"], True),
        (["executor=resident", "executor=inline"], False),
        (["executor=resident,inline", "-m"], False),
        (["executor=resident", "dry_run=true"], False),
        (["executor=resident", "dry_run=false"], True),
        (["executor=resident", "--cfg", "job"], False),
        (["prompt=executor=resident"], False),
    ],
)
def test_who_asks_for_it(words: list[str], asked: bool) -> None:
    assert is_asked_for(words) is asked


def test_modules_of_the_callers_folder_are_forgotten_and_libraries_below_it_are_not(tmp_path, monkeypatch):
    """A virtual environment is often below the folder that commands are given in."""
    for file in ("mine.py", "ours/__init__.py", "ours/part.py", "venv/library.py", "built/__init__.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("", encoding="utf-8")
    before = set(sys.modules)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path / "venv"))
        patch.syspath_prepend(str(tmp_path))
        names = ("mine", "ours", "ours.part", "library", "built")
        for name in names:
            importlib.import_module(name)
        patch.setitem(
            sys.modules, "built._c", SimpleNamespace(__spec__=ModuleSpec("built._c", None, origin="_c.abi3.so"))
        )
        patch.setattr(sys, "path", [path for path in sys.path if not path.startswith(str(tmp_path))])
        _forget_modules(str(tmp_path), before)
        assert [name for name in (*names, "built._c") if name in sys.modules] == ["library", "built", "built._c"]
    for name in ("library", "built"):
        del sys.modules[name]
