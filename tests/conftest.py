"""Fixtures for the whole suite."""

from __future__ import annotations

import gc
import logging
import os
import signal
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support import NANO

try:
    from hypothesis import settings
except ImportError:  # a borrowed GPU machine has pytest and runs tests that draw no examples
    pass
else:  # the same examples every time, however busy the machine; for others: --hypothesis-profile=explore
    settings.register_profile("suite", deadline=None, derandomize=True)
    settings.register_profile("explore", deadline=None, print_blob=True)
    settings.load_profile("suite")

# A borrowed GPU machine may lack packages that some modules import and none of the tests marked gpu needs.
_NEEDED = {
    "gguf": ("weights/formats/test_gguf_files.py", "weights/test_parts.py", "weights/test_prepared_files.py"),
    "cryptography": ("weights/test_modelscope.py",),
}
collect_ignore = [name for package, names in _NEEDED.items() if find_spec(package) is None for name in names]

# Two workers share two cores: threads of one would only get in the other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What a person's own cache holds, prepared copies say, is no business of the tests, and theirs none of the cache's. The
# workers have the folder of the process that starts them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="zimage_runner_tests_", ignore_cleanup_errors=True)
    os.environ["ZIMAGE_RUNNER_CACHE"] = _cache.name

# Collecting imports half a million objects, none of which is garbage: nothing looks through them meanwhile.
gc.disable()

# A shell that runs the suite in the background has it ignore SIGINT, and so every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _no_walks_over_the_libraries() -> None:
    """Engines that close collect garbage; what earlier modules imported is half a million objects to look through."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _composing_is_quick() -> None:
    try:
        from zimage_runner.cli.hydra_patches import keep_what_was_composed
    except ImportError:  # on a borrowed GPU machine there may be no Hydra
        return
    keep_what_was_composed()


@pytest.fixture(scope="session", autouse=True)
def _the_power_stays_on() -> Iterator[None]:
    """Nothing waits for the disk in this process. What a power cut leaves is tested with fsyncs that are noted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: (os.fstat(file), None)[1])  # OSError for one that is closed
        yield


SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU")]


@pytest.fixture(autouse=True)
def _process_as_it_was() -> Iterator[None]:
    """What Hydra's --info sets up (every library's debug lines) ends with the test, and so do answers to signals: a
    worker of Ray, say, ignores them, and so would every process that is started later."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    answers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for number, answer in answers.items():
        if answer is not None and signal.getsignal(number) is not answer:
            signal.signal(number, answer)


@pytest.fixture(scope="module")
def model_stays() -> Iterator[None]:
    """The model stays loaded between the commands of this module that need the same session, as executor=resident does.

    For modules that draw again and again, and in which loading is not what is tested.
    """
    from zimage_runner.runner import pool

    class Silent(pool.Kept):
        def tell_swap(self, spec: object) -> None:
            pass

    pool._kept = kept = Silent()
    yield
    pool._kept = None
    kept.close()


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the embedded one's form, for tests that convert whole checkpoints. Nobody writes into it."""
    from tests.support.small_checkpoint import write_small

    return write_small(tmp_path_factory.mktemp("small") / "nano")


@pytest.fixture
def nano() -> Path:
    """The embedded checkpoint."""
    return NANO


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Run one command line in this process, in an empty folder: (exit code, stdout, stderr)."""
    from zimage_runner.cli.main import main

    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(argv)
        out, err = capfd.readouterr()
        return code, out, err

    return run
