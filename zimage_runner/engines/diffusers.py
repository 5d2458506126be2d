"""engine=diffusers: the reference, on diffusers' own ZImagePipeline."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zimage_runner.engines.base import (
    DenoiseRequest,
    Device,
    Engine,
    EngineConfig,
    PendingImages,
    ReadyImages,
)
from zimage_runner.engines.device import choose_device, choose_dtype
from zimage_runner.errors import BadPictureError, UserError

if TYPE_CHECKING:
    import torch

    from zimage_runner.compile import Compile
    from zimage_runner.memory import Memory
    from zimage_runner.model import Model
    from zimage_runner.weights.checkpoint import Checkpoint

log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class DiffusersEngine(EngineConfig):
    """Reference engine: every feature of ZImagePipeline, at its speed."""

    def check(self, model: Model, memory: Memory, compile: Compile) -> None:
        if self.device is Device.cpu and self.noise_device is Device.cuda:
            raise UserError("engine.noise_device=cuda needs engine.device=cuda: use engine.noise_device=cpu")

    def create(self, *, checkpoint: Checkpoint, model: Model, memory: Memory, compile: Compile) -> Engine:
        return DiffusersPipelineEngine.load(self, checkpoint, model, memory, compile)


class DiffusersPipelineEngine(Engine):
    """A loaded ZImagePipeline behind the Engine contract."""

    name = "diffusers"

    def __init__(self, pipe: Any, device: str, dtype: str, attention: str, load_phases: dict[str, float]) -> None:
        self.pipe = pipe
        self.device = device
        self.dtype = dtype
        self.attention = attention
        self.load_phases = load_phases
        self.latent_channels = pipe.transformer.config.in_channels
        self.vae_scale_factor = pipe.vae_scale_factor

    @classmethod
    def load(
        cls, config: DiffusersEngine, checkpoint: Checkpoint, model: Model, memory: Memory, compile: Compile
    ) -> DiffusersPipelineEngine:
        phases: dict[str, float] = {}
        with _phase(phases, "import"):
            import torch
            from diffusers import ZImagePipeline

            quiet_libraries()
        device = choose_device(config.device)
        dtype = choose_dtype(model.dtype, device)
        memory.apply_limits(device)
        with _phase(phases, "read"):
            pipe = ZImagePipeline.from_pretrained(
                str(checkpoint.path), dtype=getattr(torch, dtype), low_cpu_mem_usage=True, local_files_only=True
            )
        with _phase(phases, "to_device"):
            pipe.to(device)
            _synchronize(device)
        pipe.set_progress_bar_config(disable=True)
        attention = _set_attention(pipe, config.attention)
        return cls(pipe, device, dtype, attention, phases)

    def encode(self, texts: Sequence[str], max_sequence_length: int) -> list[torch.Tensor]:
        import torch

        # One text a call: the pipeline pads every text to max_sequence_length anyway, and its encoder's rounding
        # depends on the batch. A fresh list each time, because _encode_prompt writes into the one it is given.
        with torch.inference_mode():
            return [
                self.pipe.encode_prompt(
                    [text], device=self._input_device, do_classifier_free_guidance=False,
                    max_sequence_length=max_sequence_length,
                )[0][0].clone()
                for text in texts
            ]  # fmt: skip

    def denoise(self, request: DenoiseRequest) -> torch.Tensor:
        params = request.params
        steps = params.num_inference_steps
        return self.pipe(
            prompt_embeds=list(request.prompt_embeds),
            negative_prompt_embeds=list(request.negative_prompt_embeds or []),
            latents=request.noise,
            height=params.height,
            width=params.width,
            num_inference_steps=steps,
            # Explicit sigmas make num_inference_steps mean transformer forwards in every diffusers version.
            sigmas=sigma_schedule(steps),
            guidance_scale=params.guidance_scale,
            cfg_normalization=params.cfg_normalization,
            cfg_truncation=params.cfg_truncation,
            output_type="latent",
        ).images

    def decode(self, latents: torch.Tensor) -> PendingImages:
        import torch

        vae = self.pipe.vae
        with torch.inference_mode():
            scaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
            pixels = vae.decode(scaled, return_dict=False)[0]
            images = to_uint8(pixels)
        return ReadyImages(images.cpu().numpy())

    def synchronize(self) -> None:
        _synchronize(self.device)

    def close(self) -> None:
        import gc

        del self.pipe
        gc.collect()
        if self.device == "cuda":
            import torch

            torch.cuda.empty_cache()

    @property
    def _input_device(self) -> Any:
        return self.pipe._execution_device


def sigma_schedule(num_inference_steps: int) -> list[float]:
    """Unshifted sigmas linspace(1, 1/n, n); the scheduler applies its static shift and appends 0."""
    n = num_inference_steps
    return [1.0 - i * (1.0 - 1.0 / n) / (n - 1) if n > 1 else 1.0 for i in range(n)]


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] in -1..1 to uint8 [B, H, W, 3], rounding as diffusers' image processor does.

    Raises BadPictureError on NaN or Inf, which uint8 would hide as black.
    """
    if not bool(pixels.isfinite().all()):
        raise BadPictureError("the decoder's output holds NaN or Inf")
    return (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).contiguous()


def quiet_libraries() -> None:
    """Silence the libraries' own progress bars and advice; errors still pass."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _set_attention(pipe: Any, backend: str) -> str:
    if backend == "auto":
        return "native"
    pipe.transformer.set_attention_backend(backend)
    return backend


def _synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


@contextlib.contextmanager
def _phase(phases: dict[str, float], name: str):
    started = time.perf_counter()
    yield
    phases[name] = time.perf_counter() - started


