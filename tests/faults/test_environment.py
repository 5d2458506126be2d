"""Any terminal, locale, home: a picture, or one line before the model is loaded (E1, E3, E4, /dev/full, U2)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.support import ROOT

FAST = ["sampling.num_inference_steps=1", "warmup=none", "report=standard"]
NOBODY = """
import pwd
def unknown(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = unknown
"""
"""sitecustomize.py: a user whom the machine does not know, as in containers started with a number (pytorch#140765)."""
OF_A_USER = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME", "LANG", "PYTHONUTF8")


def program(folder: Path, words: list[str], *, stdout: int, **environment: str):
    kept = {name: value for name, value in os.environ.items() if name not in OF_A_USER}
    return subprocess.run(
        [sys.executable, "-m", "zimage_runner", *words],
        cwd=folder,
        env={**kept, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "OMP_NUM_THREADS": "1", **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=300,
    )


def test_an_unknown_user_without_a_home_in_a_locale_without_letters(tmp_path: Path) -> None:
    """It draws 一只熊猫 all the same; what is printed has escapes for it; and the whole process is timed."""
    (tmp_path / "p.txt").write_text("一只熊猫\n", encoding="utf-8")
    (tmp_path / "sitecustomize.py").write_text(NOBODY)
    words = ["prompts=text_file", "prompts.path=p.txt", "output.root=out", *FAST]
    began = time.monotonic()
    done = program(tmp_path, words, stdout=subprocess.PIPE, LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    took = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    run = tmp_path / "out" / Path(os.fsdecode(done.stdout.strip())).relative_to(tmp_path / "out")
    assert os.listdir(os.fsencode(run / "items")) == ["00000_一只熊猫".encode()]
    (record,) = run.glob("items/*/*/record.json")
    assert json.loads(record.read_bytes())["prompt"] == "一只熊猫"
    summary = json.loads((run / "summary.json").read_bytes())
    assert summary["total_seconds"] < summary["process_seconds"] <= took + 0.1, "imports and loading are counted"
    assert f"{summary['process_seconds']:.2f} s since the program was started".encode() in done.stderr


def test_streams_that_cannot_take_it(tmp_path: Path) -> None:
    """An ASCII terminal gets escapes, and a full disk behind stdout one line; the picture is drawn both times."""
    words = ["prompt=cat", "output.root=模型", *FAST]
    done = program(tmp_path, words, stdout=subprocess.PIPE, PYTHONIOENCODING="ascii", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("ascii").startswith(f"{tmp_path}/\\u6a21\\u578b/run/")
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        done = program(tmp_path, [*words, f"resume={next(tmp_path.glob('模型/*/*'))}"], stdout=full)
    finally:
        os.close(full)
    assert done.returncode == 0, done.stderr
    assert b"zimage_runner: standard output cannot be written (No space left on device)" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_program_of_others_in_such_a_locale_is_told(tmp_path: Path) -> None:
    """Pictures of 一只猫 could not be named: before anything is drawn, and with the remedy."""
    code = (
        "import zimage_runner as zr\ntry:\n    zr.run('prompt=a cat')\n"
        "except zr.UserError as error:\n    print(error)\nelse:\n    raise SystemExit('nothing was said')"
    )
    without = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, **without}, capture_output=True, text=True,
        encoding="utf-8", timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout == "this Python takes names of files as ascii: start it with PYTHONUTF8=1\n", done
    assert not list(tmp_path.iterdir())
