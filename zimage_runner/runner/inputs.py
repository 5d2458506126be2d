"""The pictures that a run's items start from: which files its config and prompts name, and that each can be used."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from zimage_runner.config.schema import RunConfig
from zimage_runner.errors import UserError, check_range
from zimage_runner.model import PIXEL_MULTIPLE
from zimage_runner.pictures.opened import examine
from zimage_runner.prompts.base import Prompt
from zimage_runner.prompts.notes import warn_once
from zimage_runner.prompts.picture_values import picture_value, sides_of
from zimage_runner.sampling import (
    CANNY_HIGH,
    CANNY_LOW,
    CONTROL_SCALE,
    INPAINT_STRENGTH,
    MAX_SIDE,
    PICTURE_FIELDS,
    PICTURE_FILES,
    STRENGTH,
    Controlnet,
    Fit,
    Inputs,
    Picture,
    Preprocess,
    SamplingParams,
    nearest_side,
)
from zimage_runner.weights.find.controlnet import ControlNetFile

log = logging.getLogger(__name__)

MASK_BLUR = 4
VARIATION = 0.4
READERS = 4
"""Files that are decoded at a time: a large one takes a third of a gigabyte."""
MOST_OWN_PIXELS = 2048 * 2048
"""Pictures with more pixels are drawn with as many as the model usually draws."""
MOST_WHOLE, TILE = 2048, 1024
"""Pixels a side: a picture with a longer one is drawn in tiles of this side."""
SCALES = (0.01, 100.0)
"""Of a picture's own size; what is drawn has limits of its own."""
SAME_SHAPE = 0.02
"""How far the ratio of a mask's sides may be from its picture's."""
NEEDS_IMAGE = ("strength", "steps_after_strength", "mask", "outpaint", "scale", "tile")
NEEDS_MASK = ("mask_blur", "mask_grow", "mask_crop")
NEEDS_CONTROL = ("control_scale", "control_preprocess", "control_start", "control_end")
NEEDS_CANNY = ("canny_low", "canny_high")
CANNY = Preprocess.canny.value


class InputFinder:
    """Gives each prompt its pictures and its size. Every file is read once and checked, before anything is loaded."""

    def __init__(self, config: RunConfig, prompts: Sequence[Prompt], controlnet: ControlNetFile | None = None) -> None:
        """``controlnet``: what follows control pictures; None where the run has none."""
        self._model = config.model
        self._of_run = _of_run(config)
        sides = {name: getattr(config.sampling, name) for name in ("width", "height")}
        self._set_sides = {name: side for name, side in sides.items() if side is not None}
        self._controlnet = controlnet and Controlnet(
            digest=controlnet.digest,
            convention=config.model.controlnet_convention.value,
            path=str(controlnet.path),
            channels=controlnet.layout.channels,
        )
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="pictures")
        self._files: dict[tuple[str, bool], Future[Picture]] = {}
        for values, where in [(self._of_run, "sampling."), *((p.overrides, "") for p in prompts)]:
            for name in PICTURE_FILES:
                if values.get(name):
                    self._begin(name, values[name], where)
        _check_scale(self._of_run, {**self._of_run, **self._set_sides}, "sampling.")
        if self._of_run.get("image") or self._of_run.get("control_image"):
            self._inputs(self._of_run)  # what is wrong with the run's own is no prompt's fault

    def __call__(self, prompt: Prompt) -> Mapping[str, Any]:
        """Return ``inputs`` and, where nothing sets them, ``height`` and ``width``; nothing for a prompt without any.

        Raises UserError, which with the row's own fields does not name the row.
        """
        own = {name: value for name, value in prompt.overrides.items() if name in PICTURE_FIELDS}
        values = {**self._of_run, **own}
        _check_wanted(own, values, "")
        _check_scale(own, {**values, **self._set_sides, **prompt.overrides}, "")
        if not (values.get("image") or values.get("control_image")):
            varied = _varied(values)
            return {"inputs": Inputs(**varied)} if varied else {}
        inputs = self._inputs(values)
        size = self._size(inputs, prompt.overrides, values.get("scale"))
        known = {**self._model.recommended, **self._set_sides, **prompt.overrides, **size}
        sides = known["width"], known["height"]
        inputs = replace(inputs, tile=self._tile(values.get("tile"), *sides))
        if values.get("fit") is None and any(inputs.outpaint) and _is_cut(inputs.canvas, *sides):
            inputs = replace(inputs, fit=Fit.pad)  # what is painted around must be in the picture
        return {"inputs": self._with_result(inputs), **size}

    def close(self) -> None:
        """Stop reading ahead."""
        self._readers.shutdown(wait=False, cancel_futures=True)

    def check_used(self, drawn: Iterable[SamplingParams]) -> None:
        """Raise UserError for a setting of the run that no item takes: no option is ignored."""
        inputs = [params.inputs for params in drawn if params.inputs is not None]
        there = {
            "image": any(one.image for one in inputs),
            "mask": any(one.inpaints for one in inputs),
            "control_image": any(one.control_image for one in inputs),
            "variation_seed": next((one.variation_seed for one in inputs if one.variation_seed is not None), None),
            "control_preprocess": next((c for one in inputs if (c := one.control_preprocess.value) == CANNY), None),
        }
        _check_wanted(self._of_run, there, "sampling.")

    def _begin(self, name: str, path: str, where: str) -> None:
        key = (path, name == "mask")
        if key not in self._files:
            self._files[key] = self._readers.submit(examine, path, f"{where}{name}", is_mask=name == "mask")

    def _picture(self, name: str, values: Mapping[str, Any]) -> Picture | None:
        path = values.get(name)
        return self._files[path, name == "mask"].result() if path else None

    def _inputs(self, values: Mapping[str, Any]) -> Inputs:
        image, mask = self._picture("image", values), self._picture("mask", values)
        outpaint = sides_of(values.get("outpaint") or 0, "outpaint")
        inpaints = mask is not None or any(outpaint)
        if image and mask and abs(mask.width * image.height / (mask.height * image.width) - 1) > SAME_SHAPE:
            raise UserError(
                f"mask={mask.path} has {mask.width}x{mask.height} pixels and image={image.path} "
                f"{image.width}x{image.height}: use two pictures of one shape"
            )

        def said(name: str, otherwise: Any) -> Any:
            value = values.get(name)
            return otherwise if value is None else value

        return Inputs(
            image=image,
            strength=said("strength", INPAINT_STRENGTH if inpaints else STRENGTH) if image else 1.0,
            steps_after_strength=said("steps_after_strength", False) if image else False,
            fit=Fit[said("fit", Fit.crop.value)],
            mask=mask,
            mask_blur=said("mask_blur", MASK_BLUR) if inpaints else 0,
            mask_grow=said("mask_grow", 0) if inpaints else 0,
            mask_crop=values.get("mask_crop") if inpaints else None,
            outpaint=outpaint,
            **_varied(values),
            **(self._control(values, said) if values.get("control_image") else {}),
        )

    def _control(self, values: Mapping[str, Any], said: Callable[[str, Any], Any]) -> dict[str, Any]:
        if self._controlnet is None:
            raise UserError(
                f"control_image={values['control_image']} needs a ControlNet to follow it: set model.controlnet=FILE, "
                "or leave control_image out"
            )
        return {
            "control_image": self._picture("control_image", values),
            "control_scale": said("control_scale", CONTROL_SCALE),
            "control_preprocess": Preprocess[said("control_preprocess", Preprocess.none.value)],
            "canny_low": said("canny_low", min(CANNY_LOW, said("canny_high", CANNY_HIGH))),
            "canny_high": said("canny_high", max(CANNY_HIGH, said("canny_low", CANNY_LOW))),
            "control_start": said("control_start", 0.0),
            "control_end": said("control_end", 1.0),
            "controlnet": self._controlnet,
        }

    @staticmethod
    def _with_result(inputs: Inputs) -> Inputs:
        """Cropped to the mask, the finished picture is as large as the one that it starts from."""
        return inputs if inputs.mask_crop is None else replace(inputs, result=inputs.canvas)

    def _tile(self, tile: int | None, width: int, height: int) -> int:
        """The side of the tiles; 0 where the picture is drawn as a whole."""
        check_range("sampling.tile", tile or 0, 0, MAX_SIDE)
        if tile:
            if tile % PIXEL_MULTIPLE:
                raise UserError(f"sampling.tile={tile} is not a multiple of {PIXEL_MULTIPLE}: use {nearest_side(tile)}")
            if self._model.native_sizes and tile not in self._model.native_sizes:
                raise UserError(f"sampling.tile={tile} is no size that {self._model.name} draws: leave it out")
            return tile if max(width, height) > tile else 0
        if tile == 0:
            return 0
        if self._model.native_sizes:
            side = self._model.native_sizes[0]
            return side if min(width, height) >= side and max(width, height) > side else 0
        return TILE if max(width, height) > MOST_WHOLE else 0

    def _size(self, inputs: Inputs, overrides: Mapping[str, Any], scale: float | None) -> dict[str, int]:
        """Return the sides that nobody has set, from the picture's own."""
        sides = {name: overrides.get(name, self._set_sides.get(name)) for name in ("width", "height")}
        if None not in sides.values() or (inputs.mask_crop is not None and sides == {"width": None, "height": None}):
            return {}
        width, height = inputs.canvas
        if sides["width"]:
            return {"height": nearest_side(sides["width"] * height / width)}
        if sides["height"]:
            return {"width": nearest_side(sides["height"] * width / height)}
        if scale is not None:
            check_range("sampling.scale", scale, *SCALES)
            return {"width": nearest_side(width * scale), "height": nearest_side(height * scale)}
        own = {"width": width, "height": height}
        if width * height > MOST_OWN_PIXELS:
            usual = self._model.recommended["width"] * self._model.recommended["height"]
            smaller = (usual / (width * height)) ** 0.5
            own = {"width": round(width * smaller), "height": round(height * smaller)}
            warn_once(
                "large picture",
                f"{(inputs.image or inputs.control_image or _NO_PICTURE).path} has {width}x{height} pixels: pictures "
                f"of more than {MOST_OWN_PIXELS:,} are drawn in their shape with about {usual:,}; sampling.width and "
                "sampling.height set another size",
            )
        # Rounded down, a side is cut by a few pixels and nothing is computed anew.
        own = {name: max(PIXEL_MULTIPLE, side // PIXEL_MULTIPLE * PIXEL_MULTIPLE) for name, side in own.items()}
        try:
            self._model.check_size(own["height"], own["width"])
        except UserError:
            return {}  # of the few sizes that this model draws, the usual one
        return own


_NO_PICTURE = Picture(digest="", path="the picture", width=0, height=0)


def _is_cut(canvas: tuple[int, int], width: int, height: int) -> bool:
    """Whether fit=crop cuts more than rounding off a canvas that is drawn at width x height."""
    scale = max(width / canvas[0], height / canvas[1])
    return any(side * scale - drawn >= PIXEL_MULTIPLE for side, drawn in zip(canvas, (width, height), strict=True))


def _varied(values: Mapping[str, Any]) -> dict[str, Any]:
    """What mixes an item's noise with another seed's. Raises UserError for half of it."""
    seed, variation = values.get("variation_seed"), values.get("variation")
    if seed is None:
        return {}
    if not 0 <= seed < 2**63:
        raise UserError(f"variation_seed={seed} is out of range: use 0 to 9223372036854775807")
    return {"variation_seed": seed, "variation": VARIATION if variation is None else variation}


def _check_scale(given: Mapping[str, Any], values: Mapping[str, Any], prefix: str) -> None:
    """Raise UserError for a scale beside something else that says what size is drawn."""
    other = next((name for name in ("width", "height", "mask_crop") if values.get(name) is not None), None)
    if other is not None and given.get("scale") is not None:
        raise UserError(f"{prefix}scale={given['scale']:g} says nothing beside {other}: keep one of the two")


def _of_run(config: RunConfig) -> dict[str, Any]:
    """The run's own settings, files by absolute path."""
    values = {name: getattr(config.sampling, name) for name in PICTURE_FIELDS}
    values = {name: value for name, value in values.items() if value is not None}
    for name in PICTURE_FILES:
        if name in values and not values[name].strip():
            raise UserError(f"sampling.{name}='' is empty: name a picture file, or leave it out")
    return {name: picture_value(name, value, "sampling") for name, value in values.items()}


def _check_wanted(given: Mapping[str, Any], values: Mapping[str, Any], prefix: str) -> None:
    """Raise UserError for a field of ``given`` that says nothing without another one, which ``values`` lacks."""
    inpaints = values.get("mask") or any(sides_of(values.get("outpaint") or 0, "outpaint"))
    for names, there, what, add in (
        (NEEDS_IMAGE, values.get("image"), "an image", "image=FILE"),
        (NEEDS_MASK, inpaints, "a mask", "mask=FILE"),
        (("variation",), values.get("variation_seed") is not None, "a variation_seed", "variation_seed=1"),
        (NEEDS_CONTROL, values.get("control_image"), "a control_image", "control_image=FILE"),
        (NEEDS_CANNY, values.get("control_preprocess") == CANNY, f"control_preprocess={CANNY}", ""),
        (("fit",), values.get("image") or values.get("control_image"), "an image", "image=FILE"),
    ):
        for name in names:
            if given.get(name) not in (None, False, "0,0,0,0") and not there:
                short = os.path.basename(str(given[name])) if name in PICTURE_FILES else given[name]
                add = f"{prefix}{add}" if prefix and add else "it"
                raise UserError(f"{prefix}{name}={short} says nothing without {what}: add {add}, or leave {name} out")
