"""The ``engine=native`` option. Imports no torch."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from zimage_runner.engines.base import Engine, EngineConfig
from zimage_runner.engines.footprint import native_peaks
from zimage_runner.engines.placing import stays_resident
from zimage_runner.engines.precision import Precision, check_precision
from zimage_runner.engines.request import LoadRequest
from zimage_runner.errors import UserError
from zimage_runner.memory.policies import Auto
from zimage_runner.model import Device

if TYPE_CHECKING:
    from zimage_runner.engines.request import Needs
    from zimage_runner.memory.policies import Memory
    from zimage_runner.weights.preload.source import WeightsSource

ATTENTION_NAMES = ("auto", "native", "flash3", "cudnn", "flash", "efficient", "math", "flash3_fp8")


@dataclass(kw_only=True, slots=True)
class NativeEngine(EngineConfig):
    """Own modules for the three models: nothing imported, computed or waited for that a batch run does not need."""

    fused_kernels: bool = True
    """Triton kernels for what lies between two matrix products; off: plain PyTorch, as on machines without Triton."""
    bf16_layers: list[int] = field(default_factory=list)
    """With engine.precision=fp8 or int8: main transformer blocks, counted from 0, that compute in bf16 all the same."""
    cuda_graphs: int = 4
    """Most picture shapes recorded as CUDA graphs at a time; 0: none. Only small ones (512x512) are: they gain."""

    def __post_init__(self) -> None:
        if self.cuda_graphs < 0:
            raise UserError(f"engine.cuda_graphs={self.cuda_graphs} is negative: use 0 for none, or a number of shapes")
        if self.bf16_layers and self.precision is Precision.bf16:
            raise UserError(
                f"engine.bf16_layers={self.bf16_layers} says nothing without engine.precision=fp8 or int8: "
                "leave it out, or set engine.precision"
            )
        if self.attention not in ATTENTION_NAMES:
            names = ", ".join(ATTENTION_NAMES)
            raise UserError(f"engine.attention={self.attention} is unknown to engine=native: use one of {names}")

    def check(self, needs: Needs) -> None:
        memory, compile = needs.memory, needs.compile
        check_precision(self.precision, self.device, needs.model)
        if self.device is Device.cpu and self.attention not in ("auto", "native"):
            raise UserError(f"engine.attention={self.attention} needs a CUDA GPU: use auto or native")
        self.check_noise(self.device)
        if "native" not in memory.engines:
            raise UserError(
                f"memory={memory.placement} is not for engine=native, which keeps what it computes with on the GPU: "
                "use memory=resident, memory=staged (8 GB less at the same speed), or engine=diffusers"
            )
        if needs.controlled and needs.model.controlnet is None:
            raise UserError(
                "a control_image needs a ControlNet to follow it: set model.controlnet=FILE, or leave control_image out"
            )
        if needs.encoder_adapted and memory.streamed:
            raise UserError(
                "memory=streamed reads the text encoder's layers from their files again and again, and one of the "
                "loras changes them: use memory=resident or memory=staged"
            )
        for name, value, why in (
            ("loading", memory.loads_through_host() and "cpu_then_gpu", "weights go straight to the GPU"),
            ("low_cpu_mem_usage", not memory.low_cpu_mem_usage and "false", "it initialises no weights"),
            ("vae_tiling", memory.vae_tiling, "it decodes a picture at a time in a fraction of the usual memory"),
            ("vae_slicing", memory.vae_slicing, "it decodes a picture at a time anyway"),
        ):
            if value:
                raise UserError(
                    f"memory.{name}={str(value).lower()} does nothing for engine=native ({why}): "
                    "leave it out, or use engine=diffusers"
                )
        if compile.label != "none":
            raise UserError(
                f"compile={compile.label} does nothing for engine=native, whose kernels are fused already: "
                "use compile=none, or engine=diffusers"
            )

    def peaks(self, request: LoadRequest) -> dict[type[Memory], int]:
        return native_peaks(request, self.precision, self.bf16_layers)

    def create(self, request: LoadRequest) -> Engine:
        weights = self._weights(request)  # on its way while torch is imported below
        from zimage_runner.engines.native.engine import NativeEngineAdapter

        return NativeEngineAdapter.load(self, weights, request)

    def _weights(self, request: LoadRequest) -> WeightsSource:
        from zimage_runner.model import Prepare
        from zimage_runner.weights.preload import source
        from zimage_runner.weights.prepared import prepared

        checkpoint, model, memory = request.checkpoint, request.model, request.memory
        # A copy in eight bits holds no layer in bf16: these engines round that in bf16 themselves.
        precision = (Precision.bf16 if self.bf16_layers else self.precision).value
        if memory.staged or memory.per_process_fraction is not None:
            # All networks at once on the device is what staging avoids; a limit of torch's binds its allocator alone.
            found = None if model.prepare is Prepare.never else prepared.find(checkpoint, model, precision=precision)
            return source.WeightsSource(checkpoint, model, found, preload=None, precision=precision)
        fits = functools.partial(stays_resident, self, request) if isinstance(memory, Auto) else None
        return source.begin(checkpoint, model, self.device, request.encodes, precision, fits)
