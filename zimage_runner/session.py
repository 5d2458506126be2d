"""A loaded, placed, compiled and warmed engine: built once, reused by every job that needs the same one."""

from __future__ import annotations

import logging
import platform
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from zimage_runner.compile import Compile
from zimage_runner.engines.base import DenoiseRequest, Engine, EngineConfig, PendingImages
from zimage_runner.memory import Memory
from zimage_runner.model import Model
from zimage_runner.sampling import SamplingParams
from zimage_runner.warmup import Warmup, WarmupPass
from zimage_runner.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

    from zimage_runner.plan import WorkItem

log = logging.getLogger(__name__)

EMBEDS_IN_MEMORY = 4096
"""Caption features kept in memory: 512 x 2560 bf16 is 2.6 MB at worst, a usual caption a tenth of that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionConfig:
    """Everything that decides whether two jobs can share a session."""

    model: Model
    engine: EngineConfig
    memory: Memory
    warmup: Warmup
    compile: Compile
    checkpoint: Checkpoint

    def key(self) -> str:
        """Equal keys mean that one session serves both. Batch size is per call, so it is left out."""
        parts = asdict(self)
        parts["engine"].pop("batch_size", None)
        kinds = [type(part).__name__ for part in (self.engine, self.memory, self.warmup, self.compile)]
        return repr((kinds, parts))


@dataclass(kw_only=True, slots=True)
class SessionReport:
    """What starting the session did and how long each phase took, in seconds."""

    load_seconds: float = 0.0
    load_phases: dict[str, float] = field(default_factory=dict)
    warmup_seconds: float = 0.0
    warmup_passes: list[WarmupPass] = field(default_factory=list)
    device: str = ""
    device_name: str = ""
    dtype: str = ""
    attention: str = ""
    numerics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GeneratedBatch:
    """Pictures on their way to the host, and the seconds that submitting each stage took."""

    images: PendingImages
    timings: dict[str, float]


class Session:
    """Owns the engine. Loading happens in ``start``; ``generate`` may then be called any number of times."""

    def __init__(self, config: SessionConfig) -> None:
        self.config = config
        self.report = SessionReport()
        self._engine: Engine | None = None
        self._embeds: OrderedDict[tuple[str, int], torch.Tensor] = OrderedDict()
        self._warm_shapes: set[SamplingParams] = set()

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "Session.start was not called"
        return self._engine

    def start(self, shapes: Sequence[SamplingParams]) -> SessionReport:
        """Environment, load, memory, compile, warm-up, in that order. Later calls warm only new shapes."""
        if self._engine is None:
            self._load()
        new = [shape for shape in shapes if shape not in self._warm_shapes]
        started = time.perf_counter()
        self.report.warmup_passes = self.config.warmup.run(self.engine, new)
        self.report.warmup_seconds = time.perf_counter() - started
        self._warm_shapes.update(new)
        return self.report

    def generate(self, items: Sequence[WorkItem]) -> GeneratedBatch:
        """Draw one batch: items of one bucket, so of equal sampling params and padded caption length."""
        params = items[0].params
        clock = _Clock()
        embeds = self.encode([item.prompt.text for item in items], params.max_sequence_length)
        negatives = None
        if params.uses_guidance:
            negatives = self.encode([item.params.negative_prompt for item in items], params.max_sequence_length)
        clock.lap("encode")
        request = DenoiseRequest(
            prompt_embeds=embeds, negative_prompt_embeds=negatives, noise=self._noise(items), params=params
        )
        latents = self.engine.denoise(request)
        clock.lap("denoise")
        images = self.engine.decode(latents)
        clock.lap("decode")
        return GeneratedBatch(images=images, timings=clock.laps)

    def encode(self, texts: Sequence[str], max_sequence_length: int) -> list[torch.Tensor]:
        """Caption features of each text; each unique text is encoded once and kept while memory allows."""
        missing = list(dict.fromkeys(t for t in texts if (t, max_sequence_length) not in self._embeds))
        if missing:
            for text, embed in zip(missing, self.engine.encode(missing, max_sequence_length), strict=True):
                self._embeds[text, max_sequence_length] = embed
        result = [self._embeds[text, max_sequence_length] for text in texts]
        for text in texts:
            self._embeds.move_to_end((text, max_sequence_length))
        while len(self._embeds) > EMBEDS_IN_MEMORY:
            self._embeds.popitem(last=False)
        return result

    def close(self) -> None:
        """Free the model. Safe to call twice."""
        self._embeds.clear()
        self._warm_shapes.clear()
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _load(self) -> None:
        config = self.config
        config.memory.apply_environment()
        started = time.perf_counter()
        self._engine = config.engine.create(
            checkpoint=config.checkpoint, model=config.model, memory=config.memory, compile=config.compile
        )
        self._engine.synchronize()
        engine = self._engine
        self.report = SessionReport(
            load_seconds=time.perf_counter() - started,
            load_phases=engine.load_phases,
            device=engine.device,
            device_name=_device_name(engine.device),
            dtype=engine.dtype,
            attention=engine.attention,
            numerics=engine.numerics() | {"compile": config.compile.label},
            versions=library_versions(),
        )

    def _noise(self, items: Sequence[WorkItem]) -> torch.Tensor:
        from zimage_runner.engines.noise import draw_noise

        params, engine = items[0].params, self.engine
        scale = engine.vae_scale_factor
        return draw_noise(
            [item.seed for item in items],
            engine.latent_channels,
            params.height // scale,
            params.width // scale,
            device=self.config.engine.noise_device.value,
        )


class _Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide a picture, without importing them."""
    from importlib import metadata

    import zimage_runner

    versions = {"zimage_runner": zimage_runner.__version__, "python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers", "safetensors"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _device_name(device: str) -> str:
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()
