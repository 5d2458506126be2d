"""Scenes as they are drawn, and finding the picture again."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from training.captions import COLORS
from training.cases import Case, load_cases, load_reference
from training.evaluate import by_phrasing, choose
from training.render import TINTS, Poser, Renderer, poses
from training.retrieval import PictureIndex
from training.scoring import Judge

REFERENCE = Path(__file__).parents[2] / "training" / "reference"
ONE, NONE = torch.tensor(1.0), -1


@pytest.fixture(scope="module")
def thumbs() -> Tensor:
    """40 pictures spread over all."""
    return load_reference(REFERENCE)[0][::34][:40]


@pytest.fixture(scope="module")
def render(thumbs: Tensor) -> Renderer:
    return Renderer(thumbs, "cpu", 48)


def draw(render: Renderer, *things: int, tint: int = NONE, back: int = NONE, pose: Tensor | None = None) -> Tensor:
    """One scene of one or two things."""
    slots = torch.tensor([[*things, NONE][:2]])
    tints = torch.where(slots >= 0, tint, NONE)
    pose = Poser([True], "cpu").canonical(slots) if pose is None else pose
    return render(slots, tints, torch.tensor([back]), pose)[0]


def single(flip: float = 1, tilt: float = 0, scale: float = 0.9, x: float = 0, y: float = 0) -> Tensor:
    """A pose for the first slot of one scene."""
    return poses(*(torch.tensor([[value, value]]) for value in (flip, tilt, scale, x, y)))


def test_white_around_one_thing(render: Renderer) -> None:
    picture = draw(render, 3)
    assert (picture[:, 0] == 1).all()
    assert picture[:, 10:-10, 10:-10].min() < 0.5


def test_mirrored_twice_is_the_same(render: Renderer) -> None:
    mirrored = draw(render, 3, pose=single(flip=-1))
    assert torch.allclose(mirrored.flip(-1), draw(render, 3, pose=single()), atol=1e-4)


def test_moves_the_way_the_pose_says(render: Renderer) -> None:
    def centre(picture: Tensor, axis: int) -> float:
        ink = (1 - picture).sum(0).sum(1 - axis)
        return ((ink * torch.linspace(-1, 1, len(ink))).sum() / ink.sum()).item()

    for axis, move in ((1, {"x": 0.2}), (0, {"y": 0.2})):
        change = centre(draw(render, 3, pose=single(scale=0.6, **move)), axis) - centre(
            draw(render, 3, pose=single(scale=0.6)), axis
        )
        assert change == pytest.approx(0.2, abs=0.02)


def test_two_things_keep_to_their_halves(render: Renderer) -> None:
    both = draw(render, 3, 7)
    assert torch.allclose(both[..., :24], draw(render, 3, 3)[..., :24], atol=1e-4)
    assert torch.allclose(both[..., 24:], draw(render, 7, 7)[..., 24:], atol=1e-4)


@pytest.mark.parametrize("name", COLORS)
def test_tints_have_their_colour(render: Renderer, name: str) -> None:
    picture = (draw(render, 3, tint=COLORS.index(name)) + 1) / 2
    ink = picture.flatten(1)[:, (picture < 0.97).any(0).flatten()] if name != "white" else picture.flatten(1)
    wanted = torch.tensor(TINTS[COLORS.index(name)])
    distances = [(ink.mean(1) - torch.tensor(t)).norm() for t in TINTS]
    assert (ink.mean(1) - wanted).norm() <= min(distances) + 0.15
    if name == "blue":
        assert ink.mean(1).argmax() == 2


def test_backdrops_fill_what_the_thing_leaves(render: Renderer) -> None:
    picture = draw(render, 3, back=COLORS.index("blue"))
    assert picture[2, 0, 0] > 0.5
    assert picture[0, 0, 0] < 0


def test_poses_stay_in_range_and_mirror_only_what_may_be() -> None:
    things = torch.tensor([[0, NONE], [1, NONE], [0, 1]]).repeat(400, 1)
    pose = Poser([True, False], "cpu").training(things)
    first, pair = pose[0::3, 0], pose[2::3]
    assert {-1.0, 1.0} == set(first[:, 0].tolist())
    assert (pose[1::3, 0, 0] == 1).all()
    assert (pose[..., 1].abs() <= math.radians(10) + 1e-6).all()
    assert ((first[:, 2] >= 0.82) & (first[:, 2] <= 0.98)).all()
    assert (pair[:, 0, 3] < 0).all()
    assert (pair[:, 1, 3] > 0).all()


def test_a_picture_is_found_again_in_any_pose(thumbs: Tensor, render: Renderer) -> None:
    index = PictureIndex(thumbs, [True] * len(thumbs))
    things = torch.arange(0, len(thumbs), 4)
    slots = torch.stack([things, torch.full_like(things, NONE)], 1)
    torch.manual_seed(0)
    pictures = render(slots, torch.full_like(slots, NONE), slots[:, 1], Poser([True] * 40, "cpu").training(slots))
    match = index.search(pictures)
    assert (match.order[:, 0] == things).all()
    assert match.distance[:, 0].median() < 0.05


def test_a_mirrored_arrow_is_another_picture(thumbs: Tensor, render: Renderer) -> None:
    mirrored = draw(render, 3, pose=single(flip=-1))[None]
    free = PictureIndex(thumbs, [True] * 40).search(mirrored).distance[0, 0]
    fixed = PictureIndex(thumbs, [False] * 40).search(mirrored).distance[0, 0]
    assert fixed > 2 * free


def test_scores_of_right_and_wrong_pictures(thumbs: Tensor, render: Renderer) -> None:
    judge = Judge(thumbs, [True] * 40)
    pictures = torch.stack([draw(render, k) for k in (3, 7, 11, 15)])
    cases = [Case("en_label", f"{k}", [[right]], phrasing=k % 2) for k, right in enumerate((3, 7, 11, 16))]
    score = judge.score(cases, pictures)
    assert (score.top1, score.misses) == (0.75, ["3"])
    assert list(by_phrasing(cases, score.misses).values()) == ["1 of 2"]
    pair = [Case("pairs", "", [[3], [7]]), Case("pairs", "", [[7], [3]])]
    sides = judge.score(pair, torch.stack([draw(render, 3, 7)] * 2))
    assert (sides.top1, sides.parts["left"], sides.parts["right"]) == (0.5, 0.5, 0.5)


def test_committed_cases_are_drawn_evenly() -> None:
    cases = load_cases(REFERENCE)
    some, seeds, steps = choose(cases, "en_label@4", 60)
    assert (len(some), steps) == (60, 4)
    assert [cases[s].prompt for s in seeds] == [c.prompt for c in some]
    assert len({c.phrasing for c in some}) > 20
    assert choose(cases, "en_label@4", 60)[1] == seeds
