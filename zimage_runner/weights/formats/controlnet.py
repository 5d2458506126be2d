"""ControlNets of Z-Image in the layouts that alibaba-pai publishes: told apart by their tensors, never by their names.

All begin with an embedder of the condition and hold copies of the transformer's blocks, each with a projection behind
it whose output, the hint, is added to the transformer's residual stream after one of its layers (VideoX-Fun's
config/z_image/*.yaml; diffusers' models/controlnets/controlnet_z_image.py).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from zimage_runner.errors import UserError, counted
from zimage_runner.weights.formats.configs import ADALN_WIDTH, linear, transformer_block
from zimage_runner.weights.formats.relatives import is_adapter, kinds_of_names, refuse_names
from zimage_runner.weights.safetensors_file import TensorInfo

EMBEDDER = "control_all_x_embedder.2-1"
LAYERS, REFINER = "control_layers", "control_noise_refiner"
FIRST_PROJECTION = f"{REFINER}.0.before_proj.weight"
NEED = "give a ControlNet of Z-Image (alibaba-pai's Z-Image-Turbo-Fun-Controlnet-Union or Z-Image-Fun-...)"
PUBLISHED = {"dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "in_channels": 16, "qk_norm": True}
"""Fields of Z-Image's transformer/config.json, for a model that is not on this machine yet."""
_PLAIN = ("BF16", "F16", "F32")
_MARKERS = re.compile(r"(^|\.)(comfy_quant|scaled_fp8|weight_scale(_2)?|scale_weight|input_scale|scale_input)$")


class Refiner(enum.Enum):
    """What the condition goes through before the main blocks."""

    plain = "plain"
    """Blocks of its own that give no hints (Union 1.0)."""
    shared = "shared"
    """All control layers, which thus run twice; blocks stored for it are unused (Union 2.0)."""
    own = "own"
    """Control blocks of its own, whose hints the noise refiner is added (Union 2.1 and lite)."""


@dataclass(frozen=True, slots=True)
class ControlLayout:
    """What kind of ControlNet a file holds, for a certain transformer."""

    channels: int
    """Of the condition: the latents' 16, or 33: those, a mask and the latents of a picture."""
    places: tuple[int, ...]
    """Each control layer's place: the main block of the transformer whose output its hint is added to."""
    refiner: Refiner
    refiner_places: tuple[int, ...]
    """The same for the blocks of the noise refiner; empty where there are no such hints."""

    @property
    def name(self) -> str:
        """As its makers call it, for people."""
        version = {Refiner.plain: "1.0", Refiner.shared: "2.0", Refiner.own: "2.1"}[self.refiner]
        return f"Union {version}, {counted(len(self.places), 'control layer')}, {self.channels} channels"

    def record(self) -> dict[str, Any]:
        """Plain data that says which layout it is."""
        places = {"places": list(self.places), "refiner_places": list(self.refiner_places)}
        return {"channels": self.channels, "refiner": self.refiner.value} | places


def layout_of(
    file: str,
    tensors: Mapping[str, TensorInfo],
    transformer: Mapping[str, Any],
    projects: bool,
    config: Mapping[str, Any] | None = None,
) -> ControlLayout:
    """The layout of a ControlNet's tensors, all of which are checked against it.

    ``file`` names it in messages; ``transformer``: config.json of the transformer that it shall steer; ``projects``:
    whether FIRST_PROJECTION is there and not all zeros, which tells 2.1 from 2.0, whose tensors have the same names;
    ``config``: its own config.json, where it has one, whose layers' places are believed. Raises UserError, one line.
    """
    _refuse_foreign(file, tensors)
    count = 1 + max(int(match[1]) for name in tensors if (match := re.match(rf"{LAYERS}\.(\d{{1,3}})\.", name)))
    embedder = tensors.get(f"{EMBEDDER}.weight")
    if embedder is None or len(embedder.shape) != 2 or embedder.shape[1] % 4:
        raise UserError(f"{file} lacks {EMBEDDER}.weight, or its shape is odd: {NEED}")
    refiner = _refiner(tensors, projects)
    places, refiner_places = _places(file, count, refiner, transformer, config or {})
    layout = ControlLayout(embedder.shape[1] // 4, places, refiner, refiner_places)
    _check(file, layout, tensors, transformer)
    return layout


def is_controlnet(names: Mapping[str, object]) -> bool:
    """Whether the names are those of a ControlNet of Z-Image, whole or not."""
    return f"{LAYERS}.0.adaLN_modulation.0.weight" in names


def expected_shapes(layout: ControlLayout, transformer: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that is used; ``transformer``: config.json of the one that is steered."""
    return dict(_expected(layout, transformer))


def _refuse_foreign(file: str, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise UserError for what is no ControlNet of Z-Image, or one that is quantised."""
    if is_adapter(tensors):
        raise UserError(f"{file} is a LoRA or another adapter, not a ControlNet: use loras=[FILE]")
    if not is_controlnet(tensors):
        if any(name.startswith(("noise_refiner.", "model.diffusion_model.noise_refiner.")) for name in tensors):
            raise UserError(f"{file} is a transformer of Z-Image, not a ControlNet: use model.transformer=FILE")
        raise UserError(f"{file} is no ControlNet of Z-Image (it holds {kinds_of_names(list(tensors))}): {NEED}")
    for name, info in tensors.items():
        if _MARKERS.search(name) or info.dtype not in _PLAIN:
            raise UserError(
                f"{file}: {name} is stored as {info.dtype}: quantised ControlNets are not read, "
                "get the file in bf16, fp16 or fp32"
            )


def _refiner(tensors: Mapping[str, TensorInfo], projects: bool) -> Refiner:
    if not any(name.startswith(f"{REFINER}.") for name in tensors):
        return Refiner.shared  # as diffusers saves 2.0
    if f"{REFINER}.0.after_proj.weight" not in tensors and FIRST_PROJECTION not in tensors:
        return Refiner.plain
    return Refiner.own if projects else Refiner.shared


def _places(
    file: str, count: int, refiner: Refiner, transformer: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    layers, refiners = transformer["n_layers"], transformer["n_refiner_layers"]
    places = config.get("control_layers_places")
    if places is None:
        if count > layers or layers % count:
            raise UserError(
                f"{file} has {counted(count, 'control layer')} and the model {layers} layers, which do not tell where "
                "their hints go: made for another model? A directory with config.json can say control_layers_places"
            )
        places = range(0, layers, layers // count)
    refined = range(refiners) if refiner is not Refiner.plain else ()
    refined = (config.get("control_refiner_layers_places") or refined) if refined else ()
    for name, found, needed, limit in (
        ("control_layers_places", places, count, layers),
        ("control_refiner_layers_places", refined, refiners if refiner is Refiner.own else len(refined), refiners),
    ):
        numbers = list(found)
        if not all(type(place) is int and 0 <= place < limit for place in numbers) or sorted(set(numbers)) != numbers:
            raise UserError(f"{file}: config.json: {name}={numbers} are no ascending places of {limit} layers")
        if len(numbers) != needed or (numbers and numbers[0] != 0):
            raise UserError(f"{file}: config.json: {name}={numbers}: {needed} places, the first 0, were expected")
    if refiner is Refiner.shared and len(refined) > count:
        raise UserError(f"{file} has {counted(count, 'control layer')} for {refiners} refiner layers: made otherwise?")
    return tuple(places), tuple(refined)


def _check(file: str, layout: ControlLayout, tensors: Mapping[str, TensorInfo], transformer: Mapping[str, Any]) -> None:
    latents = transformer["in_channels"]
    if layout.channels not in (latents, 2 * latents + 1):
        raise UserError(
            f"{file}: {EMBEDDER}.weight takes {layout.channels} channels: need {latents} (a control picture) or "
            f"{2 * latents + 1} (with mask and picture)"
        )
    expected = expected_shapes(layout, transformer)
    optional = re.compile(rf"{REFINER}\..*") if layout.refiner is Refiner.shared else re.compile(r"$^")
    missing = [name for name in expected if name not in tensors]
    strays = [name for name in tensors if name not in expected and not optional.fullmatch(name)]
    wrong = [name for name, shape in expected.items() if name in tensors and tensors[name].shape != shape]
    refuse_names(file, str(file), "a ControlNet", missing, strays)
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{file}: {name} has the shape {list(tensors[name].shape)}, the model asks for {list(expected[name])}: "
            "made for another model?"
        )


def _expected(layout: ControlLayout, transformer: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor that is used."""
    config = {"qk_norm": True, **transformer}
    dim = config["dim"]
    width = min(dim, ADALN_WIDTH)
    yield from linear(EMBEDDER, dim, 4 * layout.channels)
    refiners = {Refiner.plain: config["n_refiner_layers"], Refiner.own: len(layout.refiner_places)}
    blocks = [(f"{REFINER}.{i}", layout.refiner is Refiner.own, i) for i in range(refiners.get(layout.refiner, 0))]
    blocks += [(f"{LAYERS}.{i}", True, i) for i in range(len(layout.places))]
    for name, projects, number in blocks:
        yield from transformer_block(name, config, width)
        if projects:
            yield from linear(f"{name}.after_proj", dim, dim)
            if number == 0:
                yield from linear(f"{name}.before_proj", dim, dim)
