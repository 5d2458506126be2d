"""SIGTERM and SIGINT while weights are downloaded, checked or prepared: one line, 130, nothing half-made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from tests.support.modelscope_server import ModelScopeServer, files_of
from zimage_runner.model import Model, Source
from zimage_runner.prepare import main as prepare
from zimage_runner.weights.find.resolve import EMBEDDED, resolve
from zimage_runner.weights.io import Threads

REPO = "some-maker/Z-Image-0.1"
SHARD = "transformer/diffusion_pytorch_model.safetensors"
RUN, PREPARE = "zimage_runner.__main__ import entry_point as main", "zimage_runner.prepare import main"


def script(main: str, setup: str = "pass") -> str:
    call = "main()" if main == RUN else "sys.exit(main(sys.argv[1:]))"
    return f"import sys, time\n{setup}\nfrom {main}\n{call}"


def signalled(
    code: str, argv: list[str], number: signal.Signals, ready: Callable[[], object], folder: Path
) -> tuple[int, str]:
    """Exit code and stderr of a process that gets a signal once ``ready``."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *argv],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)  # of a busy machine
    return process.returncode, err


def is_one_line(err: str, number: signal.Signals) -> bool:
    return err.strip() == f"{number.name}: stopping; once more to exit at once"


@pytest.mark.parametrize(
    ("main", "argv", "number"),
    [(RUN, ["prompt=a", "warmup=none"], signal.SIGTERM), (PREPARE, ["build"], signal.SIGINT),
     pytest.param(RUN, ["-m", "prompt='a','b'"], signal.SIGINT, marks=pytest.mark.slow),
     pytest.param(PREPARE, ["download"], signal.SIGTERM, marks=pytest.mark.slow)],
)  # fmt: skip
def test_download(monkeypatch, tmp_path, main: str, argv: list[str], number: signal.Signals) -> None:
    cache = tmp_path / "hub"
    with ModelScopeServer(REPO, {"master": files_of(EMBEDDED)}, stall_after={SHARD: 7_000_000}) as server:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.endpoint)
        monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "modelscope_home"))
        work = tmp_path / "work"
        work.mkdir()
        options = ["model=zimage_turbo", f"model.repo={REPO}", f"model.cache_dir={cache}"]
        code, err = signalled(script(main), [*argv, *options], number, server.stalled.is_set, work)
        assert code == 130
        assert f"\n{number.name}: stopping; once more to exit at once\n" in err
        assert "Traceback" not in err
        assert "exiting at once" not in err
        assert not list(work.rglob("records.jsonl"))
        server.requests.clear()
        from modelscope_hub.config import set_default_config

        set_default_config(None)
        model = Model(name="z", source=Source.modelscope, repo=REPO, cache_dir=str(cache))
        assert files_of(resolve(model).path) == files_of(EMBEDDED)
        assert [request.range is not None for request in server.requests if request.file == SHARD] == [True]


@pytest.mark.parametrize(
    ("number", "module", "packed"),
    [
        (signal.SIGTERM, "prepared.prepare", False),
        (signal.SIGINT, "packed.writer", True),
    ],
)
def test_preparing_removes_what_is_half_made(
    nano: Path, runner_cache: Path, tmp_path: Path, number: signal.Signals, module: str, packed: bool
) -> None:
    slow = (
        f"import zimage_runner.weights.{module} as module\nread = module.read_piece\n"
        f"from zimage_runner.weights.prepared import prepared\nprepared.reads_packed = lambda: {packed}\n"
        "module.read_piece = lambda piece: (time.sleep(0.5), read(piece))[1]"
    )
    half_made = runner_cache / "prepared"
    argv = ["build", "model=local", f"model.path={nano}", "model.verify=headers"]
    code, err = signalled(
        script(PREPARE, slow), argv, number, lambda: list(half_made.glob(".*.tmp/*/*.safetensors")), tmp_path
    )
    assert code == 130
    assert [line for line in err.splitlines() if line.strip() and "prepare " not in line] == [
        f"{number.name}: stopping; once more to exit at once"
    ]
    assert [path for path in half_made.iterdir() if path.is_dir()] == []
    assert prepare(argv) == 0
    assert len([path for path in half_made.iterdir() if path.is_dir()]) == 1


@pytest.mark.parametrize(
    ("main", "argv"), [(PREPARE, ["verify"]), (RUN, ["prompt=a", "model.verify=always"])], ids=["prepare", "run"]
)
def test_checking_digests(nano: Path, runner_cache: Path, tmp_path: Path, main: str, argv: list[str]) -> None:
    begun = tmp_path / "begun"
    slow = (
        "from pathlib import Path\nfrom zimage_runner.weights.find import verify\nverify.PIECE = 64\n"
        "check = verify.Threads.check\n"
        f"verify.Threads.check = lambda pool: (Path({str(begun)!r}).touch(), time.sleep(0.01), check(pool))"
    )
    argv = [*argv, "model=local", f"model.path={nano}"]
    code, err = signalled(script(main, slow), argv, signal.SIGTERM, begun.exists, tmp_path)
    assert code == 130
    assert is_one_line(err, signal.SIGTERM)
    assert not (tmp_path / "outputs").exists()
    assert not (runner_cache / "sha256").exists()


def test_threads_drop_what_has_not_begun() -> None:
    begun: list[int] = []
    first = threading.Event()

    def work(n: int) -> None:
        begun.append(n)
        first.set()
        while True:
            time.sleep(0.001)
            pool.check()

    def interrupted() -> None:
        with pool:
            futures.extend(pool.submit(work, n) for n in range(10))
            first.wait()
            raise KeyboardInterrupt

    pool, futures = Threads(2), []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert begun in ([0], [0, 1], [1, 0])
    assert all(future.cancelled() or isinstance(future.exception(), CancelledError) for future in futures)


def test_threads_finish_without_an_exception() -> None:
    with Threads(2) as pool:
        futures = [pool.submit(os.getpid) for _ in range(20)]
    assert {future.result() for future in futures} == {os.getpid()}
