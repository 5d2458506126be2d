"""A power cut at any point: a recorder of what a run asks of the file system, and the disks that may be left of it.

The recorder stands between the runner and ``os``. The model of the disk is the weakest that POSIX allows: what was
written to a file, and each name put into a folder or taken out of it, may or may not have arrived, in any combination,
until fsync was called for that file or that folder.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(eq=False)
class Node:
    """A file or a folder."""

    is_folder: bool
    names: dict[str, Node] = field(default_factory=dict)
    data: bytes = b""


@dataclass(frozen=True)
class Op:
    """One change. ``on`` is the folder whose names change, or the file whose bytes do; None for fsync's own line."""

    kind: str
    on: Node
    names: tuple[tuple[str, Node | None], ...] = ()
    """For a folder: each name and what it leads to now, None for nothing."""
    data: bytes = b""
    """For a file: the bytes that were added, or all bytes where it was cut."""


class Recorder:
    """What happens below ``root`` while the block of ``recording`` runs, in order."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.top = Node(True)
        self.ops: list[Op] = []
        self._fds: dict[int, Node] = {}
        self._lock = threading.RLock()
        self._take_over(root, self.top)
        self.first = len(self.ops)
        """Where the recording begins: what was there before is sure."""

    def _take_over(self, folder: Path, node: Node) -> None:
        for there in sorted(folder.iterdir()):
            below = Node(there.is_dir())
            self._set("mkdir" if below.is_folder else "create", node, (there.name, below))
            if below.is_folder:
                self._take_over(there, below)
            else:
                below.data = there.read_bytes()
                self.ops += [Op("write", below, data=below.data), Op("fsync", below)]
        self.ops.append(Op("fsync", node))

    @contextlib.contextmanager
    def recording(self, monkeypatch: Any) -> Iterator[None]:
        with monkeypatch.context() as patch:
            for name in ("open", "dup", "write", "fsync", "ftruncate", "rename", "replace", "link", "unlink", "mkdir"):
                patch.setattr(os, name, self._one_at_a_time(getattr(self, f"_{name}")(getattr(os, name))))
            yield

    def _one_at_a_time(self, call: Any) -> Any:
        def locked(*args: Any, **options: Any) -> Any:
            with self._lock:
                return call(*args, **options)

        return locked

    def _place(self, path: Any, dir_fd: int | None) -> tuple[Node, str] | None:
        """The folder and name that a path means; None for what is not below the root."""
        parts = list(Path(os.fsdecode(path)).parts)
        if dir_fd is not None:
            node = self._fds.get(dir_fd)
        else:
            absolute = Path(os.path.abspath(os.fsdecode(path)))
            node, parts = self.top, list(absolute.relative_to(self.root).parts) if self._is_inside(absolute) else []
        for part in parts[:-1]:
            node = node and node.names.get(part)
        return (node, parts[-1]) if node is not None and parts else None

    def _is_inside(self, path: Path) -> bool:
        return path != self.root and path.is_relative_to(self.root)

    def _node(self, path: Any, dir_fd: int | None) -> Node | None:
        if dir_fd is None and os.path.abspath(os.fsdecode(path)) == str(self.root):
            return self.top
        place = self._place(path, dir_fd)
        return place and place[0].names.get(place[1])

    def _set(self, kind: str, folder: Node, *names: tuple[str, Node | None]) -> None:
        for name, node in names:
            folder.names.pop(name, None)
            if node is not None:
                folder.names[name] = node
        self.ops.append(Op(kind, folder, names))

    def _open(self, real: Any) -> Any:
        def open_(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            place = self._place(path, dir_fd)
            fd = real(path, flags, mode, dir_fd=dir_fd)
            if place is not None and flags & os.O_CREAT and place[1] not in place[0].names:
                self._set("create", place[0], (place[1], Node(False)))
            self._know(fd, self._fds.get(dir_fd) if path == "." and dir_fd is not None else self._node(path, dir_fd))
            return fd

        return open_

    def _write(self, real: Any) -> Any:
        def write(fd: int, data: Any) -> int:
            count = real(fd, data)
            if (node := self._fds.get(fd)) is not None:
                added = bytes(data)[:count]
                node.data += added
                self.ops.append(Op("write", node, data=added))
            return count

        return write

    def _ftruncate(self, real: Any) -> Any:
        def ftruncate(fd: int, length: int) -> None:
            real(fd, length)
            if (node := self._fds.get(fd)) is not None:
                node.data = node.data[:length]
                self.ops.append(Op("cut", node, data=node.data))

        return ftruncate

    def _fsync(self, real: Any) -> Any:
        def fsync(fd: int) -> None:
            if (node := self._fds.get(fd)) is not None:  # the disk itself is not asked: the model is
                self.ops.append(Op("fsync", node))

        return fsync

    def _rename(self, real: Any) -> Any:
        def rename(source: Any, target: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
            old, new = self._place(source, src_dir_fd), self._place(target, dst_dir_fd)
            real(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            if old is not None and new is not None:
                assert old[0] is new[0], "the model knows renaming within a folder only"
                self._set("rename", old[0], (new[1], old[0].names[old[1]]), (old[1], None))

        return rename

    _replace = _rename

    def _link(self, real: Any) -> Any:
        def link(source: Any, target: Any, *, src_dir_fd: Any = None, dst_dir_fd: Any = None, **options: Any) -> None:
            node, new = self._node(source, src_dir_fd), self._place(target, dst_dir_fd)
            real(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, **options)
            if node is not None and new is not None:
                self._set("link", new[0], (new[1], node))

        return link

    def _unlink(self, real: Any) -> Any:
        def unlink(path: Any, *, dir_fd: int | None = None) -> None:
            place = self._place(path, dir_fd)
            real(path, dir_fd=dir_fd)
            if place is not None:
                self._set("unlink", place[0], (place[1], None))

        return unlink

    def _mkdir(self, real: Any) -> Any:
        def mkdir(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
            place = self._place(path, dir_fd)
            real(path, mode, dir_fd=dir_fd)
            if place is not None:
                self._set("mkdir", place[0], (place[1], Node(True)))

        return mkdir

    def _dup(self, real: Any) -> Any:
        def dup(fd: int) -> int:
            new = real(fd)
            self._know(new, self._fds.get(fd))
            return new

        return dup

    def _know(self, fd: int, node: Node | None) -> None:
        self._fds.pop(fd, None)
        if node is not None:
            self._fds[fd] = node


@dataclass
class Disk:
    """What a power cut after ``ops[:end]`` may have left."""

    recorder: Recorder
    end: int

    def uncertain(self) -> list[int]:
        """Positions of the changes that no fsync has made sure of."""
        ops, open_ = self.recorder.ops[: self.end], []
        for n, op in enumerate(ops):
            if op.kind == "fsync":
                open_ = [m for m in open_ if ops[m].on is not op.on]
            else:
                open_.append(n)
        return open_

    def sure(self, node: Node) -> bytes:
        """The bytes of a file that were made sure of."""
        return self._bytes(node, set(self.uncertain()), None)

    def lay_out(self, lost: set[int], torn: random.Random | None) -> None:
        """Put the disk with these changes lost below the root. Of a lost write some may be there (``torn``)."""
        names: dict[Node, dict[str, Node]] = {}
        for n, op in enumerate(self.recorder.ops[: self.end]):
            if n not in lost:
                for name, node in op.names:
                    entries = names.setdefault(op.on, {})
                    entries.pop(name, None)
                    if node is not None:
                        entries[name] = node
        for there in list(self.recorder.root.iterdir()):
            shutil.rmtree(there) if there.is_dir() else there.unlink()
        self._put(self.recorder.root, self.recorder.top, names, lost, torn)

    def _put(self, folder: Path, node: Node, names: Any, lost: set[int], torn: random.Random | None) -> None:
        for name, below in names.get(node, {}).items():
            if below.is_folder:
                (folder / name).mkdir()
                self._put(folder / name, below, names, lost, torn)
            else:
                (folder / name).write_bytes(self._bytes(below, lost, torn))

    def _bytes(self, node: Node, lost: set[int], torn: random.Random | None) -> bytes:
        data = b""
        for n, op in enumerate(self.recorder.ops[: self.end]):
            if op.on is not node or op.kind not in ("write", "cut"):
                continue
            if n not in lost:
                data = op.data if op.kind == "cut" else data + op.data
            elif op.kind == "write" and torn is not None and torn.random() < 0.5:
                kept = torn.randrange(len(op.data) + 1)  # the rest of its blocks never arrived
                data += op.data[:kept] + bytes(len(op.data) - kept) * torn.randrange(2)
        return data


def losses(disk: Disk, count: int, chance: random.Random) -> Iterator[set[int]]:
    """Nothing lost, all that is not sure lost, and subsets of it: every one where there are few, else some."""
    open_ = disk.uncertain()
    every = (
        [{m for b, m in enumerate(open_) if mask >> b & 1} for mask in range(1 << len(open_))] if len(open_) < 8 else []
    )
    found = [set(), set(open_), *every]
    while len(found) < count and open_:
        found.append({m for m in open_ if chance.random() < 0.5})
    distinct = list({frozenset(lost): lost for lost in found}.values())
    yield from distinct[:count]
