"""A run that is killed at random instants and resumed loses, doubles and corrupts nothing."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from tests.support import ROOT
from zimage_runner.outputs.metadata import read_metadata

PROGRAM = ROOT / "tests" / "support" / "kill_and_resume.py"
ITEMS = 6
SEED = 3
"""Of the instants; what is under way at them differs from run to run."""


def torture(kills: int, folder: Path) -> list[Path]:
    """Finished run directories; the first one was never killed."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(kills), str(SEED), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=60 + 20 * kills,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["hits"] >= kills
    return [Path(run) for run in told["runs"]]


def pixels(run: Path) -> dict[str, str]:
    found = {}
    for path in sorted(run.glob("items/*/*/image.png")):
        with Image.open(path) as image:
            found[str(path.relative_to(run))] = hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
    return found


def check(run: Path, reference: dict[str, str]) -> None:
    assert pixels(run) == reference
    lines = [json.loads(line) for line in (run / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    # A picture whose line was lost is drawn again, but no item has two finished lines.
    assert Counter(line["item"] for line in lines if line["status"] == "ok").most_common(1)[0][1] == 1
    assert {f"{line['item']}/image.png" for line in lines} == reference.keys()
    for line in lines:
        data = (run / line["item"] / "image.png").read_bytes()
        assert hashlib.sha256(data).hexdigest() == line["sha256"]
        record = json.loads((run / line["item"] / "record.json").read_text(encoding="utf-8"))
        assert (record["status"], record["sha256"]) == ("ok", line["sha256"])
        recipe = read_metadata(run / line["item"] / "image.png").recipe
        assert recipe is not None
        assert recipe["fingerprint"] == line["fingerprint"]
    assert not list(run.rglob("*.tmp"))
    assert not (run / ".lock").exists()
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["status"] == "complete"


def check_all(kills: int, folder: Path) -> None:
    runs = torture(kills, folder)
    reference = pixels(runs[0])
    assert len(reference) == ITEMS
    for run in runs:
        check(run, reference)


def test_killed_a_few_times(tmp_path: Path) -> None:
    check_all(4, tmp_path)


@pytest.mark.slow
def test_killed_fifty_times(tmp_path: Path) -> None:
    check_all(50, tmp_path)
