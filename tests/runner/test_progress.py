"""Lines that tell how far a run has come: often at first, seldom later, with the recent speed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zimage_runner.executors.base import Batch
from zimage_runner.runner import progress
from zimage_runner.runner.progress import FIRST_SECONDS, LONGEST_SECONDS, ProgressLog
from zimage_runner.runner.run import Run


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_it_says_and_when() -> None:
    clock = Clock()
    progress = ProgressLog(planned=100_000, settled=1000, clock=clock)
    assert progress.line(1050) is None
    clock.now = 60.0
    assert progress.line(1100) == "1,100 of 100,000 pictures (1.1%), 0.60 s each, about 16.5 h left"
    clock.now = 119.0
    assert progress.line(1190) is None
    clock.now = 121.0
    assert progress.line(1161) == "1,161 of 100,000 pictures (1.2%), 1.00 s each, about 27.5 h left"
    clock.now = 500.0
    assert progress.line(1161) is None, "nothing new to tell"
    assert progress.line(100_000) is None, "the summary tells that"


@given(st.floats(0.5, 600.0))
def test_a_week_is_told_in_a_few_hundred_lines(seconds_each: float) -> None:
    clock = Clock()
    planned = int(7 * 86_400 / seconds_each)
    progress = ProgressLog(planned=planned, settled=0, clock=clock)
    times = []
    for settled in range(1, planned, max(1, int(30 / seconds_each))):
        clock.now = settled * seconds_each
        if progress.line(settled):
            times.append(clock.now)
    gaps = [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]
    assert len(times) < 500
    assert min(gaps) >= FIRST_SECONDS
    assert max(gaps) <= LONGEST_SECONDS + max(60.0, 2 * seconds_each)


def test_a_run_without_a_terminal_tells_it(cli, monkeypatch, tmp_path) -> None:
    told = threading.Event()

    def line(_: ProgressLog, settled: int) -> str:
        told.set()
        return f"{settled} by now"

    def batches(run: Run, own: Callable[[Run], Iterator[Batch]] = Run._batches) -> Iterator[Batch]:
        *first, last = own(run)
        yield from first
        assert told.wait(60), "pictures are drawn, and none of them is told of"
        yield last

    monkeypatch.setattr(ProgressLog, "line", line)
    monkeypatch.setattr(Run, "_batches", batches)
    code, _, err = cli("prompts=emoji", "prompts.limit=6", "sampling.num_inference_steps=1")
    assert code == 0, err
    lines = [line for line in err.splitlines() if line.endswith("by now")]
    assert lines, err
    (log,) = tmp_path.glob("outputs/*/*/run.log")
    assert all(line in log.read_text(encoding="utf-8") for line in lines)


def test_a_terminal_that_is_gone_is_free_for_the_next_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        n = 0

        def close(self) -> None:
            raise OSError("Input/output error")

    monkeypatch.setattr(progress, "tqdm", lambda **_: Gone())
    first = progress.ProgressDisplay(planned=1, settled=0)
    first.open()
    with pytest.raises(OSError, match="Input"):
        first.close()
    second = progress.ProgressDisplay(planned=1, settled=0)
    second.open()
    assert second._bar is not None
    with pytest.raises(OSError, match="Input"):
        second.close()
    assert not progress._terminal.locked()
