"""What a record says of its pictures gives the same inputs again."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from zimage_runner.errors import UserError
from zimage_runner.pictures.opened import examine
from zimage_runner.pictures.recorded import recorded_values
from zimage_runner.sampling import Fit, Inputs, Picture


@pytest.fixture
def picture(tmp_path: Path) -> Picture:
    Image.new("RGB", (32, 32), "white").save(tmp_path / "a.png")
    return examine(str(tmp_path / "a.png"), "image")


def test_what_is_neutral_is_said_where_something_else_would_hold(picture: Picture) -> None:
    inputs = Inputs(image=picture, mask=picture, fit=Fit.pad, outpaint=(1, 2, 3, 4), variation_seed=5)
    assert recorded_values(inputs.record(), "x.png") == {
        "image": picture.path, "mask": picture.path, "fit": "pad", "outpaint": "1,2,3,4", "variation_seed": 5,
        "strength": 1.0, "tile": 0, "mask_blur": 0, "variation": 1.0,
    }  # fmt: skip
    assert recorded_values(Inputs(variation_seed=5, variation=0.3).record(), "x") == {
        "variation_seed": 5, "variation": 0.3,
    }  # fmt: skip
    assert recorded_values({}, "x.png") == {}


def test_what_is_set_anew_need_not_be_there(picture: Picture) -> None:
    record = Inputs(image=picture, strength=0.5).record()
    Path(picture.path).unlink()
    with pytest.raises(UserError, match=r"x.png: drawn from image .*a.png \(sha256 .*\), which is not there: sampling"):
        recorded_values(record, "x.png")
    assert recorded_values(record, "x.png", frozenset({"image"})) == {"strength": 0.5, "tile": 0}


@pytest.mark.parametrize("record", ["text", {"image": 3}, {"image": {"path": "x"}}])
def test_what_nobody_wrote_is_refused(record: object) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        recorded_values(record, "x.png")
