"""Files that were changed by chance: every reader refuses them in one line, or what is wrong costs itself.

Never a traceback, a hang or a wrong value. ``tests/support/readers.py`` says what each reader must hold to.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.readers import READERS, changed

FEW = 12
SECONDS = float(os.environ.get("FUZZ_SECONDS", "20"))
"""For each reader, in the long form."""
LONGEST = 20.0
"""Seconds that one file may take, on the busiest machine."""


def fuzz(name: str, tmp_path: Path, *, count: int = sys.maxsize, seconds: float = 1e9) -> int:
    """Read changed files; how many. The number in a failure's message is all that ``changed`` needs."""
    reader, good = READERS[name], tmp_path / "good"
    good.mkdir()
    reader.write(good)
    reader.try_one(tmp_path / "tried", good, reader.files[0], (good / reader.files[0]).read_bytes())
    end, tried, taken = time.monotonic() + seconds, 0, 0
    while tried < count and time.monotonic() < end:
        chance = random.Random(f"{name} {tried}")
        file = reader.files[tried % len(reader.files)]
        data = changed((good / file).read_bytes(), chance, reader.words)
        start = time.monotonic()
        try:
            taken += reader.try_one(tmp_path / "tried", good, file, data)
        except Exception as error:
            raise AssertionError(f"{name} {tried}: {file}: {type(error).__name__}: {error}") from error
        assert time.monotonic() - start < LONGEST, f"{name} {tried}: {file}: took too long"
        tried += 1
    return tried


@pytest.mark.parametrize("name", READERS)
def test_a_few_changed_files(name, tmp_path):
    assert fuzz(name, tmp_path, count=FEW) == FEW


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", READERS)
def test_changed_files_for_a_while(name, tmp_path):
    tried = fuzz(name, tmp_path, seconds=SECONDS)
    print(f"{name}: {tried} files")
    assert tried > FEW


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["ledger", "csv", "jsonl", "text", "wildcards", "safetensors", "gguf", "metadata"])
def test_files_that_reach_new_code(name, tmp_path):
    """Guided by coverage, where atheris is installed."""
    pytest.importorskip("atheris")
    command = [sys.executable, "-m", "tests.support.guided_fuzzing", name, str(tmp_path), str(int(SECONDS))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
