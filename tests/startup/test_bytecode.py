"""Bytecode is kept by the runner exactly where the installation keeps none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
from zimage_runner.startup.bytecode import keep_bytecode
folder = keep_bytecode()
assert folder is None or sys.pycache_prefix == str(folder) and not sys.dont_write_bytecode
assert folder is not None or sys.pycache_prefix is None
import torch
print(folder, torch.answer)
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of packages with a torch in it."""
    (tmp_path / "site" / "torch").mkdir(parents=True)
    (tmp_path / "site" / "torch-2.11.0.dist-info").mkdir()
    write(tmp_path / "site", "1")
    return tmp_path / "site"


def write(site: Path, answer: str) -> None:
    source = site / "torch" / "__init__.py"
    source.write_text(f"answer = {answer}\n", encoding="utf-8")
    os.utime(source, (0, 0))  # as images do whose builds can be reproduced


def environment_of(site: Path) -> dict[str, str]:
    """Of a process that finds this torch, and whose Python keeps no bytecode itself."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPYCACHEPREFIX"}
    paths = [str(site), str(Path(__file__).parents[2])]
    env |= {"PYTHONPATH": os.pathsep.join(paths), "ZIMAGE_RUNNER_CACHE": str(site.parent / "cache")}
    return env | {"PYTHONDONTWRITEBYTECODE": "1"}


def run(site: Path, **environment: str) -> tuple[str, str]:
    """The folder of a fresh process, and what its torch answers."""
    env = environment_of(site) | environment
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60, env=env, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    folder, answer = done.stdout.split()
    return folder, answer


def kept(site: Path) -> list[Path]:
    return sorted((site.parent / "cache").rglob("torch/__init__.*.pyc"))


def test_kept_in_the_runners_cache_and_read_from_there(site: Path):
    folder, answer = run(site)
    assert answer == "1"
    assert len(kept(site)) == 1
    assert kept(site)[0].is_relative_to(folder)
    assert not list((site / "torch").rglob("*.pyc"))
    write(site, "2")  # same time, same size: as Python does, the bytecode is believed
    assert run(site) == (folder, "1")


def test_a_change_of_the_source_or_of_the_installed_versions_is_noticed(site: Path):
    folder, _ = run(site)
    write(site, "22")
    assert run(site) == (folder, "22")
    write(site, "33")
    (site / "torch-2.11.0.dist-info").rename(site / "torch-2.13.0.dist-info")
    other, answer = run(site)
    assert other != folder
    assert answer == "33"


def test_not_where_python_does_it_itself(site: Path):
    assert run(site, PYTHONDONTWRITEBYTECODE="") == ("None", "1")
    assert kept(site) == []


def test_not_where_there_is_some(site: Path):
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(site)], check=True)
    assert run(site) == ("None", "1")


@pytest.mark.parametrize("levels", range(3))
def test_not_below_a_folder_that_others_may_write_to(levels: int, site: Path):
    folder = Path(run(site)[0])
    [folder, *folder.parents][levels].chmod(0o777)
    started = [["-c", CODE]] + ([["-m", "zimage_runner", "no_such_field=1"]] if levels == 0 else [])
    for words in started:
        done = subprocess.run(
            [sys.executable, *words],
            capture_output=True,
            text=True,
            timeout=60,
            env=environment_of(site),
            cwd=site,
            encoding="utf-8",
        )
        told = [line for line in done.stderr.splitlines() if "no bytecode is kept in" in line]
        assert [str(folder) in line for line in told] == [True], done.stderr
        assert done.stdout in ("None 1\n", "")


def test_each_user_of_a_shared_cache_has_one(site: Path):
    cache = site.parent / "cache"
    cache.mkdir()
    cache.chmod(0o1777)
    assert run(site) == (str(next(cache.glob("bytecode-*/*"))), "1")


def test_not_where_the_cache_cannot_be_made(site: Path):
    (site.parent / "file").write_text("", encoding="utf-8")
    assert run(site, ZIMAGE_RUNNER_CACHE=str(site.parent / "file" / "cache")) == ("None", "1")


def test_the_command_line_keeps_it(site: Path):
    """Everything that it imports, Hydra first of all, is compiled once."""
    env = environment_of(site)
    command = [sys.executable, "-m", "zimage_runner", "no_such_field=1"]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, cwd=site, encoding="utf-8")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    made = {path.name.split(".")[0] for path in (site.parent / "cache").rglob("*.pyc")}
    assert {"words", "schema", "hydra"} <= made
