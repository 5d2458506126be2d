"""The weights of a run on another node: at the same path, at another, other ones."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from zimage_runner.errors import UserError
from zimage_runner.model import Model, Source
from zimage_runner.weights.find.elsewhere import on_this_machine
from zimage_runner.weights.find.resolve import resolve


@pytest.fixture
def copied(nano: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(nano, tmp_path / "weights"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIMAGE_RUNNER_CACHE", str(tmp_path / "cache"))


def test_the_same_path_is_taken(copied):
    model = Model(name="nano", path=str(copied), source=Source.local)
    checkpoint = resolve(model)
    assert on_this_machine(model, checkpoint) is checkpoint


def test_where_the_path_is_missing_the_model_is_found_as_it_is_named(copied, tmp_path):
    model = Model(name="nano", path=str(copied), source=Source.local)
    checkpoint = replace(resolve(model), path=tmp_path / "only_on_the_driver", revision="theirs")
    found = on_this_machine(model, checkpoint)
    assert (found.path, found.digest, found.revision) == (copied, checkpoint.digest, "theirs")


def test_other_weights_are_refused(copied):
    model = Model(name="nano", path=str(copied), source=Source.local)
    checkpoint = replace(resolve(model), digest="0" * 64)
    with pytest.raises(UserError, match="on this node holds other weights"):
        on_this_machine(model, checkpoint)
