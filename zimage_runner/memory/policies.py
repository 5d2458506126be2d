"""How GPU memory is allocated and where the model's parts live: the ``memory`` config group.

The options differ in placement alone; the allocator's settings, the loading path, VAE tiling and the health check are
common to all. Engines read the fields and do the placing, because only they know their parts.
"""

from __future__ import annotations

import enum
import logging
from dataclasses import dataclass, field

from zimage_runner.errors import UserError
from zimage_runner.memory.alloc import AllocFields, alloc_string, export
from zimage_runner.memory.health import Action, Health, HealthCheck, Reading

__all__ = [
    "Action", "AllocFields", "GroupOffload", "Health", "HealthCheck", "Loading", "Memory", "ModelOffload",
    "OffloadType", "Reading", "Resident", "SequentialOffload", "Staged",
]  # fmt: skip

log = logging.getLogger(__name__)


class Loading(enum.Enum):
    """How the weights reach the GPU."""

    direct = "direct"
    """From the files straight to the GPU, tensor by tensor; no copy of the model in host memory."""
    cpu_then_gpu = "cpu_then_gpu"
    """The article's step 2: the whole model in host memory first, then one move."""


class OffloadType(enum.Enum):
    """What ``group_offload`` moves at a time."""

    block_level = "block_level"
    leaf_level = "leaf_level"


@dataclass(kw_only=True, slots=True)
class Memory:
    """Settings shared by every placement."""

    alloc_conf: str | None = None
    """Verbatim allocator settings, e.g. ``expandable_segments:True``; null keeps the environment's."""
    alloc: AllocFields = field(default_factory=AllocFields)
    """The same by name, instead of the string."""
    per_process_fraction: float | None = None
    """Share of the GPU's memory this process may allocate, 0 < f <= 1; null sets no limit."""
    loading: Loading = Loading.direct
    low_cpu_mem_usage: bool = True
    """Load without initialising the weights first. false is slower, needs twice the host memory, and is warned of."""
    device_map: str | None = None
    """null, cuda (same as loading=direct) or cpu (same as loading=cpu_then_gpu); splitting over GPUs is refused."""
    vae_tiling: bool = False
    """Decode large pictures in tiles: less memory, and faint differences at the tiles' edges."""
    vae_slicing: bool = False
    """Decode the pictures of a batch one by one: less memory."""
    health: Health = field(default_factory=Health)

    def apply_environment(self) -> None:
        """Export the allocator settings; call before importing torch: they count only before CUDA starts."""
        value = alloc_string(self.alloc_conf, self.alloc)
        if value is not None:
            export(value)

    def apply_limits(self, device: str) -> None:
        """Apply limits that need torch, before the model is loaded."""
        if self.per_process_fraction is not None and device == "cuda":
            import torch

            torch.cuda.set_per_process_memory_fraction(self.per_process_fraction)

    @property
    def placement(self) -> str:
        """Short name for messages and records: the option's name in the config group."""
        return "resident"

    @property
    def offloads(self) -> bool:
        """True when weights wait in host memory and travel to the GPU during generation."""
        return False

    @property
    def staged(self) -> bool:
        """True when the text encoder is freed before the denoiser is loaded."""
        return False


@dataclass(kw_only=True, slots=True)
class Resident(Memory):
    """Everything stays on the device: fastest, and the default."""

    def __post_init__(self) -> None:
        check_memory(self)


@dataclass(kw_only=True, slots=True)
class Staged(Memory):
    """All prompts are encoded first, then the text encoder makes room for the denoiser: 8 GB less, full speed."""

    def __post_init__(self) -> None:
        check_memory(self)

    @property
    def placement(self) -> str:
        return "staged"

    @property
    def staged(self) -> bool:
        return True


@dataclass(kw_only=True, slots=True)
class ModelOffload(Memory):
    """One whole component on the GPU at a time, the others in host memory."""

    def __post_init__(self) -> None:
        check_memory(self)

    @property
    def placement(self) -> str:
        return "model_offload"

    @property
    def offloads(self) -> bool:
        return True


@dataclass(kw_only=True, slots=True)
class SequentialOffload(Memory):
    """One layer on the GPU at a time: the least memory, and many times slower. The article's step 3."""

    def __post_init__(self) -> None:
        check_memory(self)

    @property
    def placement(self) -> str:
        return "sequential_offload"

    @property
    def offloads(self) -> bool:
        return True


@dataclass(kw_only=True, slots=True)
class GroupOffload(Memory):
    """Groups of blocks travel to the GPU just before they are used, with streams while the previous group computes."""

    offload_type: OffloadType = OffloadType.block_level
    num_blocks_per_group: int = 1
    """Transformer blocks that travel together (block_level)."""
    use_stream: bool = True
    """Copy the next group while this one computes. CUDA only; on the CPU there is nothing to overlap."""
    record_stream: bool = True
    """Let the allocator reuse a group's memory without waiting; needs use_stream."""
    low_cpu_mem_usage_pinning: bool = False
    """Pin each group when it travels instead of all of them at the start: slower, and no pinned copy of the model."""

    def __post_init__(self) -> None:
        check_memory(self)
        if self.num_blocks_per_group < 1:
            raise UserError(f"memory.num_blocks_per_group={self.num_blocks_per_group} is below 1: use 1 or more")
        if self.use_stream and self.offload_type is OffloadType.block_level and self.num_blocks_per_group != 1:
            raise UserError(
                f"memory.num_blocks_per_group={self.num_blocks_per_group} with memory.use_stream=true: diffusers "
                "prefetches one block at a time; use num_blocks_per_group=1 or use_stream=false"
            )

    @property
    def placement(self) -> str:
        return "group_offload"

    @property
    def offloads(self) -> bool:
        return True


def check_memory(memory: Memory) -> None:
    """Checks of the common fields, called by the leaves: zero-argument super() fails in slots dataclasses on 3.11."""
    fraction = memory.per_process_fraction
    if fraction is not None and not 0 < fraction <= 1:
        raise UserError(f"memory.per_process_fraction={fraction} is out of range: use more than 0 and at most 1")
    alloc_string(memory.alloc_conf, memory.alloc)
    _check_device_map(memory)
    if memory.offloads and memory.loading is Loading.direct:
        # Offloading starts from host memory; loading to the GPU first would need the room that offloading saves.
        memory.loading = Loading.cpu_then_gpu


def _check_device_map(memory: Memory) -> None:
    wanted = memory.device_map
    if wanted is None:
        return
    if wanted in ("cuda", "cpu"):
        memory.loading = Loading.direct if wanted == "cuda" else Loading.cpu_then_gpu
        return
    raise UserError(
        f"memory.device_map={wanted} would split one model over several GPUs, which is slower than one: keep the model "
        "on one GPU (memory.device_map=null) and use several by one process each, with CUDA_VISIBLE_DEVICES=0 "
        "prompts.shard=1/2 and CUDA_VISIBLE_DEVICES=1 prompts.shard=2/2; "
        "too little memory for one GPU: memory=staged or memory=group_offload"
    )
