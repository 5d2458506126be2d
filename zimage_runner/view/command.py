"""The command that draws a picture again, ready for a shell."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

OF_GUIDANCE = ("negative_prompt", "cfg_normalization", "cfg_truncation")
ENGINES = ("native", "diffusers")


def command_for(record: Mapping[str, Any]) -> str | None:
    """``python -m zimage_runner ...`` from a picture's record; None if the record is no whole one."""
    model, params, numerics = record.get("model"), record.get("params"), record.get("numerics")
    prompt, seed = record.get("prompt"), record.get("seed")
    if not (isinstance(model, dict) and isinstance(params, dict) and isinstance(prompt, str)):
        return None
    words = ["python", "-m", "zimage_runner"]
    if str(model.get("name")).isidentifier():
        words.append(f"model={model['name']}")
    if isinstance(numerics, dict) and numerics.get("engine") in ENGINES:
        words.append(f"engine={numerics['engine']}")
    words += [f"prompt={_quoted(prompt)}", f"seeds=[{seed}]"]
    guided = _is_guided(params)
    for name, value in params.items():
        if (guided or name not in OF_GUIDANCE) and name.isidentifier() and isinstance(value, str | int | float):
            words.append(f"sampling.{name}={_quoted(value) if isinstance(value, str) else value}")
    return shlex.join(words)


def _is_guided(params: Mapping[str, Any]) -> bool:
    scale = params.get("guidance_scale")
    return isinstance(scale, int | float) and scale > 0


def _quoted(text: str) -> str:
    from zimage_runner.cli.quoting import hydra_quote

    return hydra_quote(text)
