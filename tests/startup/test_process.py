"""The start of a process: whoever imports torch first imports it lean; the one switch turns all of it off."""

from __future__ import annotations

import ast
import os
import shutil
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


LIBRARIES = ("libtorch_global_deps.so", "libtorch_python.so")
WAITS = """
#include <stdlib.h>
#include <unistd.h>
__attribute__((constructor)) static void wait_for_the_other_thread(void) {
    for (int i = 0; access(getenv("GOES_ON"), F_OK); i++, usleep(10000)) if (i > 1000) abort();
}
"""
LOAD = """
import os, threading, time
from pathlib import Path
from zimage_runner.startup.imports import load_libraries
def work():
    while "called" not in globals(): time.sleep(0.01)
    for _ in range(100): time.sleep(0.001)
    Path(os.environ["GOES_ON"]).touch()
thread = threading.Thread(target=work)
thread.start()
called = True
print(load_libraries("made"))
thread.join()
"""


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A package with torch's two libraries, which take as long to load as another thread needs for its work."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    folder = tmp_path / "made" / "lib"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (tmp_path / "waits.c").write_text(WAITS, encoding="utf-8")
    for name in LIBRARIES:
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(folder / name), str(tmp_path / "waits.c")], check=True)
    return tmp_path


def test_other_threads_go_on_while_libraries_are_loaded(made: Path) -> None:
    assert python(LOAD, path=made, GOES_ON=str(made / "done")) == "True\n"


def test_no_library_is_loaded_before_torchs_own_choice_of_nvidias(made: Path) -> None:
    others = made / "others"
    others.mkdir()
    environment = {"LD_LIBRARY_PATH": f"{made}:{others}:", "GOES_ON": str(made / "done")}
    assert python(LOAD, path=made, **environment) == "True\n"
    (others / "libnvrtc.so.13").touch()
    assert python(LOAD, path=made, **environment) == "False\n"


@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries_that_cannot_be_loaded_are_left_to_torch(name: str, made: Path) -> None:
    (made / "made" / "lib" / name).write_bytes(b"")
    assert python(LOAD, path=made, GOES_ON=str(made / "done")) == "False\n"


def test_torchs_libraries_are_there_before_it_is_imported() -> None:
    code = """
import sys
from pathlib import Path
from zimage_runner.startup.imports import load_libraries
from zimage_runner.startup.process import begin
begin()
print(load_libraries("torch"), "torch" in sys.modules, "libtorch_python" in Path("/proc/self/maps").read_text())
import torch
print(torch.arange(3.0).sum().item())
"""
    assert python(code) == "True False True\n3.0\n"


def test_only_process_entries_know_of_this_room() -> None:
    users = set()
    for path in PACKAGE.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        if any(name.startswith("zimage_runner.startup") for name in names) and path.parent.name != "startup":
            users.add(path.relative_to(PACKAGE).as_posix())
    assert users == ENTRIES
