"""Schema of `conf/config.yaml`: one dataclass a section, values in the YAML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

CONF_DIR = str(Path(__file__).parent / "conf")


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where files live; relative paths start at the repository's root."""

    downloads: str = MISSING
    packed: str = MISSING
    work: str = MISSING
    reference: str = MISSING
    limit: int | None = MISSING


@dataclass(kw_only=True, slots=True)
class CaptionConfig:
    """Sizes of the pre-tokenised caption pools; the keys 32, 64 and 96 are padded token counts."""

    per_picture: dict[int, int] = MISSING
    scenes: int = MISSING
    long_scenes: dict[int, int] = MISSING
    noisy: float = MISSING
    fragments: float = MISSING
    workers: int = MISSING


@dataclass(kw_only=True, slots=True)
class VaeConfig:
    """AutoencoderKL: four levels (8x), 16 latent channels; `batch` is per process."""

    channels: list[int] = MISSING
    seconds: float = MISSING
    batch: int = MISSING
    lr: float = MISSING
    held_out: int = MISSING


@dataclass(kw_only=True, slots=True)
class TextConfig:
    """Qwen3 text encoder and its vocabulary."""

    vocab: int = MISSING
    hidden: int = MISSING
    layers: int = MISSING
    heads: int = MISSING
    kv_heads: int = MISSING
    head_dim: int = MISSING
    intermediate: int = MISSING


@dataclass(kw_only=True, slots=True)
class TransformerConfig:
    """ZImageTransformer2DModel and its training; `batch` is per process, times are seconds."""

    dim: int = MISSING
    layers: int = MISSING
    refiners: int = MISSING
    heads: int = MISSING
    axes_dims: list[int] = MISSING
    seconds: float = MISSING
    batch: int = MISSING
    muon_lr: float = MISSING
    adam_lr: float = MISSING
    hold: float = MISSING
    ema: float = MISSING
    poses: int = MISSING
    encode_seconds: float = MISSING
    single: float = MISSING
    buckets: dict[int, float] = MISSING
    compiled: list[int] = MISSING
    resume: str | None = MISSING
    factor: float = MISSING
    save_every: float = MISSING
    probe: int = MISSING


@dataclass(kw_only=True, slots=True)
class WarmStartConfig:
    """The checkpoint that `training.warm_start` prepares to go on from."""

    source: str = MISSING


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """What `training.evaluate` measures; `NAME@4` in `sets` means 4 forwards instead of 8, `limit` 0 every case.

    `engine` is native or diffusers.
    """

    model: str = MISSING
    engine: str = MISSING
    device: str = MISSING
    dtype: str = MISSING
    threads: int = MISSING
    batch: int = MISSING
    sets: list[str] = MISSING
    limit: int = MISSING
    seeds: int = MISSING
    sheets: str | None = MISSING
    out: str = MISSING


@dataclass(kw_only=True, slots=True)
class ControlConfig:
    """The embedded model's ControlNet, trained on pictures that the model draws and their edges."""

    model: str = MISSING
    places: list[int] = MISSING
    device: str = MISSING
    pictures: int = MISSING
    poses: int = MISSING
    draw_seconds: float = MISSING
    seconds: float = MISSING
    batch: int = MISSING
    lr: float = MISSING
    report: int = MISSING
    thresholds: list[int] = MISSING
    out: str = MISSING


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    """The whole of `conf/config.yaml`."""

    seed: int = MISSING
    data: DataConfig = MISSING
    captions: CaptionConfig = MISSING
    vae: VaeConfig = MISSING
    text: TextConfig = MISSING
    transformer: TransformerConfig = MISSING
    warm_start: WarmStartConfig = MISSING
    evaluate: EvaluateConfig = MISSING
    control: ControlConfig = MISSING


def _register() -> None:
    ConfigStore.instance().store(name="schema", node=TrainingConfig)


def load_config(overrides: list[str] | None = None) -> TrainingConfig:
    """Compose the config in this process, as the commands do."""
    _register()
    with hydra.initialize_config_dir(CONF_DIR, version_base="1.3"):
        return _typed(hydra.compose("config", overrides=overrides or []))


def command(main: Callable[[TrainingConfig], None]) -> None:
    """Run `main` as a command line whose arguments override `conf/config.yaml`."""
    _register()

    @hydra.main(config_path=CONF_DIR, config_name="config", version_base="1.3")
    def run(cfg: Any) -> None:
        main(_typed(cfg))

    run()


def _typed(cfg: Any) -> TrainingConfig:
    typed = OmegaConf.to_object(cfg)
    assert isinstance(typed, TrainingConfig)
    return typed
