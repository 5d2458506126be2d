"""The Engine contract: three calls, encode / denoise / decode, and nothing about files or prompts sets.

Importing this module imports no torch: configs are composed and validated without it.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_runner.engines.precision import Precision
from zimage_runner.errors import UserError
from zimage_runner.model import HARMLESS, LATENT_CHANNELS, VAE_FACTOR, Device

if TYPE_CHECKING:
    import numpy as np
    import torch

    from zimage_runner.engines.request import DenoiseRequest, LoadRequest, Needs, Posterior
    from zimage_runner.memory.choice import Placed
    from zimage_runner.memory.policies import Memory
    from zimage_runner.sampling import Lora


AUTO = "auto"
MOST_AUTO_BATCH = 16
"""batch_size=auto goes no higher: larger batches of a model this size gain nothing more."""


@dataclass(kw_only=True, slots=True)
class EngineConfig(abc.ABC):
    """Common fields of the ``engine`` group. Subclasses add their own and create the engine."""

    device: Device = Device.auto
    batch_size: Any = field(default=1, metadata=HARMLESS)  # int | str: OmegaConf 2.3 cannot merge unions
    """Most items of one bucket denoised together; auto: as many as fit into the GPU's memory, measured on the first."""
    noise_device: Device = Device.cpu
    """Where each item's initial noise is drawn. Noise from the CPU is the same on every machine."""
    precision: Precision = Precision.bf16
    """Of the transformer's matrix products: bf16; fp8 or int8 draw a picture close to it in less time and memory."""
    attention: str = "auto"
    """Attention backend by its diffusers name, or auto: the fastest that this machine has."""
    threads: int | None = field(default=None, metadata=HARMLESS)
    """CPU threads that torch computes with; null: torch's own choice, one a core (or OMP_NUM_THREADS)."""

    @property
    def auto_batch(self) -> bool:
        """Whether the batch size is found by measuring."""
        return self.batch_size == AUTO

    @property
    def largest_batch(self) -> int:
        """``batch_size``, or the bound that auto works under."""
        return MOST_AUTO_BATCH if self.auto_batch else self.batch_size

    def check_noise(self, device: Device) -> None:
        """Raise UserError for noise that a machine which computes on ``device`` cannot draw."""
        if self.noise_device is Device.auto or (self.noise_device is Device.cuda and device is Device.cpu):
            raise UserError(
                f"engine.noise_device={self.noise_device.value}: use cpu, which is the same on every machine, or cuda "
                "where engine.device is a CUDA GPU"
            )

    @abc.abstractmethod
    def check(self, needs: Needs) -> None:
        """Raise UserError for what this engine cannot run. Imports no torch."""

    def peaks(self, request: LoadRequest) -> dict[type[Memory], int]:
        """Bytes at most on the GPU under each placement that ``memory=auto`` may take, the fastest first.

        An engine that says nothing of it has its weights there all the time.
        """
        from zimage_runner.memory.policies import Resident

        return {Resident: 0}

    @abc.abstractmethod
    def create(self, request: LoadRequest) -> Engine:
        """Load what is asked for. Imports torch here, not before."""


class PendingImages(abc.ABC):
    """Pictures on their way to the host."""

    @abc.abstractmethod
    def wait(self) -> np.ndarray:
        """Block until done; uint8 [B, height, width, 3]. May be called from another thread, once.

        Raises BadPictureError if the decoder's output holds NaN or Inf.
        """


class ReadyImages(PendingImages):
    """Pictures that were computed synchronously."""

    def __init__(self, images: np.ndarray) -> None:
        self._images = images

    def wait(self) -> np.ndarray:
        return self._images


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedBatch:
    """What a session returns for one batch."""

    images: PendingImages
    details: dict[str, Any] = field(default_factory=dict)
    """For the record: timings (seconds of encode, denoise, decode; of adapt where adapters were changed), gpu_memory,
    recovery (steps, as text)."""


class Engine(abc.ABC):
    """A loaded model. Not thread-safe: one thread calls encode, denoise and decode."""

    name: str
    device: str
    """cuda or cpu."""
    dtype: str
    """Compute dtype of transformer and text encoder, as torch names it: bfloat16, float32."""
    attention: str
    """The attention backend in use."""
    latent_channels: int = LATENT_CHANNELS
    vae_scale_factor: int = VAE_FACTOR
    tiles: bool = True
    """Whether decode_carefully takes less memory in tiles than decode does."""
    load_phases: dict[str, float]
    """Seconds of each part of loading, in order, for the summary."""
    path: Path | None = None
    """The directory that its weights are read from: the published one or the prepared copy."""
    placed: Placed | None = None
    """Where its weights are; None: where the configuration said."""

    def adapt(self, loras: Sequence[Lora]) -> bool:
        """Encode and denoise with these adapters from now on, and with no others. Return whether weights changed.

        What another set had changed is first restored, bit for bit. Raises UserError for what this engine cannot do.
        """
        if loras:
            raise UserError(f"engine={self.name} draws without loras: leave them out")
        return False

    @abc.abstractmethod
    def encode(self, texts: Sequence[str], max_sequence_length: int) -> list[torch.Tensor]:
        """Caption features of each text: [L_i, cap_feat_dim], padding removed, truncated to max_sequence_length."""

    def encode_picture(self, pixels: np.ndarray) -> Posterior:
        """Latents' distribution of a picture [height, width, 3], uint8 or float32 of 0 to 255; sides multiples of 16.

        Raises UserError where this engine has no encoder.
        """
        raise UserError(f"engine={self.name} does not draw from pictures: use engine=native, or leave them out")

    @abc.abstractmethod
    def denoise(self, request: DenoiseRequest) -> torch.Tensor:
        """Latents [B, latent_channels, height/8, width/8] float32 after all steps, on the engine's device."""

    @abc.abstractmethod
    def decode(self, latents: torch.Tensor) -> PendingImages:
        """Pictures of the latents. Work may still run on the device when this returns."""

    def decode_carefully(self, latents: torch.Tensor, *, float32: bool = False, tiled: bool = False) -> PendingImages:
        """As decode, for what decode could not do: in float32 after NaN or Inf, in tiles after running out of memory.

        An engine that cannot do either decodes as usual.
        """
        return self.decode(latents)

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Block until the device has finished all submitted work (for timing)."""

    def useful_batch(self) -> int | None:
        """Most pictures at a time that gain anything, as the last batch showed; None: as many as memory allows."""
        return None

    def free_memory(self) -> bool:
        """Drop whatever can be made again (recordings, caches), after running out of memory.

        Whether that was so much that the same call may fit now; it is then not taken again for calls like that one.
        """
        return False

    @abc.abstractmethod
    def close(self) -> None:
        """Free the model's memory. The engine cannot be used afterwards."""

    def numerics(self) -> dict[str, Any]:
        """What decides the last bits of a picture; part of an item's fingerprint."""
        return {"engine": self.name, "dtype": self.dtype, "device": self.device, "attention": self.attention}
