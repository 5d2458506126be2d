"""A loaded, placed, compiled and warmed engine: built once, reused by every job that needs the same one."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from zimage_runner.compile import Compile
from zimage_runner.engines.base import Engine, EngineConfig, GeneratedBatch
from zimage_runner.engines.caption_features import Caption, CaptionFeatures
from zimage_runner.engines.embedding_cache import EmbeddingCache, EmbeddingCacheConfig, all_cached
from zimage_runner.engines.faults import is_out_of_memory
from zimage_runner.engines.picture_latents import FinishedImages, Posteriors
from zimage_runner.engines.precision import likeness_key
from zimage_runner.engines.request import LoadRequest, Needs, WarmupShape, denoise_request
from zimage_runner.engines.threads import thread_count, threads_of, wait_passively
from zimage_runner.memory import readings as monitor
from zimage_runner.memory.choice import Placed
from zimage_runner.memory.policies import HealthCheck, Memory
from zimage_runner.model import Model
from zimage_runner.pictures.placed import place
from zimage_runner.warmup import WARMUP_PROMPT, Warmup
from zimage_runner.weights.find.checkpoint import Checkpoint
from zimage_runner.weights.find.elsewhere import on_this_machine
from zimage_runner.weights.prepared import figures

if TYPE_CHECKING:
    import torch

    from zimage_runner.plan import WorkItem

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionConfig:
    """Everything that decides whether two jobs can share a session."""

    model: Model
    engine: EngineConfig
    memory: Memory
    warmup: Warmup
    compile: Compile
    checkpoint: Checkpoint
    embedding_cache: EmbeddingCacheConfig = field(default_factory=EmbeddingCacheConfig)
    may_be_elsewhere: bool = False
    """Whether the session may be on another machine than the one that found the checkpoint."""

    def key(self) -> str:
        """Return a key that is equal for jobs which one session serves: the one place that says so.

        A batch size is per call and left out; measuring it (auto) is not.
        """
        parts = asdict(self)
        del parts["may_be_elsewhere"]
        parts["engine"]["batch_size"] = self.engine.auto_batch
        kinds = [type(part).__name__ for part in (self.engine, self.memory, self.warmup, self.compile)]
        return repr((kinds, parts))


class Session:
    """Owns the engine. Loading happens in ``start``; ``generate`` may then be called any number of times."""

    def __init__(self, config: SessionConfig, shapes: Sequence[WarmupShape], texts: Sequence[Caption] = ()) -> None:
        """``shapes``: each shape that the plan contains; warm-up draws each.

        ``texts``: every (text, max_sequence_length) of the plan. ``memory=staged`` encodes them all before the denoiser
        is loaded; with an embedding cache that has them all, the text encoder is not loaded.
        """
        self.config = config
        self._shapes = list(shapes)
        self._texts = list(texts)
        self._health = HealthCheck(config.memory.health)
        self._report: dict[str, Any] = {}
        self._engine: Engine | None = None
        self._memory = config.memory
        """From the first loading on, the placement that ``memory=auto`` took."""
        self.captions = CaptionFeatures(lambda: self.engine)
        self._posteriors = Posteriors(lambda: self.engine)

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "Session.start was not called"
        return self._engine

    def start(self) -> None:
        """Environment, load, memory, compile, warm-up, in that order."""
        wait_passively()
        with threads_of(self.config.engine):
            self._load()
            self._encode_ahead(self._texts)
            self.warm_up(self._shapes)

    def extend(self, shapes: Sequence[WarmupShape], texts: Sequence[Caption]) -> None:
        """Get ready for another job: encode ahead and warm up what is new. The phases are then those of this job."""
        warm = {_shape_key(shape) for shape in self._shapes}
        new = [shape for shape in shapes if _shape_key(shape) not in warm]
        self._shapes += new
        self._report |= {"phases": {"load": 0.0}, "warmup_passes": []}
        with threads_of(self.config.engine):
            self._encode_ahead(texts)
            self.warm_up(new)

    def warm_up(self, shapes: Sequence[WarmupShape]) -> None:
        """Run the warm-up for these shapes. Called again when another job brings shapes that are not warm yet."""
        started = time.perf_counter()
        if self.config.warmup.generates and shapes:
            self.engine.adapt(())  # another run may have left some
        try:
            passes = self.config.warmup.run(self.engine, shapes, self.encode)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # The loop's own steps down (smaller batches, tiles) will find what fits.
            log.warning("the warm-up ran out of memory and was left unfinished: %s", error)
            passes = []
        phases = self._report["phases"]
        phases["warm_up"] = phases.get("warm_up", 0.0) + time.perf_counter() - started
        self._report["warmup_passes"] = [*self._report.get("warmup_passes", ()), *map(asdict, passes)]

    def generate(self, items: Sequence[WorkItem], *, attempt: int = 1, tiled: bool = False) -> GeneratedBatch:
        """Draw one batch: items of one bucket, so of equal sampling params, adapters and padded caption length.

        ``attempt`` above 1: the first try gave a bad picture, so decode in float32. ``tiled``: decode in tiles.
        """
        with threads_of(self.config.engine):
            return self._generate(items, careful=attempt > 1, tiled=tiled)

    def _generate(self, items: Sequence[WorkItem], *, careful: bool, tiled: bool) -> GeneratedBatch:
        params = items[0].params
        health = self._check_health()
        clock = _Clock()
        if self.engine.adapt(params.loras):
            clock.lap("adapt")
        length, loras = params.max_sequence_length, params.encoder_loras
        embeds = self.captions.encode([item.prompt.text for item in items], length, loras)
        negatives = None
        if params.uses_guidance:
            negatives = self.captions.encode([item.params.negative_prompt for item in items], length, loras)
        clock.lap("encode")
        placed = None
        if params.inputs is not None:
            placed = [place(item.params.inputs, params.width, params.height) for item in items if item.params.inputs]
        request = denoise_request(
            self.engine,
            params,
            embeds,
            negatives,
            [item.seed for item in items],
            noise_device=self.config.engine.noise_device.value,
            placed=placed,
            posterior=self._posteriors,
        )
        if placed:
            clock.lap("encode_pictures")
        latents = self.engine.denoise(request)
        clock.lap("denoise")
        if careful or tiled:
            images = self.engine.decode_carefully(latents, float32=careful, tiled=tiled)
        else:
            images = self.engine.decode(latents)
        clock.lap("decode")
        if placed and placed[0].finish is not None:
            images = FinishedImages(images, placed)
        return GeneratedBatch(images=images, details={"timings": clock.laps} | health)

    def free_memory(self) -> bool:
        """Make room after running out of memory. Return whether the same call may fit now."""
        freed = [self.engine.free_memory(), self.captions.free_memory()]
        return any(freed)

    def useful_batch(self) -> int | None:
        """Most pictures at a time that gain anything, as the last batch showed; None: as many as memory allows."""
        return self.engine.useful_batch()

    @property
    def tiles(self) -> bool:
        """Whether decoding in tiles saves memory."""
        return self.engine.tiles

    def encode(self, texts: Sequence[str], max_sequence_length: int) -> list[torch.Tensor]:
        """Return the caption features of each text."""
        return self.captions.encode(texts, max_sequence_length)

    def _check_health(self) -> dict[str, Any]:
        """Read the GPU's memory when it is due; rebuild the session when the policy says so. For the record."""
        reading = self._health.poll()
        if reading is None:
            return {}
        if reading.recycle:
            self._engine, engine = None, self.engine
            engine.synchronize()  # pictures on their way to the host
            engine.close()
            recycled = self._report.get("recycled", 0) + 1
            self._load()
            self.warm_up(self._shapes)
            self._report["recycled"] = recycled
        return {"gpu_memory": reading.memory} | ({"recovery": ["session recycled"]} if reading.recycle else {})

    def close(self) -> None:
        """Free the model. Safe to call twice."""
        self.captions.clear()
        self._posteriors.clear()
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _load(self) -> None:
        config = self.config
        config.memory.apply_environment()
        config.compile.apply_environment()
        started = time.perf_counter()
        checkpoint = config.checkpoint
        if config.may_be_elsewhere:
            checkpoint = on_this_machine(config.model, checkpoint)
        needs = Needs.of(config.model, self._memory, config.compile, (shape.params for shape in self._shapes))
        encodes = not self._all_cached()
        request = LoadRequest.for_needs(
            needs, checkpoint=checkpoint, encodes=encodes, shapes=self._shapes, captions=len(self._texts)
        )
        self._engine = config.engine.create(request)
        self._engine.synchronize()
        engine = self._engine
        placed = engine.placed or Placed(self._memory)
        self._memory = placed.memory
        # A streamed text encoder takes no memory from the denoiser: captions that nobody foresees can come later.
        self.captions.ahead = self._memory.staged and (bool(self._texts) or not self._memory.streamed)
        self._report = {
            "phases": {"load": time.perf_counter() - started},
            "load_phases": engine.load_phases,
            "device": engine.device,
            "device_name": _device_name(engine.device),
            "placement": self._memory.placement,
            "weights": None if engine.path is None else str(engine.path),
            "dtype": engine.dtype,
            "attention": engine.attention,
            "numerics": self.numerics(),
            "versions": monitor.versions(),
        }
        if placed.why:
            self._report["placement_why"] = placed.why
        if engine.device == "cpu":
            self._report["threads"] = thread_count()
        key = likeness_key(config.checkpoint.digest, self._report["numerics"])
        if key is not None:
            self._report["likeness"] = figures.known(engine.path, key)
        if config.embedding_cache.path is not None:
            identity = {name: self._report[name] for name in ("numerics", "versions")}
            weights = {"weights": config.checkpoint.digest}
            self.captions.disk = EmbeddingCache(config.embedding_cache, weights | identity, config.key())

    def _encode_ahead(self, texts: Sequence[Caption]) -> None:
        self._report["phases"] |= self.captions.encode_ahead(self._with_warmup(texts))

    def _all_cached(self) -> bool:
        """Return whether the embedding cache will have every caption of the plan and of the warm-up."""
        captions = self._with_warmup(self._texts)
        return bool(self._texts) and all_cached(self.config.embedding_cache, self.config.key(), captions)

    def _with_warmup(self, texts: Sequence[Caption]) -> list[Caption]:
        """Return the captions that the warm-up of all shapes needs, then ``texts``."""
        lengths = (
            {shape.params.max_sequence_length for shape in self._shapes} if self.config.warmup.generates else set()
        )
        return [*((WARMUP_PROMPT, length) for length in lengths), *texts]

    def numerics(self) -> dict[str, Any]:
        """What decides the last bits of a picture besides its item; part of every fingerprint."""
        noise = self.config.engine.noise_device.value
        return self.engine.numerics() | {"compile": self.config.compile.label, "noise_device": noise}

    def report(self) -> dict[str, Any]:
        """Plain data: seconds of each phase, device, numerics, versions, and GPU memory as it is now."""
        return self._report | {"gpu_memory": monitor.gpu_memory(), "peak_host_gb": monitor.peak_host_gb()}


def _shape_key(shape: WarmupShape) -> tuple[Any, ...]:
    """What a warm-up is good for: steps and the strength of guidance change no shape."""
    params = shape.params
    captions = (shape.caption_tokens, shape.negative_caption_tokens)
    return (params.height, params.width, params.uses_guidance, *captions, shape.batch_size, params.kind)


class _Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now


def _device_name(device: str) -> str:
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()
