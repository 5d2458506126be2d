"""A run directory that somebody else has filled: links are not followed, devices and FIFOs not opened."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.written_runs import noise_pictures, open_run, request
from zimage_runner.engines.base import ReadyImages
from zimage_runner.errors import UserError
from zimage_runner.logs import LOGGER, run_log
from zimage_runner.outputs import atomic, beneath
from zimage_runner.outputs.beneath import Inside, NotPlain
from zimage_runner.outputs.ledger import Entry, Ledger
from zimage_runner.outputs.run_dir import OWN_FILES, OWN_FOLDERS, RunDirectory
from zimage_runner.outputs.survey import Pictures

SECRET = b"a file of the user's\n"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file that no run may read, change or link."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "key").write_bytes(SECRET)
    return tmp_path / "outside" / "key"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


ODD: dict[str, Callable[[Path, Path], object]] = {
    "a link": lambda path, outside: path.symlink_to(outside),
    "a FIFO": lambda path, _: os.mkfifo(path),
    "a socket": lambda path, _: make_socket(path),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", [*OWN_FILES, *OWN_FOLDERS])
def test_a_run_directory_with_one_is_refused_in_one_line(run, outside, name, kind, monkeypatch):
    monkeypatch.chdir(run)  # a socket's path has 108 bytes at most
    ODD[kind](Path(name), outside if name in OWN_FILES else outside.parent)
    before = os.lstat(name)
    for way in (RunDirectory.create, RunDirectory.resume):
        with pytest.raises(UserError, match=f"{name} is {kind}: put a plain file or folder there, or remove it$"):
            way(run)
    assert os.path.samestat(before, os.lstat(name))
    assert outside.read_bytes() == SECRET
    assert os.listdir(outside.parent) == ["key"]


def test_a_lock_or_ledger_with_a_second_name_is_not_written(run, outside):
    for name in (".lock", "records.jsonl"):
        os.link(outside, run / name)
        with (
            pytest.raises((UserError, atomic.DiskError), match=f"{name} is a file with a second name"),
            RunDirectory.resume(run) as held,
        ):
            Ledger.load(held.records_path).open(held.dir_fd)
        (run / name).unlink()
    assert outside.read_bytes() == SECRET


def test_the_run_directorys_own_path_may_hold_links(tmp_path, run):
    (tmp_path / "outputs").symlink_to(tmp_path)
    with RunDirectory.create(tmp_path / "outputs" / "run") as held:
        held.write_file(".hydra/config.yaml", b"x")
    assert (run / ".hydra" / "config.yaml").read_bytes() == b"x"


@pytest.mark.parametrize("link", ["items/0000_a", "items/0000_a/seed_1"])
def test_a_picture_is_not_written_through_a_linked_folder(tmp_path, outside, link):
    with open_run(tmp_path / "run") as run:
        (tmp_path / "run" / link).parent.mkdir(parents=True)
        (tmp_path / "run" / link).symlink_to(outside.parent)
        run.writer.submit([request()], ReadyImages(noise_pictures()))
        run.writer.flush()
        assert [o.status for o in run.outcomes] == ["failed"]
        assert f"{link} is a link" in (run.outcomes[0].error or "")
    assert os.listdir(outside.parent) == ["key"]
    assert outside.read_bytes() == SECRET


@pytest.mark.parametrize("name", ["image.png", "image.png.tmp", "record.json", "record.json.tmp"])
def test_a_link_at_a_files_name_is_replaced_and_what_it_leads_to_left(tmp_path, outside, name):
    with open_run(tmp_path / "run") as run:
        folder = tmp_path / "run" / "items" / "0000_a" / "seed_1"
        folder.mkdir(parents=True)
        (folder / name).symlink_to(outside)
        run.writer.submit([request()], ReadyImages(noise_pictures()))
        run.writer.flush()
    assert sorted(os.listdir(folder)) == ["image.png", "record.json"]
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert outside.read_bytes() == SECRET


def test_a_leftover_with_a_second_name_is_not_written_into(run, outside):
    os.link(outside, run / "a.tmp")
    with atomic.directory(run) as fd:
        atomic.write_file(fd, "a", b"new")
    assert ((run / "a").read_bytes(), outside.read_bytes()) == (b"new", SECRET)


def test_no_folder_is_made_and_no_log_written_behind_a_link(run, outside):
    (run / "items").symlink_to(outside.parent)
    (run / "run.log").symlink_to(outside)
    with atomic.directory(run) as fd, pytest.raises(NotPlain, match="items is a link"):
        beneath.make_dirs(fd, "items/a/b")
    with run_log(run / "run.log"):
        LOGGER.info("a line")
    assert os.listdir(outside.parent) == ["key"]
    assert outside.read_bytes() == SECRET


@pytest.mark.parametrize("relative", ["key", "below/key", "below"])
def test_nothing_is_read_through_a_link(run, outside, relative):
    (run / "key").symlink_to(outside)
    (run / "below").symlink_to(outside.parent)
    with pytest.raises(NotPlain, match=rf"run/{relative.partition('/')[0]} is a link"):
        Inside(run, relative).read_bytes()
    assert not Inside(run, relative).is_file()


def test_a_fifo_holds_nobody_up(run):
    os.mkfifo(run / "records.jsonl")
    with pytest.raises(UserError, match="is a FIFO"):
        Ledger.load(run / "records.jsonl")


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("link", ["items", "items/a", "items/a/seed_1", "items/a/seed_1/image.png"])
def test_a_linked_picture_is_damaged(tmp_path, run, link, verify):
    real = tmp_path / "real" / "items" / "a" / "seed_1" / "image.png"
    real.parent.mkdir(parents=True)
    real.write_bytes(SECRET)
    (run / link).parent.mkdir(parents=True, exist_ok=True)
    (run / link).symlink_to(tmp_path / "real" / link)
    with atomic.directory(run) as fd:
        found = Pictures(fd).damage("items/a/seed_1", Entry(True, "", len(SECRET), ""), verify)
    assert found == f"{link} is a link"


OUT = ["", "..", "/etc", "items/../../x", "a//b", "./a", "a/.", "a\0b", "a\ud800"]


@pytest.mark.parametrize("relative", OUT)
def test_a_ledgers_path_never_leads_out(run, relative):
    with atomic.directory(run) as fd:
        for reach in (
            lambda: beneath.open_file(fd, relative),
            lambda: beneath.open_dir(fd, relative),
            lambda: beneath.make_dirs(fd, relative),
            lambda: beneath.Statuses(fd)(f"{relative}/image.png"),
        ):
            with pytest.raises(NotPlain, match="no path below the directory"):
                reach()


@given(st.lists(st.sampled_from(["a", "b", "c.png", "link", "..", ".", ""]), min_size=1, max_size=4))
def test_what_is_opened_lies_below(tmp_path_factory, parts):
    base = tmp_path_factory.getbasetemp() / "tree"
    if not base.exists():
        for folder in ("a/a", "a/b", "b"):
            (base / "in" / folder).mkdir(parents=True)
            (base / "in" / folder / "c.png").write_bytes(b"in")
        (base / "c.png").write_bytes(b"out")
        (base / "in" / "link").symlink_to(base)
        (base / "in" / "a" / "link").symlink_to("../b")
    relative = "/".join(parts)
    with atomic.directory(base / "in") as fd:
        try:
            opened = os.fdopen(beneath.open_file(fd, relative), "rb")
        except OSError:
            assert "link" in parts or not (base / "in" / relative).is_file() or {"", ".", ".."} & set(parts)
            return
        with opened:
            assert opened.read() == b"in"
            assert "link" not in parts


def test_folders_are_judged_again_after_many(run, monkeypatch):
    monkeypatch.setattr(beneath, "_KEPT_PARENTS", 2)
    for n in range(9):
        (run / "items" / str(n) / "seed").mkdir(parents=True)
        (run / "items" / str(n) / "seed" / "x").write_bytes(b"1" * n)
    with atomic.directory(run) as fd:
        status = beneath.Statuses(fd)
        assert [status(f"items/{n}/seed/x").st_size for n in range(9)] == list(range(9))


def test_own_temporary_names_touch_no_file_of_the_users(tmp_path):
    (tmp_path / "cat.png.tmp").write_bytes(SECRET)
    atomic.replace_file(tmp_path / "cat.png", b"picture")
    assert (tmp_path / "cat.png.tmp").read_bytes() == SECRET
    assert sorted(os.listdir(tmp_path)) == ["cat.png", "cat.png.tmp"]


@pytest.mark.parametrize("kind", ODD)
def test_only_plain_files_are_replaced(tmp_path, outside, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ODD[kind](Path("x"), outside)
    before = os.lstat("x")
    with pytest.raises(NotPlain, match=f"x is {kind}"):
        atomic.replace_file(tmp_path / "x", b"picture")
    assert os.path.samestat(before, os.lstat("x"))
    assert outside.read_bytes() == SECRET
