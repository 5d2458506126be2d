"""What other programs write into their pictures: AUTOMATIC1111's ``parameters`` text and ComfyUI's graph."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zimage_runner.errors import UserError

OWN_PROGRAM = "zimage_runner"
# Bounds, so that a long text without a colon costs no more than its length.
_PAIR = re.compile(r'([\w \-/]{1,100}):\s{0,20}("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")
_A1111 = {"Steps": "num_inference_steps", "CFG scale": "guidance_scale", "Seed": "seeds"}
_OF_PICTURES = ("Denoising strength", "Mask blur", "ControlNet")
_TEXTS = ("text", "prompt", "string", "value")
"""Inputs of ComfyUI's nodes that hold a text, or lead to a node that does."""
_NUMBERS = ("value", "seed", "noise_seed", "int", "float", "number", "width", "height")
_ABOVE = ("conditioning", "samples", "latent", "positive")
"""Inputs that lead on to where text or size come from."""
_DEEPEST = 32


@dataclass(kw_only=True, slots=True)
class GenerationData:
    """What a picture says of how it was drawn; values are as they stand in it, not yet checked."""

    text: str
    values: dict[str, Any] = field(default_factory=dict)
    """By sampling field, and ``seeds``."""
    is_cfg: bool = False
    """The guidance is other tools' CFG scale, where 1 is none."""
    program: str = "another program"
    of_pictures: tuple[str, ...] = ()
    """What it says of a picture that was started from or followed, which it does not name."""


def has_infotext(parameters: str | None) -> bool:
    """Whether ``parameters`` is AUTOMATIC1111's text; SwarmUI and Fooocus write a JSON object there."""
    try:
        return bool(parameters) and not isinstance(json.loads(parameters), dict)
    except (ValueError, RecursionError):
        return True


def of_parameters(text: str) -> GenerationData:
    """AUTOMATIC1111's text: the prompt, ``Negative prompt: ...``, then ``Steps: 8, Sampler: ..., Seed: ...``."""
    lines = text.split("\n")
    last = next((n for n in range(len(lines) - 1, -1, -1) if lines[n].startswith("Steps: ")), len(lines))
    pairs = {name.strip(): _unquoted(value.strip()) for name, value in _PAIR.findall("".join(lines[last : last + 1]))}
    values: dict[str, Any] = {ours: pairs[theirs] for theirs, ours in _A1111.items() if theirs in pairs}
    if size := _SIZE.fullmatch(pairs.get("Size", "")):
        values |= {"width": size[1], "height": size[2]}
    words = "\n".join(lines[:last])
    prompt, marked, negative = f"\n{words}".partition("\nNegative prompt:")
    if marked:
        values["negative_prompt"] = negative.strip()
    own = pairs.get("Version", "").startswith(OWN_PROGRAM)
    return GenerationData(
        text=prompt.strip(),
        values=values,
        is_cfg=not own,
        program=OWN_PROGRAM if own else "another program",
        of_pictures=tuple(name for name in map(str.strip, pairs) if name.startswith(_OF_PICTURES)),
    )


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def of_comfyui(text: str, where: str) -> GenerationData:
    """ComfyUI's graph of a picture with one sampler whose prompt and size are given in nodes. Raises UserError."""
    graph = _graph(text, where)
    samplers = [
        inputs for node in graph.values() if {"steps", "positive", "latent_image"} <= (inputs := _inputs(node)).keys()
    ]
    if len(samplers) != 1:
        raise UserError(
            f"{where}: its ComfyUI graph has {len(samplers)} samplers, and graphs with one are read: write its prompt "
            "into a text file"
        )
    (sampler,) = samplers
    prompt = _text(graph, sampler["positive"])
    if not prompt:
        raise UserError(
            f"{where}: no prompt is found in its ComfyUI graph, where other nodes make it: write it into a text file"
        )
    negative, size = _text(graph, sampler.get("negative")), _node_with(graph, sampler["latent_image"], "width")
    values = {
        "num_inference_steps": _number(graph, sampler["steps"]),
        "guidance_scale": _number(graph, sampler.get("cfg")),
        "seeds": _number(graph, sampler.get("seed", sampler.get("noise_seed"))),
        "negative_prompt": negative,
        "width": _number(graph, size.get("width")),
        "height": _number(graph, size.get("height")),
    }
    given = {name: value for name, value in values.items() if value not in (None, "")}
    return GenerationData(text=prompt, values=given, is_cfg=True, program="ComfyUI")


def _graph(text: str, where: str) -> Mapping[str, Any]:
    try:
        graph = json.loads(text)
    except (ValueError, RecursionError):
        graph = None
    if not isinstance(graph, dict):
        raise UserError(f"{where}: its ComfyUI graph is damaged: write its prompt into a text file")
    return graph


def _inputs(node: Any) -> Mapping[str, Any]:
    inputs = node.get("inputs") if isinstance(node, dict) else None
    return inputs if isinstance(inputs, dict) else {}


def _followed(graph: Mapping[str, Any], link: Any) -> Any:
    """The node that an input comes from; None where it is a value."""
    return graph.get(str(link[0])) if isinstance(link, list) and len(link) == 2 else None


def _text(graph: Mapping[str, Any], link: Any, depth: int = 0) -> str | None:
    """The text that an input stands for; None where it is not found."""
    if isinstance(link, str):
        return link
    node = _followed(graph, link)
    if node is None or depth > _DEEPEST or (isinstance(node, dict) and node.get("class_type") == "ConditioningZeroOut"):
        return None
    inputs = _inputs(node)
    found = (_text(graph, inputs[name], depth + 1) for name in (*_TEXTS, *_ABOVE) if name in inputs)
    return next((text for text in found if text is not None), None)


def _number(graph: Mapping[str, Any], value: Any, depth: int = 0) -> int | float | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    inputs = _inputs(_followed(graph, value))
    if depth > _DEEPEST:
        return None
    found = (_number(graph, inputs[name], depth + 1) for name in _NUMBERS if name in inputs)
    return next((number for number in found if number is not None), None)


def _node_with(graph: Mapping[str, Any], link: Any, name: str, depth: int = 0) -> Mapping[str, Any]:
    """The inputs of the first node, upwards from a link, that has one of this name; nothing if there is none."""
    inputs = _inputs(_followed(graph, link))
    if name in inputs or depth > _DEEPEST:
        return inputs
    above = (_node_with(graph, inputs[key], name, depth + 1) for key in _ABOVE if key in inputs)
    return next((found for found in above if found), {})
