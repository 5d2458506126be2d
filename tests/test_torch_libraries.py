"""torch's libraries opened ahead: the same files, flags and order as torch's own, or nothing."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import pytest

from zimage_runner import head_start, torch_libraries
from zimage_runner.help import CONFIG_DIR
from zimage_runner.torch_libraries import CUDA_LIBRARIES, PLAIN_IMPORT, VERIFIED, open_libraries

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not metadata.version("torch").startswith(VERIFIED),
    reason="the libraries of this torch are not opened ahead",
)

MAPS = """
def torch_maps():
    with open("/proc/self/maps") as maps:
        return sorted({line.split()[-1] for line in maps if "/torch/" in line})
"""


def python(code: str, **environment: str) -> str:
    """Run in a fresh process; its stdout."""
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def torch_package() -> Path:
    spec = util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def test_the_list_is_torchs_own():
    tree = ast.parse((torch_package() / "__init__.py").read_text(encoding="utf-8"))
    (function,) = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "_preload_cuda_deps"]
    listed = next(n.value for n in ast.walk(function) if isinstance(n, ast.AnnAssign) and n.value is not None)
    calls = [n for n in ast.walk(function) if isinstance(n, ast.Call) and n.keywords]
    optional = [tuple(ast.literal_eval(argument) for argument in call.args) for call in calls]
    assert (*ast.literal_eval(listed), *optional) == CUDA_LIBRARIES


def test_opened_ahead_is_as_good_as_imported():
    """The import opens nothing but libtorch_python and what belongs to it, and torch computes."""
    python(
        f"""
{MAPS}
from zimage_runner import torch_libraries, torch_import
torch_libraries.begin()
torch_libraries.wait()
ahead = [path.rpartition("/")[2] for path in torch_maps()]
assert "libtorch_cpu.so" in ahead and "libtorch_python.so" not in ahead, ahead
torch = torch_import.import_torch_lean()
rest = {{path.rpartition("/")[2] for path in torch_maps()}} - set(ahead)
assert all(name.startswith(("libtorch_python", "libshm", "_C.")) for name in rest), rest
assert torch.equal(torch.ones(2, 3) @ torch.ones(3, 2), torch.full((2, 2), 3.0))
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
"""
    )


def test_the_process_ends_up_with_the_same_files():
    code = "{}\n{}\nprint(torch_maps())"
    ahead = "from zimage_runner import torch_libraries as l; l.begin(); l.wait(); import torch"
    assert python(code.format(MAPS, ahead)) == python(code.format(MAPS, "import torch"))


@pytest.mark.parametrize(
    ("setup", "environment"),
    [
        ("torch_libraries.VERIFIED = ('0.1.',)", {}),
        ("", {PLAIN_IMPORT: "1"}),
        ("", {"TORCH_USE_RTLD_GLOBAL": "1"}),
        ("import torch", {}),
        ("sys.platform = 'darwin'", {}),
        ("sys.path = [path for path in sys.path if 'site-packages' not in path]", {}),
    ],
    ids=["unknown version", "plain import", "global symbols", "imported already", "another system", "no torch"],
)
def test_left_to_the_import_where_it_is_not_known_to_be_the_same(setup, environment):
    python(
        f"""
import os, sys
from zimage_runner import torch_libraries
os.environ.pop("GOMP_SPINCOUNT", None)
{setup}
torch_libraries.begin()
assert not torch_libraries.is_loading() and "GOMP_SPINCOUNT" not in os.environ
torch_libraries.wait()
""",
        **environment,
    )


class Linker:
    """Notes what it is asked to open; refuses the names given."""

    def __init__(self, *missing: str) -> None:
        self.missing = missing
        self.opened: list[tuple[str, int]] = []

    def __call__(self, path: str, flags: int) -> bool:
        self.opened.append((Path(path).name, flags))
        return Path(path).name not in self.missing


@pytest.fixture
def cuda_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Site-packages as after installing torch with CUDA 13, whose runtime libtorch_global_deps has brought."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.11.0+cu130'\ncuda: str | None = '13.0'\n")
    for folder, name in CUDA_LIBRARIES[:-1]:
        place = "cudnn" if folder == "cudnn" else "cu13"
        file = tmp_path / "nvidia" / place / "lib" / name.replace("*[0-9]", "13")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    read_text = Path.read_text

    def maps(path: Path, *args, **kwargs) -> str:
        return "/lib/libcudart.so.13" if path == Path("/proc/self/maps") else read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", maps)
    return tmp_path


def test_cudas_libraries_come_between_in_torchs_order(cuda_wheels):
    linker = Linker()
    open_libraries(cuda_wheels / "torch", ["/nowhere", str(cuda_wheels)], linker)
    names = [name for name, _ in linker.opened]
    expected = [name.replace("*[0-9]", "13") for _, name in CUDA_LIBRARIES[:-1]]
    assert names == ["libtorch_global_deps.so", *expected, "libtorch.so"]
    assert [flags for _, flags in linker.opened] == [os.RTLD_NOW | os.RTLD_GLOBAL] + [os.RTLD_NOW] * len(names[1:])


def test_torch_ends_its_list_at_the_first_that_is_missing(cuda_wheels):
    linker = Linker("libcudnn.so.13")
    open_libraries(cuda_wheels / "torch", [str(cuda_wheels)], linker)
    names = [name for name, _ in linker.opened]
    assert names[1:] == ["libcublasLt.so.13", "libcublas.so.13", "libcudnn.so.13", "libtorch.so"]
    (cuda_wheels / "nvidia" / "cu13" / "lib" / "libcublas.so.13").unlink()
    linker = Linker()
    open_libraries(cuda_wheels / "torch", [str(cuda_wheels)], linker)
    assert [name for name, _ in linker.opened][1:] == ["libcublasLt.so.13", "libtorch.so"]


def test_nothing_follows_when_the_first_cannot_be_opened(tmp_path):
    linker = Linker("libtorch_global_deps.so")
    open_libraries(tmp_path, [str(tmp_path)], linker)
    assert len(linker.opened) == 1


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each start; on a machine of many cores."""
    calls: list[int] = []
    monkeypatch.setattr(torch_libraries, "begin", lambda: calls.append(1))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(head_start.ENOUGH_CORES)))
    return calls


COMMAND_LINES = [
    (["prompt=a fox", "seeds=0-3", "model=zimage_turbo", "engine.device=cuda", "output.root=x"], True),
    (["-m", "sampling.num_inference_steps=4,8"], True),
    ([], True),
    (["prompt=a fox", "dry_run=true"], False),
    (["resume=latest"], False),
    (["executor=process"], False),
    (["memory=staged"], False),
    (["memory.alloc.backend=cudaMallocAsync"], False),
    (["+experiment=article"], False),
    (["--config-dir", "mine", "prompt=a fox"], False),
    (["--cfg", "job"], False),
    (["hydra/launcher=basic"], False),
    (["foo"], False),
]


@pytest.mark.parametrize(("argv", "starts"), COMMAND_LINES)
def test_starts_before_composing_only_when_the_words_alone_say_so(argv, starts, begun):
    head_start.before_composing(argv)
    assert bool(begun) is starts


def test_few_cores_are_left_to_the_composing(begun, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    head_start.before_composing(["prompt=a fox"])
    assert not begun


@pytest.mark.parametrize("file", ["config.yaml", "memory/resident.yaml"])
def test_allocator_settings_in_a_file_are_waited_for(file, tmp_path, begun, monkeypatch):
    """torch reads them when its libraries are opened."""
    (tmp_path / "memory").mkdir()
    for name in ("config.yaml", "memory/resident.yaml"):
        (tmp_path / name).write_text((CONFIG_DIR / name).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(head_start, "CONFIG_DIR", tmp_path)
    head_start.before_composing(["prompt=a fox"])
    assert begun == [1]
    with (tmp_path / file).open("a", encoding="utf-8") as stream:
        stream.write("alloc_conf: expandable_segments:True\n")
    head_start.before_composing(["prompt=a fox"])
    assert begun == [1]


@pytest.mark.parametrize(
    ("options", "starts"),
    [
        ([], True),
        (["memory=staged"], True),
        (["memory.alloc_conf=expandable_segments:True"], True),
        (["dry_run=true"], False),
        (["executor=process"], False),
    ],
)
def test_after_composing_the_config_decides(options, starts, monkeypatch):
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from zimage_runner.config.registry import register

    register()
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(variable, "")
    exported = []
    monkeypatch.setattr(torch_libraries, "begin", lambda: exported.append(os.environ["PYTORCH_ALLOC_CONF"]))
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = OmegaConf.to_object(compose("config", overrides=["prompt=a fox", *options]))
    head_start.after_composing(config)  # pyright: ignore[reportArgumentType]
    wanted = "expandable_segments:True" if "memory.alloc_conf" in str(options) else ""
    assert exported == ([wanted] if starts else [])


def test_planning_needs_the_linker_no_more(tmp_path):
    """Captions are counted while another thread is inside the linker."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = tmp_path / "slow.c", tmp_path / "slow.so"
    source.write_text("#include <unistd.h>\n__attribute__((constructor)) static void open(void) { sleep(3600); }\n")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    python(
        f"""
import os, threading, time
from zimage_runner import head_start, torch_libraries
from zimage_runner.engines.native.tokenizer import CaptionTokenizer
from zimage_runner.help import PACKAGE

opened = torch_libraries._dlopen()
torch_libraries.begin = lambda: threading.Thread(target=opened, args=({str(library)!r}, os.RTLD_NOW)).start()
head_start._begin()
time.sleep(0.2)
import PIL.Image
tokenizer = CaptionTokenizer(PACKAGE / "assets" / "zimage_nano" / "tokenizer")
assert all(tokenizer(["a red fox"], 512)) and all(tokenizer(["a red fox", "a blue fox"], 512))
os._exit(0)
"""
    )


def test_a_mistake_ends_the_process_without_waiting_for_the_linker():
    """Exit code and message arrive although a library never finishes opening."""
    code = """
import os, sys, threading
os.sched_getaffinity = lambda _: range(8)
from zimage_runner import __main__ as program, torch_libraries
torch_libraries._load = lambda package: threading.Event().wait()
sys.argv = ["zimage_runner", "prompt=a fox", "sampling.height=100"]
import atexit
atexit.register(lambda: print("waited"))
program.entry_point()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "sampling.height=100" in done.stderr
    assert done.stdout == ""
