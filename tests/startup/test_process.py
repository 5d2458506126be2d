"""The start of a process: whoever imports torch first imports it lean; the one switch turns all of it off."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from zimage_runner.startup.process import PLAIN_START

PACKAGE = Path(__file__).parents[2] / "zimage_runner"
ENTRIES = {
    "__main__.py", "executors/ray_actor.py", "prepare.py", "reproduce.py", "resident/process.py", "serve/__main__.py",
}  # fmt: skip


def python(code: str, *, path: Path | None = None, **environment: str) -> str:
    env = os.environ | environment
    if path is not None:
        env["PYTHONPATH"] = os.pathsep.join([str(path), str(PACKAGE.parent)])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("value", ["", "0", "1", "yes"])
def test_one_switch_for_everything(value: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("", encoding="utf-8")  # one that has no bytecode
    code = """
import sys
finders = list(sys.meta_path)
from zimage_runner.startup.process import begin
print(begin(), sys.pycache_prefix is not None, sys.meta_path != finders)
"""
    python_keeps_none = {"PYTHONDONTWRITEBYTECODE": "1", "ZIMAGE_RUNNER_CACHE": str(tmp_path / "cache")}
    out = python(code, path=tmp_path, **{PLAIN_START: value}, **python_keeps_none)
    assert out.split() == [str(value not in ("1", "yes"))] * 3


@pytest.fixture
def failing(tmp_path: Path) -> Path:
    """A torch whose second import fails in another way, as the real one's does."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "import sys, time\ntime.sleep(0.2)\n"
        "if hasattr(sys, 'again'): raise RuntimeError('the second error')\n"
        "sys.again = True\nraise ImportError('libcudart.so.13: cannot open shared object file')\n",
        encoding="utf-8",
    )
    return tmp_path


def test_all_who_import_torch_get_the_first_error(failing: Path) -> None:
    out = python(
        """
import threading
from zimage_runner.startup.process import begin
begin()
def attempt():
    try:
        import torch
        torch.cuda
    except BaseException as error:
        print(f"{error!r}\\n", end="")
threads = [threading.Thread(target=attempt) for _ in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
attempt()
""",
        path=failing,
    )
    assert out.splitlines() == ["ImportError('libcudart.so.13: cannot open shared object file')"] * 4


def test_an_environment_without_torch_is_told_so() -> None:
    out = python(
        """
import sys
from zimage_runner.startup.process import import_torch_lean
sys.path[:] = [path for path in sys.path if "site-packages" not in path]
import_torch_lean()
try:
    import torch
except ModuleNotFoundError as error:
    print(error.name)
"""
    )
    assert out == "torch\n"


def test_whoever_came_first_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("", encoding="utf-8")
    python(
        "from zimage_runner.startup.process import import_torch_lean\n"
        "import sys, torch\nfinders = list(sys.meta_path)\nimport_torch_lean()\nassert sys.meta_path == finders",
        path=tmp_path,
    )


def test_only_process_entries_know_of_this_room() -> None:
    users = set()
    for path in PACKAGE.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        if any(name.startswith("zimage_runner.startup") for name in names) and path.parent.name != "startup":
            users.add(path.relative_to(PACKAGE).as_posix())
    assert users == ENTRIES
