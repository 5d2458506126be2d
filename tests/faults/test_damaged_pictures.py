"""Pictures that a power cut, a full disk or a careless hand has damaged are named and not passed on."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.support.fault_runs import Run
from tests.support.faulty_session import FaultySession
from zimage_runner.cli.main import main
from zimage_runner.collect.__main__ import main as collect
from zimage_runner.collect.sheet import GAP, LINE
from zimage_runner.outputs import atomic
from zimage_runner.runner import pool

SEED_1 = "items/00000_a_cat/seed_1/image.png"
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut off": lambda data: data[:-1],
    "zeros": lambda data: bytes(len(data)),
    "the end is zeros": lambda data: data[:-4096] + bytes(4096),
    "another file": lambda data: b"GIF89a" + data[6:],
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Twelve pictures, drawn in this process."""
    monkeypatch.setattr(pool, "Session", FaultySession)
    monkeypatch.setenv("FAULTS", "[]")
    monkeypatch.chdir(tmp_path)
    run = Run(tmp_path)
    assert main(run.argv()) == 0
    capfd.readouterr()
    return run


def test_they_are_named_and_left_out_and_the_advice_helps(run: Run, capfd) -> None:
    before = {}
    for n, damage in enumerate(DAMAGES.values(), 1):
        picture = run.run_dir / f"items/00000_a_cat/seed_{n}/image.png"
        before[picture] = picture.read_bytes()
        picture.write_bytes(damage(before[picture]))
    for words in (["into=all"], ["into=converted", "format=webp"], ["sheet=sheet.png"]):
        assert collect([str(run.run_dir), *words]) == 0
        err = capfd.readouterr().err
        assert "5 damaged pictures are left out (items/00000_a_cat/seed_1: 0 bytes instead of" in err
        assert [n for n in range(6) if f"items/00000_a_cat/seed_{n}: " in err] == [1, 2, 3, 4, 5]
        assert "Traceback" not in err
    assert sorted(path.stem[-1] for path in Path("all").glob("*a_cat*")) == ["0"]
    assert len(list(Path("converted").glob("*.webp"))) == 7
    advice = re.search(r"draw again with (resume=.*)", err)
    assert advice is not None
    assert main(shlex.split(advice[1])) == 0
    assert {picture: picture.read_bytes() for picture in before} == before
    capfd.readouterr()
    assert collect([str(run.run_dir), "into=all", "overwrite=true"]) == 0
    assert "damaged" not in capfd.readouterr().err
    assert len(list(Path("all").glob("*.png"))) == 12


def test_bytes_changed_in_the_middle_leave_a_sheets_tile_empty(run: Run, capfd) -> None:
    picture = run.run_dir / SEED_1
    data = bytearray(picture.read_bytes())
    data[2000:2400] = bytes(400)
    picture.write_bytes(data)
    assert collect([str(run.run_dir), "sheet=sheet.png", "columns=2"]) == 0
    assert f"{SEED_1} is left out, it cannot be read" in capfd.readouterr().err
    with Image.open("sheet.png") as sheet:
        sheet.load()
        places = [(GAP + x * 132, GAP + y * (132 + 3 * LINE)) for x in range(2) for y in range(6)]
        colours = [len(sheet.crop((x, y, x + 128, y + 128)).getcolors(1 << 20) or ()) for x, y in places]
        assert sorted(count > 1000 for count in colours) == [False] + [True] * 11  # in the order of their writing
        assert min(colours) == 1


def test_a_sheet_is_whole_or_as_it_was(run: Run, monkeypatch) -> None:
    """Killed in the middle of writing it: the old one stays, and no page is torn."""
    assert collect([str(run.run_dir), "sheet=sheet.png"]) == 0
    before = Path("sheet.png").read_bytes()

    def cut(fd: int, data: bytes) -> None:
        os.write(fd, data[: len(data) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_all", cut)
        assert collect([str(run.run_dir), "sheet=sheet.png", "columns=1"]) == 130
    assert Path("sheet.png").read_bytes() == before
    assert sorted(os.listdir()) == ["run", "sheet.png"]


def test_a_ledger_line_that_was_altered_is_believed_by_nobody(run: Run, capfd) -> None:
    """Its item is not collected and not shown as done by ``status``: all read the ledger in one way."""
    from zimage_runner.view.status import status_of

    records = run.run_dir / "records.jsonl"
    text = records.read_bytes()
    place = text.index(b'"seed":1') + 7
    records.write_bytes(text[:place] + b"7" + text[place + 1 :])
    assert collect([str(run.run_dir), "into=all"]) == 0
    assert len(list(Path("all").glob("0*"))) == 11
    (told,) = status_of([str(run.run_dir)])["runs"]
    assert (told["done"], told["planned"], told["state"]) == (11, 12, "interrupted")
    assert main(run.argv()) == 0
    (told,) = status_of([str(run.run_dir)])["runs"]
    assert (told["done"], told["state"]) == (12, "finished")
