"""Every placement draws the same pictures: moving weights about changes no arithmetic."""

from __future__ import annotations

import pytest

from tests.support.drawing import SMALL, draw, largest_difference
from tests.support.free_memory import with_room
from zimage_runner.engines.diffusers import engine as diffusers_engine
from zimage_runner.errors import UserError
from zimage_runner.memory.policies import (
    Auto,
    GroupOffload,
    Loading,
    ModelOffload,
    OffloadType,
    Resident,
    SequentialOffload,
    Staged,
)

PLACEMENTS = {
    "staged": Staged,
    "model_offload": ModelOffload,
    "group_offload": GroupOffload,
    "group_offload_two_blocks": lambda: GroupOffload(use_stream=False, num_blocks_per_group=2),
    "group_offload_leaves": lambda: GroupOffload(offload_type=OffloadType.leaf_level),
    "cpu_then_gpu": lambda: Resident(loading=Loading.cpu_then_gpu),
    "as_the_article_loads": lambda: Resident(device_map="cpu"),
    "staged_as_the_article_loads": lambda: Staged(device_map="cpu"),
    "slow_init": lambda: Resident(low_cpu_mem_usage=False),
}


@pytest.fixture(scope="module")
def resident() -> dict[str, bytes]:
    return draw(Resident(), params=SMALL)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_placement_draws_the_same_pictures(name: str, resident: dict[str, bytes]) -> None:
    assert draw(PLACEMENTS[name](), params=SMALL) == resident


def test_auto_draws_the_same_pictures(resident: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = with_room(monkeypatch, diffusers_engine, Staged)
    assert draw(Auto(), params=SMALL) == resident
    assert asked == [Auto()]


def test_vae_slicing_only_rounds_differently(resident: dict[str, bytes]) -> None:
    """The convolutions of a batch of two and of one are summed in another order."""
    assert largest_difference(draw(Resident(vae_slicing=True), params=SMALL), resident) <= 1


def test_sequential_offload_is_refused_on_the_cpu() -> None:
    with pytest.raises(UserError, match=r"memory=sequential_offload needs a GPU.*memory=resident"):
        draw(SequentialOffload(), params=SMALL)


def test_pictures_differ_between_seeds_and_prompts(resident: dict[str, bytes]) -> None:
    assert len(set(resident.values())) == 4
