"""Cells about pictures that a prompt starts from: names of files, strengths, pixels."""

from __future__ import annotations

import enum
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zimage_runner.errors import UserError, one_line
from zimage_runner.prompts.text import check_characters
from zimage_runner.sampling import PICTURE_FILES, Fit, Preprocess

NUMBERS = {
    "strength": float, "mask_blur": int, "mask_grow": int, "mask_crop": int, "scale": float, "tile": int,
    "variation": float, "variation_seed": int, "control_scale": float, "canny_low": int, "canny_high": int,
    "control_start": float, "control_end": float,
}  # fmt: skip
CHOICES: dict[str, type[enum.Enum]] = {"fit": Fit, "control_preprocess": Preprocess}
TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def picture_value(name: str, value: object, where: str, folder: Path = Path()) -> str | int | float | bool:
    """Return a cell as the value of a field of ``sampling.PICTURE_FIELDS``. Raises UserError.

    Files become absolute paths: ``~`` is the home directory, other names start in ``folder``.
    """
    if name in PICTURE_FILES:
        return _file(name, value, where, folder)
    if name in NUMBERS:
        return _number(name, value, where, NUMBERS[name])
    text = one_line(str(value.value if isinstance(value, enum.Enum) else value), 60).strip().lower()
    if name == "steps_after_strength":
        if text not in TRUTHS:
            raise UserError(f"{where}: {name}={short(value)}: write true or false")
        return TRUTHS[text]
    if name in CHOICES:
        choices = CHOICES[name].__members__
        if text not in choices:
            raise UserError(f"{where}: {name}={short(value)}: write {', '.join(choices)}")
        return text
    return ",".join(map(str, sides_of(value, f"{where}: {name}")))


def as_chosen(name: str, value: Any) -> Any:
    """Return the value of a field of ``sampling.Sampling``: of those with choices, the choice of that name."""
    return CHOICES[name][value] if name in CHOICES and isinstance(value, str) else value


def sides_of(value: object, where: str) -> tuple[int, int, int, int]:
    """Read ``outpaint``: pixels at the left, top, right and bottom, or one number for all. Raises UserError."""
    entries = value if isinstance(value, list | tuple) else str(value).split(",")
    numbers = [finite(entry) for entry in entries]
    whole = [int(number) for number in numbers if number is not None and number == int(number) and number >= 0]
    if len(whole) != len(numbers) or len(whole) not in (1, 4):
        raise UserError(f'{where}={short(value)}: write "left,top,right,bottom" in pixels, or one number')
    left, top, right, bottom = whole * 4 if len(whole) == 1 else whole
    return left, top, right, bottom


def _file(name: str, value: object, where: str, folder: Path) -> str:
    if not isinstance(value, str):
        what = "holds pictures, not names of files" if isinstance(value, dict | bytes) else "is no file name"
        raise UserError(f"{where}: {name}={short(value)} {what}: carry it with prompts.metadata, or leave it out")
    check_characters(value, f"{where}: {name}")
    path = os.path.expanduser(value.strip())
    return os.path.abspath(folder / path)


def _number(name: str, value: object, where: str, kind: Callable[[float], Any]) -> Any:
    number = finite(value)
    if number is None or kind(number) != number:
        raise UserError(f"{where}: {name}={short(value)} is not {'an integer' if kind is int else 'a number'}")
    return kind(number)


def finite(value: object) -> float | int | None:
    """A finite number, or None."""
    if isinstance(value, str):
        try:
            value = float(value) if len(value) < 40 else None
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if isinstance(value, int) or math.isfinite(value) else None


def short(value: object) -> str:
    """The value as Python writes it, cut to a length that fits into a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints, a bottomless list
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 60 else f"{text[:57]}..."
