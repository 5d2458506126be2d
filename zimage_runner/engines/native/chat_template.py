"""A checkpoint's chat template, rendered within bounds: it is a program that came with the weights."""

from __future__ import annotations

import functools
import json
from typing import Any

MAX_STEPS = 10_000
"""Turns of loops and calls of macros together; a template for one message needs a few dozen."""
MAX_RANGE = 1_000
MAX_CHARACTERS = 1_000_000


def render(template: str, message: str) -> str:
    """The template for one user message, as transformers' apply_chat_template renders it in its sandbox's settings.

    Raises whatever the template raises, and ValueError for one that does not come to an end soon.
    """
    from jinja2 import nodes
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    steps = 0

    def step(*_: Any) -> str:
        nonlocal steps
        steps += 1
        if steps > MAX_STEPS:
            raise ValueError(f"it takes more than {MAX_STEPS:,} steps for one message")
        return ""

    class Bounded(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "+"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            too_long = operator != "**" and _length(operator, left, right) > MAX_CHARACTERS
            if too_long or (operator == "**" and not (abs(left) < 1e6 and abs(right) < 64)):
                raise ValueError("it makes a text or number out of all bounds")
            return super().call_binop(context, operator, left, right)

    class Plus(NodeTransformer):
        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            texts = [nodes.Filter(part, "string", [], [], None, None) for part in node.nodes]
            return functools.reduce(nodes.Add, texts)

    environment = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    environment.globals |= {"range": _short_range, _STEP: step}
    tree = Plus().visit(environment.parse(template))
    for block in [*tree.find_all(nodes.For), *tree.find_all(nodes.Macro), *tree.find_all(nodes.CallBlock)]:
        block.body.insert(0, nodes.Output([nodes.Call(nodes.Name(_STEP, "load"), [], [], None, None)]))
    return environment.from_string(tree).render(
        messages=[{"role": "user", "content": message}], add_generation_prompt=True, enable_thinking=True
    )


_STEP = "zimage_runner_step"


def _short_range(*bounds: int) -> range:
    numbers = range(*bounds)
    if len(numbers) > MAX_RANGE:
        raise ValueError(f"it counts over more than {MAX_RANGE:,} numbers")
    return numbers


def _length(operator: str, left: Any, right: Any) -> int:
    """Of a text or list that is made of two, or of one times a number; 0 for numbers."""
    sized = str | list | tuple
    if operator == "+":
        return len(left) + len(right) if isinstance(left, sized) and isinstance(right, sized) else 0
    for things, times in ((left, right), (right, left)):
        if isinstance(things, sized) and isinstance(times, int):
            return len(things) * times
    return 0
