"""What a checkpoint directory says of itself, weights aside."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_runner.engines.native.sampler import read_shift
from zimage_runner.engines.native.text_encoder import TextEncoderConfig
from zimage_runner.engines.native.transformer import TransformerConfig
from zimage_runner.engines.native.vae_decoder import VaeConfig
from zimage_runner.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """The three networks' configurations and the scheduler's static shift."""

    transformer: TransformerConfig
    text_encoder: TextEncoderConfig
    vae: VaeConfig
    shift: float


def describe(path: Path) -> Description:
    """Read a diffusers-format directory. Raises UserError for a missing file, ValueError for an unsupported variant."""
    return Description(
        transformer=TransformerConfig.from_published(read_config(path / "transformer")),
        text_encoder=TextEncoderConfig.from_published(read_config(path / "text_encoder")),
        vae=VaeConfig.from_published(read_config(path / "vae")),
        shift=read_shift(read_config(path / "scheduler", "scheduler_config.json")),
    )


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A component's configuration. Raises UserError if the file is missing."""
    path = folder / name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: is this a diffusers-format checkpoint?") from None
