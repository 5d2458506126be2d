"""Composing in a forked child, torch imported lean: nothing of a run differs from a plain start, whatever ends it."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.command import command
from zimage_runner.memory.alloc import VARIABLES, export
from zimage_runner.startup.fork import Child, pays
from zimage_runner.startup.process import PLAIN_START

DRAW = ("model=zimage_nano", "prompt=a red fox", "sampling.height=128", "sampling.width=128")
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != PLAIN_START}
FORKING = """
from zimage_runner import __main__ as program
program.listen()
from zimage_runner.startup import fork
fork.pays_here = lambda: True
program.entry_point()
"""
"""The program on a machine that has a GPU and two CPUs, so it seems."""


def start(folder: Path, *argv: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    """The program, made to fork."""
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", FORKING, *argv],
        cwd=folder,
        env=ENVIRONMENT,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        encoding="utf-8",
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def both(tmp_path: Path, *argv: str) -> list[tuple[int, str, str]]:
    """What a plain start gives, in this process, and the forking one."""
    (tmp_path / "one").mkdir()
    return [command(tmp_path / "one", *argv), finish(start(tmp_path / "two", *argv))]


def timeless(text: str) -> str:
    text = re.sub(r"\d{4}-\d\d-\d\d_[\d.-]+", "WHEN", text)
    text = re.sub(r"[\d.]+ \w?B free", "SPACE free", text)
    return re.sub(r"/(one|two)\b", "", text)


def run_files(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes, below the only run directory."""
    (run,) = (folder / "outputs" / "run").iterdir()
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_run_leaves_the_same_behind(tmp_path: Path) -> None:
    ends = both(tmp_path, *DRAW, "seeds=[1,2]")
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert timeless(ends[0][1]) == timeless(ends[1][1])
    one, two = run_files(tmp_path / "one"), run_files(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        if name.startswith(".hydra/"):
            assert timeless(one[name].decode()) == timeless(two[name].decode()), name
        elif name.endswith(".png"):
            assert one[name] == two[name], name
        elif name.endswith("record.json"):
            records = [json.loads(files[name]) for files in (one, two)]
            assert records[0]["fingerprint"] == records[1]["fingerprint"]
            assert records[0]["sha256"] == records[1]["sha256"]
            assert records[0].keys() == records[1].keys()


@pytest.mark.parametrize(
    "argv",
    [
        ("sampling.steps=four",),
        (*DRAW, "engine.device=cuda"),
        # found in the child, too, or in the parent
        pytest.param(("prompts=text_file", "prompts.path=missing.txt"), marks=pytest.mark.slow),
        pytest.param(("output.root=/proc/none", *DRAW), marks=pytest.mark.slow),
        pytest.param(("no.such=1",), marks=pytest.mark.slow),
        pytest.param(("model=nowhere",), marks=pytest.mark.slow),
        pytest.param(("prompt=",), marks=pytest.mark.slow),
        pytest.param(("seeds=x", *DRAW), marks=pytest.mark.slow),
        pytest.param(("output_file=a.png", "seeds=[1,2]", *DRAW), marks=pytest.mark.slow),
    ],
)
def test_a_refusal_says_the_same_and_leaves_nothing(tmp_path: Path, argv: tuple[str, ...]) -> None:
    one, two = both(tmp_path, *argv)
    assert (one[0], one[1], timeless(one[2])) == (2, "", timeless(two[2]))
    assert (two[0], two[1]) == (2, "")
    assert not (tmp_path / "one" / "outputs").exists()
    assert not (tmp_path / "two" / "outputs").exists()


@pytest.mark.slow  # which ones do not fork: test_when_it_pays
def test_other_command_lines_are_unaffected(tmp_path: Path) -> None:
    one, two = both(tmp_path, *DRAW, "dry_run=true")
    assert (one[0], timeless(one[1]), one[2]) == (two[0], timeless(two[1]), two[2])
    code, out, _ = finish(start(tmp_path / "two", *DRAW, "seeds=[1,2]"))
    assert code == 0
    again = finish(start(tmp_path / "two", f"resume={out.strip().splitlines()[-1]}"))
    assert again[0] == 0
    assert "nothing to draw" in again[2]


def test_prompts_from_standard_input_are_the_parents_to_read(tmp_path: Path) -> None:
    process = start(tmp_path, *DRAW[:1], *DRAW[2:], "prompts=stdin", stdin=subprocess.PIPE)
    _, err = process.communicate("a hat\na cat\n", timeout=120)
    assert process.returncode == 0, err
    assert len(list(tmp_path.rglob("image.png"))) == 2


def test_allocator_settings_count_while_torch_is_being_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """An experiment's file may set them; torch, half imported by then, reads them when CUDA starts."""
    with_cuda = ModuleType("torch")
    vars(with_cuda)["cuda"] = ModuleType("torch.cuda")
    for half in (ModuleType("torch"), with_cuda):
        monkeypatch.setitem(sys.modules, "torch", half)
        for variable in VARIABLES:
            monkeypatch.setenv(variable, "")
        assert export("max_split_size_mb:512")
        assert {os.environ[variable] for variable in VARIABLES} == {"max_split_size_mb:512"}


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("whole_group", [True, False], ids=["group", "parent"])
@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_signal_at_any_instant_ends_both_and_leaves_nothing(
    tmp_path: Path, name: str, whole_group: bool, times: int
) -> None:
    number = signal.Signals[name]
    for _ in range(times):
        process = start(tmp_path, *DRAW)
        _wait_until_it_listens(process.pid)
        time.sleep(random.uniform(0, 0.72))
        if process.poll() is None:
            (os.killpg if whole_group else os.kill)(process.pid, number)
        code, _, err = finish(process)
        assert (code, err.count(name)) == (130, 1), err
        with pytest.raises(ProcessLookupError):  # the session's last process is gone
            os.killpg(process.pid, 0)
        left = [path for path in tmp_path.rglob("*") if path.is_dir() and not any(path.iterdir())]
        assert not [path for path in left if path.name != "outputs"], left


def _wait_until_it_listens(pid: int) -> None:
    """Until its last handler is there: before that, Python itself starts, however long that takes on a busy machine."""
    while True:
        rows = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines())
        if int(rows["SigCgt"], 16) >> (signal.SIGXCPU - 1) & 1 or rows["State"].split()[0] == "Z":
            return
        time.sleep(0.001)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]


def _first_child(pid: int) -> int:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if children := _children(pid):
            return children[0]
    raise AssertionError("no child")


def test_a_killed_child_is_told_in_one_line(tmp_path: Path) -> None:
    process = start(tmp_path, *DRAW)
    os.kill(_first_child(process.pid), signal.SIGKILL)
    code, out, err = finish(process)
    assert (code, out) == (128 + signal.SIGKILL, "")
    assert err == (
        "zimage_runner: the process that composes the config was ended by SIGKILL, perhaps for lack of memory\n"
    )


def test_a_killed_parent_leaves_no_child_and_no_directory(tmp_path: Path) -> None:
    process = start(tmp_path, *DRAW)
    _first_child(process.pid)
    process.kill()
    process.communicate()
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.02)
    else:
        pytest.fail("the child lives on")
    assert not [path for path in tmp_path.rglob("*") if path.name == "run"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["prompt=x"], True),
        (["prompt=a dry_run=true sign, --multirun and hydra"], True),
        (["dry_run=false"], True),
        (["executor=inline", "engine=native"], True),
        ([], True),
        (["dry_run=true"], False),
        (["dry_run=True"], False),
        (["-m", "seeds=1,2"], False),
        (["--cfg", "job"], False),
        (["hydra.run.dir=x"], False),
        (["hydra/launcher=basic"], False),
        (["resume=latest"], False),
        (["++resume=latest"], False),
        (["executor=process"], False),
        (["engine=diffusers"], False),
        (["engine.device=cpu"], False),
        (["memory.alloc_conf=backend:cudaMallocAsync"], False),
        (["+memory.alloc.backend=cudaMallocAsync"], False),
    ],
)
def test_when_it_pays(monkeypatch: pytest.MonkeyPatch, words: list[str], expected: bool) -> None:
    monkeypatch.setattr("zimage_runner.startup.fork.threading.active_count", lambda: 1)
    monkeypatch.setattr("zimage_runner.startup.fork.pays_here", lambda: True)
    assert pays(words) is expected
    monkeypatch.setattr("zimage_runner.startup.fork.pays_here", lambda: False)
    assert not pays(words)


def test_it_needs_a_gpu_and_a_second_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("zimage_runner.startup.fork.threading.active_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr("zimage_runner.startup.imports.DEVICE_NODES", (str(tmp_path / "none"),))
    assert not pays([])
    monkeypatch.setattr("zimage_runner.startup.imports.DEVICE_NODES", (str(tmp_path),))
    assert pays([])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not pays([])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert pays([])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert not pays([])


def test_half_a_message_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.write(writer, (100).to_bytes(8, "little") + b"x" * 99)
    os.close(writer)
    child = object.__new__(Child)
    child._results = reader
    assert child.receive() is None
