"""The native model behind the Engine contract."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence

import numpy as np
import torch

from zimage_runner.engines.base import DenoiseRequest, Engine, PendingImages
from zimage_runner.engines.device import choose_device, choose_dtype
from zimage_runner.engines.native.config import NativeEngine
from zimage_runner.engines.native.images import HostCopy, Ready
from zimage_runner.engines.native.model import NativeModel, Options, load_model
from zimage_runner.engines.native.sampler import Guidance
from zimage_runner.errors import UserError
from zimage_runner.memory import Memory
from zimage_runner.model import Model
from zimage_runner.weights.source import WeightsSource


class NativePending(PendingImages):
    """Pictures on their way to the host."""

    def __init__(self, pending: HostCopy | Ready) -> None:
        self._pending = pending

    def wait(self) -> np.ndarray:
        return self._pending.wait()


class NativeEngineAdapter(Engine):
    """Engine contract to NativeModel's calls; nothing else."""

    name = "native"

    def __init__(self, model: NativeModel, load_phases: dict[str, float]) -> None:
        self.model = model
        self.device = model.device.type
        self.dtype = str(model.options.dtype).removeprefix("torch.")
        self.attention = model.attention.name
        self.load_phases = load_phases
        self.latent_channels = model.transformer.config.in_channels
        self.vae_scale_factor = model.vae.config.scale

    @classmethod
    def load(cls, config: NativeEngine, weights: WeightsSource, model: Model, memory: Memory) -> NativeEngineAdapter:
        """Load the checkpoint. Raises UserError for one that this engine does not compute."""
        device = choose_device(config.device)
        options = Options(
            device=device,
            dtype=getattr(torch, choose_dtype(model.dtype, device)),
            attention=config.attention,
            fused_kernels=config.fused_kernels,
            cuda_graphs=config.cuda_graphs,
        )
        memory.apply_limits(device)
        weights.settle(device, choose_dtype(model.dtype, device))
        started = time.perf_counter()
        try:
            loaded = load_model(weights.path, options, weights.tensors)
        except (ValueError, KeyError) as error:
            raise UserError(f"engine=native cannot run {weights.path}: {error}; use engine=diffusers") from error
        engine = cls(loaded, {})
        engine.synchronize()
        engine.load_phases["load"] = time.perf_counter() - started
        return engine

    def encode(self, texts: Sequence[str], max_sequence_length: int) -> list[torch.Tensor]:
        return self.model.encode(texts, max_sequence_length)

    def denoise(self, request: DenoiseRequest) -> torch.Tensor:
        params = request.params
        guidance = Guidance(
            scale=params.guidance_scale,
            normalization=params.cfg_normalization,
            truncation=params.cfg_truncation,
        )
        return self.model.denoise(
            request.prompt_embeds, request.noise, params.num_inference_steps, guidance, request.negative_prompt_embeds
        )

    def decode(self, latents: torch.Tensor) -> PendingImages:
        return NativePending(self.model.decode(latents))

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def close(self) -> None:
        self.model.close()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
