"""Code is read only from folders that nobody but the user and root can have changed, along the whole path."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from zimage_runner.weights.cache import make_trusted_folder, trusted_folder

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
SOMEBODY = 12345


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``a/b/c``, this user's alone."""
    path = tmp_path / "a" / "b" / "c"
    assert make_trusted_folder(path)
    return path


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757, 0o720])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_not_where_others_may_write(folder: Path, level: int, mode: int) -> None:
    [folder, *folder.parents][level].chmod(mode)
    assert not trusted_folder(folder)
    assert not make_trusted_folder(folder)


def test_a_sticky_folder_will_do_on_the_way_only(folder: Path) -> None:
    folder.parent.chmod(0o1777)
    assert trusted_folder(folder)
    assert not trusted_folder(folder.parent)


@as_root
@pytest.mark.parametrize("level", [0, 1, 2])
def test_not_where_anything_on_the_way_is_somebody_elses(folder: Path, level: int) -> None:
    os.chown([folder, *folder.parents][level], SOMEBODY, SOMEBODY)
    assert not trusted_folder(folder)


def test_the_users_own_links_are_followed_and_judged(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "absolute").symlink_to(folder.parent)
    (tmp_path / "a" / "relative").symlink_to("../absolute/c")
    assert trusted_folder(tmp_path / "absolute" / "c")
    assert trusted_folder(tmp_path / "a" / "relative")
    folder.parent.chmod(0o777)
    assert not trusted_folder(tmp_path / "absolute" / "c")
    assert not trusted_folder(tmp_path / "a" / "relative")


@as_root
def test_somebody_elses_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    os.chown(link, SOMEBODY, SOMEBODY, follow_symlinks=False)
    assert not trusted_folder(link)


def test_neither_a_file_nor_nothing_nor_a_circle(folder: Path) -> None:
    (folder / "file").write_text("", encoding="utf-8")
    (folder / "circle").symlink_to("circle")
    for name in ("file", "nothing", "circle", "circle/x", "file/x"):
        assert not trusted_folder(folder / name), name
    assert not make_trusted_folder(folder / "file" / "x")


def test_no_descriptor_stays_open(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    trusted_folder(folder)
    trusted_folder(folder / "nothing")
    assert len(os.listdir("/proc/self/fd")) == before
