"""Warm-up visits every shape that the work will have, so that nothing is planned or recorded during the work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., tuple[int, str, str]]

PROMPTS = ["short", "words " * 40, "words " * 41, "words " * 90]
"""Of three padded caption lengths."""


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Shapes of the native transformer's calls, in order; pictures decoded are None."""
    from zimage_runner.engines.native.graphs import GraphCache
    from zimage_runner.engines.native.model import NativeModel

    calls: list[Any] = []
    forward, decode = GraphCache.call, NativeModel.decode

    def recorded_forward(self: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(key)
        return forward(self, key, *args, **kwargs)

    def recorded_decode(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(GraphCache, "call", recorded_forward)
    monkeypatch.setattr(NativeModel, "decode", recorded_decode)
    return calls


def warm_and_work(cli: Cli, forwards: list[Any], *argv: str) -> tuple[list[Any], list[Any], list[str]]:
    """Calls of the warm-up, calls of the work, and what the warm-up's passes were called."""
    Path("p.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    code, out, err = cli(
        "prompts=text_file", "prompts.path=p.txt", "engine=native", "sampling.num_inference_steps=2",
        "warmup=generate", *argv,
    )  # fmt: skip
    assert code == 0, err
    passes = json.loads((Path(out.splitlines()[-1]) / "summary.json").read_text(encoding="utf-8"))["session"][
        "warmup_passes"
    ]
    work = len(forwards) - len(PROMPTS) * 3  # two steps and a decoder's call for each picture
    return forwards[:work], forwards[work:], [p["label"] for p in passes]


def test_every_caption_length_is_warm_for_the_native_engine(cli: Cli, forwards: list[Any]) -> None:
    warm, work, labels = warm_and_work(cli, forwards)
    assert len({key for key in work if key}) == 3
    assert {key for key in work if key} == {key for key in warm if key}
    assert labels == ["128x128 c96 #1", "128x128 c64 #1", "128x128 c32 #1"]
    assert [key is None for key in warm] == [False, False, True, False, False]  # one picture, then a step each


def test_every_pass_visits_every_length(cli: Cli, forwards: list[Any]) -> None:
    warm, work, labels = warm_and_work(cli, forwards, "warmup.passes=2")
    assert all(warm.count(key) >= 2 for key in set(work))
    assert len(labels) == 6
