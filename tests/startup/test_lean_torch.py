"""The lean import of torch: really lean for a native run, and like a plain import for everyone else."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest

from tests.support.command import command
from zimage_runner.startup.lean_torch import BACKEND_AUTOLOAD, DEFERRED, NEEDS_ALL, VERIFIED
from zimage_runner.startup.process import PLAIN_START

pytestmark = pytest.mark.skipif(
    not metadata.version("torch").startswith(VERIFIED), reason="this version of torch is imported plainly"
)

LEAN = """
import gc, sys
from zimage_runner.startup import lean_torch
from zimage_runner.startup.lean_torch import DEFERRED, Later, NEEDS_ALL, StandIn
from zimage_runner.startup.process import FirstImport, import_torch_lean
import_torch_lean()
import torch
assert torch.__loader__ is torch.__spec__.loader and "Source" in type(torch.__loader__).__name__
assert not any(isinstance(finder, FirstImport) for finder in sys.meta_path)
assert gc.isenabled() and gc.get_freeze_count() > 10_000

def bound(kind):
    places = [(vars(m).get("__name__"), n, v) for m in list(sys.modules.values()) for n, v in list(vars(m).items())]
    return [(m, n) for m, n, v in places if kind(v) and m not in ("__main__", lean_torch.__name__)]

def complete():
    assert not any(isinstance(finder, lean_torch.Deferral) for finder in sys.meta_path)
    assert not (left := bound(lambda value: type(value) in (StandIn, Later))), left
    assert all(name in sys.modules for name in DEFERRED)
    assert "torch_getattr" not in torch.__getattr__.__code__.co_freevars
"""

TOUCHES = {
    "compile": """
def f(x):
    return x.sin() + torch.ones(3).sort().values
x = torch.arange(3.0)
assert torch.equal(torch.compile(f, backend="eager", fullgraph=True)(x), f(x))
""",
    "export": """
class Twice(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.gelu(x) * 2
x = torch.arange(4.0)
assert torch.equal(torch.export.export(Twice(), (x,)).module()(x), Twice()(x))
""",
    "fake tensors": """
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    values, indices = torch.linalg.eigh(torch.empty(3, 3))
    assert torch.nonzero.__name__ and values.shape == (3,)
    assert torch.empty(2, 8).unfold(1, 3, 2).shape == (2, 3, 3)
""",
    "cond": """
x = torch.ones(2)
assert torch.equal(torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)), x.sin())
""",
    "vmap": """
from torch import vmap
assert torch.equal(vmap(torch.sum)(torch.ones(2, 3)), torch.full((2,), 3.0))
""",
    "optimizer": """
weight = torch.nn.Parameter(torch.ones(1))
optimizer = torch.optim.AdamW([weight], lr=0.1)
(weight * 2).sum().backward()
optimizer.step()
assert weight.item() < 1
""",
    "submodule": """
import torch.utils.data.dataloader
assert torch.utils.data is sys.modules["torch.utils.data"]
assert [len(b) for b in torch.utils.data.DataLoader(list(range(5)), batch_size=2)] == [2, 2, 1]
""",
    "quantized": """
assert torch.nn.quantized.Linear.__module__.startswith("torch.ao.nn.quantized")
""",
    "decompositions": """
import torch._decomp
assert torch._decomp.get_decompositions([torch.ops.aten.addmm])
assert torch._decomp.__spec__.origin == torch._decomp.__file__
assert sys.modules["torch._decomp"] is torch._decomp
""",
    "patched": """
from torch.nn import qat
qat.own = 1
assert sys.modules["torch.nn.qat"].own == 1
""",
    "diffusers": """
from diffusers import ZImagePipeline
assert ZImagePipeline.__name__ == "ZImagePipeline"
""",
}


def python(code: str, *argv: str, **environment: str) -> str:
    """Run in a fresh process; its stdout."""
    env = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *argv],
        capture_output=True,
        text=True,
        timeout=120,
        env=env,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


FORKS = """
import os
for line in sys.stdin:
    if (child := os.fork()) == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
code, out = line.split()
fd = os.open(out, os.O_WRONLY | os.O_CREAT)
os.dup2(fd, 1)
os.dup2(fd, 2)
exec(compile(open(code).read(), code, "exec"))
"""


@pytest.fixture(scope="module")
def lean(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """Run code in a process of its own, right after the lean import; its stdout. Forks of one that did nothing else."""
    folder = tmp_path_factory.mktemp("lean")
    code, out = folder / "code.py", folder / "out"
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", LEAN + FORKS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != BACKEND_AUTOLOAD},
        encoding="utf-8",
    ) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None

        def run(text: str) -> str:
            code.write_text(text, encoding="utf-8")
            out.unlink(missing_ok=True)
            stdin.write(f"{code} {out}\n")
            stdin.flush()
            assert stdout.readline() == "0\n", out.read_text(encoding="utf-8")
            return out.read_text(encoding="utf-8")

        yield run
        stdin.close()


QUICK = ("submodule",)
"""Each imports all of torch, which takes seconds. What they show changes when torch's version does."""


@pytest.mark.parametrize("touch", [t if t in QUICK else pytest.param(t, marks=pytest.mark.slow) for t in TOUCHES])
def test_one_touch_makes_it_a_plain_import(touch, lean):
    """Backends of devices are loaded then, once, as a plain import loads them."""
    loads = "loaded = []\ntorch._import_device_backends = lambda: loaded.append(1)"
    lean(f"{loads}\n{TOUCHES[touch]}\ncomplete()\nassert loaded == [1]")


def test_until_then_nothing_stands_in_where_an_import_would_find_it(lean):
    lean(
        """
assert not [name for name, module in sys.modules.items() if isinstance(module, StandIn)]
assert not [name for module, name in bound(lambda value: type(value) is Later) if module == "torch"]
assert not [name for name in (*DEFERRED, *NEEDS_ALL) if name in sys.modules]
"""
    )


MODULES = "print(sorted(n for n in sys.modules if n.partition('.')[0] in ('torch', 'torchgen', 'unittest')))"
PUBLIC = "print(sorted(n for n in vars(torch) if not n.startswith('__')))"


@pytest.fixture(scope="module")
def plain() -> str:
    """What a plain import of torch brings: its modules, and torch's own names."""
    return python(f"import sys, torch\n{MODULES}\n{PUBLIC}")


@pytest.mark.slow
def test_afterwards_the_same_modules_as_after_a_plain_import(lean, plain):
    assert lean(f"torch.export\n{MODULES}\n{PUBLIC}") == plain


RUN = """
import sys
from zimage_runner.startup.process import begin
begin()
from zimage_runner.cli.main import main
from zimage_runner.startup.lean_torch import DEFERRED, NEEDS_ALL
for engine in ("auto", "native"):
    assert main([*sys.argv[1:], f"engine={engine}", f"output_file={engine}.png"]) == 0
    print("present:", [name for name in (*DEFERRED, *NEEDS_ALL) if name in sys.modules])
"""


def test_a_native_run_touches_none_of_it_and_draws_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As this process draws, where torch is all there."""
    monkeypatch.chdir(tmp_path)
    options = ["model=zimage_nano", "prompt=a fox"]
    code, _, err = command(tmp_path, *options, "output_file=plain.png")
    assert code == 0, err
    assert "torch._meta_registrations" in sys.modules
    out = python(RUN, *options)
    assert [line for line in out.splitlines() if line.startswith("present")] == ["present: []"] * 2
    assert pixels(tmp_path / "auto.png") == pixels(tmp_path / "native.png") == pixels(tmp_path / "plain.png")


def pixels(path: Path) -> bytes:
    from PIL import Image

    with Image.open(path) as image:
        return image.tobytes()


@pytest.mark.slow  # where there is none, they are: the touch above
@pytest.mark.parametrize("value", ["0", "1"])
def test_the_choice_about_device_backends_is_the_users(value):
    """Backends that entry points name are loaded when the rest is, unless the user said no."""
    python(
        f"""
{LEAN}
import os
assert os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == {value!r}
loaded = []
torch._import_device_backends = lambda: loaded.append(1)
torch.export
assert loaded == {[] if value == "0" else [1]}
""",
        **{BACKEND_AUTOLOAD: value},
    )


@pytest.mark.parametrize(
    ("setup", "environment"),
    [
        pytest.param("lean_torch.VERIFIED = ('0.1.',)", {}, id="unknown version"),
        # nothing at all is begun then: test_process.py
        pytest.param("", {PLAIN_START: "1"}, id="switched off", marks=pytest.mark.slow),
        pytest.param("", {"KINETO_USE_DAEMON": "1"}, id="profiling daemon"),
        # whoever came first is left alone: test_process.py
        pytest.param("import torch", {}, id="imported already", marks=pytest.mark.slow),
    ],
)
def test_plain_where_lean_is_not_known_to_work(setup, environment):
    out = python(
        f"""
import logging, sys
from zimage_runner.startup import lean_torch
from zimage_runner.startup.process import FirstImport, begin
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(message)s")
{setup}
begin()
import torch
assert "torch._meta_registrations" in sys.modules
assert not any(isinstance(finder, (FirstImport, lean_torch.Deferral)) for finder in sys.meta_path)
assert torch.export.export
sys.stdout.flush()
import os
os._exit(0)  # the profiler's client waits ten seconds for its daemon when the process ends
""",
        **environment,
    )
    assert out.count("no gain") == ("VERIFIED" in setup or "KINETO_USE_DAEMON" in environment)


@pytest.mark.slow
def test_other_packages_modules_come_alone(tmp_path: Path):
    """One import of them, or one use of torch's own reference to them, and neither drags torch's parts in."""
    (tmp_path / "pynvml.py").write_text("def nvmlInit(): return 'real'\n", encoding="utf-8")
    code = (
        LEAN
        + """
assert [name for name in ALONE if name in sys.modules] == []
import unittest, torch.cuda
assert not hasattr(unittest, "mock")
import os
for use in ("import unittest.mock, pynvml", "from unittest import mock"):
    if (child := os.fork()) == 0:
        break
    assert os.waitpid(child, 0)[1] == 0
else:
    sys.exit()
exec(use)
assert unittest.mock.patch is sys.modules["unittest.mock"].patch
assert torch._guards.unittest.mock.patch is unittest.mock.patch
assert torch.cuda.pynvml.nvmlInit() == "real"
assert not [name for name in DEFERRED if name in sys.modules]
torch.export
complete()
assert torch.cuda.pynvml is sys.modules["pynvml"]
"""
    )
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    python(code.replace("import DEFERRED", "import ALONE, DEFERRED"), PYTHONPATH=paths)


@pytest.mark.parametrize(
    "moment",
    [
        "torch.torch_version",
        pytest.param("torch.cuda.memory", marks=pytest.mark.slow),
        pytest.param("torch.hub", marks=pytest.mark.slow),
        pytest.param("torch._lobpcg", marks=pytest.mark.slow),
    ],
)
def test_another_threads_imports_meanwhile_are_real(moment, tmp_path: Path):
    (tmp_path / "pynvml.py").write_text("def nvmlInit(): return 'real'\n", encoding="utf-8")
    (tmp_path / "other.py").write_text(
        "import unittest.mock\nfrom unittest import mock\nimport pynvml\n", encoding="utf-8"
    )
    python(
        f"""
import importlib, sys, threading
from importlib.machinery import PathFinder
from zimage_runner.startup.lean_torch import ALONE, DEFERRED, StandIn
from zimage_runner.startup.process import import_torch_lean

class Meanwhile:
    done = []
    def find_spec(self, name, path, target=None):
        if name != {moment!r}:
            return None
        spec = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        def exec_module(module):  # in find_spec itself the import system is locked
            thread = threading.Thread(target=importlib.import_module, args=("other",))
            thread.start()
            thread.join(30)
            assert not thread.is_alive()
            self.done.append(name)
            execute(module)
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Meanwhile())
import_torch_lean()
import torch
assert Meanwhile.done
other = sys.modules["other"]
assert other.pynvml is sys.modules["pynvml"] and other.mock is sys.modules["unittest.mock"]
assert other.unittest.mock is other.mock and type(other.mock) is not StandIn and type(other.pynvml) is not StandIn
assert other.pynvml.nvmlInit() == "real" and other.mock.patch
assert not [name for name in DEFERRED if name in sys.modules]
""",
        PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    )


START = """
def start(deferral):
    from importlib.util import module_from_spec, find_spec
    spec = find_spec("torch")
    sys.modules["torch"] = torch = module_from_spec(spec)
    deferral.execute(torch, spec.loader.exec_module)
"""


def test_another_thread_gets_no_stand_in_from_the_finder():
    python(
        START
        + """
import sys, threading
from zimage_runner.startup.lean_torch import Deferral
deferral, found = Deferral(), []
start(deferral)
deferral.importing = True
for name in ("unittest.mock", "torch.optim"):
    deferral._names.add(name)
    assert deferral.find_spec(name, sys.modules[name.partition(".")[0]].__path__) is not None
    found.append(0)
    thread = threading.Thread(target=lambda: found.append(deferral.find_spec(name, None)))
    thread.start()
    thread.join()
    assert found.pop() is None
"""
    )


def test_a_stand_in_touched_while_torch_is_imported_gives_way():
    """A device backend, or another version of torch, may use anything early."""
    python(
        START
        + """
import sys
from zimage_runner.startup.lean_torch import DEFERRED, Deferral, StandIn
early = Deferral((*DEFERRED, "torch.hub", "torch.jit", "torch.fx.experimental.sym_node"))
start(early)
import torch
assert torch.jit.script(torch.nn.ReLU())(torch.ones(1)) == 1
assert type(sys.modules["torch.jit"]) is not StandIn
assert "torch._meta_registrations" not in sys.modules or early not in sys.meta_path
"""
    )


@pytest.mark.slow
def test_the_lists_name_modules(plain):
    """A name that no longer exists would defer or trigger nothing."""
    imported = ast.literal_eval(plain.splitlines()[0])
    assert [name for name in DEFERRED if name not in imported] == []
    assert [name for name in NEEDS_ALL if importlib.util.find_spec(name) is None] == []
