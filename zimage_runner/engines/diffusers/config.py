"""Options of engine=diffusers, and what it refuses. What draws is imported with it, when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zimage_runner.engines.base import Engine, EngineConfig
from zimage_runner.engines.diffusers.attention import check_name
from zimage_runner.engines.footprint import diffusers_peaks
from zimage_runner.engines.precision import Precision
from zimage_runner.engines.request import LoadRequest
from zimage_runner.errors import UserError

if TYPE_CHECKING:
    from zimage_runner.compile import Compile
    from zimage_runner.engines.request import Needs
    from zimage_runner.memory.policies import Memory


@dataclass(kw_only=True, slots=True)
class DiffusersEngine(EngineConfig):
    """Reference engine: every feature of ZImagePipeline, at its speed."""

    vae_channels_last: bool = False
    """Decode in NHWC memory layout: faster convolutions on GPUs, other rounding."""

    def check(self, needs: Needs) -> None:
        self.check_noise(self.device)
        if self.precision is not Precision.bf16:
            raise UserError(
                f"engine.precision={self.precision.value} is not for engine=diffusers, which computes in model.dtype: "
                "use engine=native, or leave it out"
            )
        if needs.pictured or needs.controlled:
            raise UserError("engine=diffusers does not draw from pictures: use engine=native, or leave them out")
        check_name(self.attention)
        if "diffusers" not in needs.memory.engines:
            raise UserError(f"memory={needs.memory.placement} is not for engine=diffusers: use engine=native with it")
        check_compile(needs.memory, needs.compile)
        if needs.adapted and not needs.memory.merges:
            raise UserError(
                f"memory={needs.memory.placement} keeps copies of the weights that loras cannot be merged into: "
                "use memory=resident, staged or model_offload, or engine=native"
            )

    def peaks(self, request: LoadRequest) -> dict[type[Memory], int]:
        return diffusers_peaks(request)

    def create(self, request: LoadRequest) -> Engine:
        from zimage_runner.engines.diffusers.engine import DiffusersPipelineEngine

        return DiffusersPipelineEngine(self, request)


def check_compile(memory: Memory, compile: Compile) -> None:
    """Raise UserError for placements whose Python hooks torch.compile cannot capture."""
    if compile.active and not memory.compiles:
        raise UserError(
            f"memory={memory.placement} moves each layer's weights in Python hooks, which compile={compile.label} "
            "cannot capture: use memory=resident, staged or model_offload with it, or compile=none"
        )
