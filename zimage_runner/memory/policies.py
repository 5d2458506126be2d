"""How GPU memory is allocated and where the model's parts live: the ``memory`` config group.

The options differ in placement alone; the allocator's settings, the loading path, VAE tiling and the health check are
common to all. Engines read the fields and do the placing, because only they know their parts.
"""

from __future__ import annotations

import enum
import logging
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from zimage_runner.errors import UserError
from zimage_runner.memory.alloc import AllocFields, alloc_string, export
from zimage_runner.memory.health import Action, Health, HealthCheck, Reading

__all__ = [
    "Action", "AllocFields", "Auto", "GroupOffload", "Health", "HealthCheck", "Loading", "Memory", "ModelOffload",
    "OffloadType", "Reading", "Resident", "SequentialOffload", "Staged",
]  # fmt: skip

log = logging.getLogger(__name__)

OF_A_GPU = ("alloc_conf", "alloc", "per_process_fraction", "health")
"""Settings of Memory that say nothing of a CPU."""


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
    """A memory policy: its settings, and as class variables what engines and sessions want to know of it.

    The settings here are shared by every placement. A new policy is a subclass, a line in config/registry.py and a YAML
    file in conf/memory/.
    """

    placement: ClassVar[str]
    """The option's name in the config group, for messages and records."""
    engines: ClassVar[tuple[str, ...]] = ("native", "diffusers")
    """Engines that can do it."""
    staged: ClassVar[bool] = False
    """The text encoder is freed before the denoiser is loaded."""
    streamed: ClassVar[bool] = False
    """The engine itself brings weights to the GPU just before it uses them."""
    wants_captions: ClassVar[bool] = False
    """Sessions are to know all captions before the model is loaded."""
    offloads: ClassVar[bool] = False
    """Weights wait in host memory and travel to the GPU during generation."""
    compiles: ClassVar[bool] = True
    """torch.compile can capture what it does; False for hooks within the transformer."""
    needs_gpu: ClassVar[bool] = False
    merges: ClassVar[bool] = True
    """Weights can be changed once they are loaded; False where other copies of them are what is computed with."""

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
        """Apply limits that need torch, before the model is loaded; on a CPU say what has no effect there."""
        if device != "cuda":
            given = [name for name in OF_A_GPU if getattr(self, name) != getattr(Memory(), name)]
            if given:
                log.warning("memory.%s: about a GPU's memory, without effect on a CPU", ", memory.".join(given))
        elif self.per_process_fraction is not None:
            import torch

            torch.cuda.set_per_process_memory_fraction(self.per_process_fraction)

    def __post_init__(self) -> None:
        check_memory(self)

    def loads_through_host(self) -> bool:
        """Return whether the whole model is read into host memory first.

        Offloading starts there: loading to the GPU first would need the room that it saves. ``device_map`` says the
        same as ``loading`` in other words and wins over it.
        """
        if self.offloads or self.device_map is None:
            return self.offloads or self.loading is Loading.cpu_then_gpu
        return self.device_map == "cpu"

    def place(self, pipe: Any, device: Any) -> None:
        """Put a loaded diffusers pipeline where it shall be. ``device``: the torch.device to compute on."""
        pipe.to(device)


@dataclass(kw_only=True, slots=True)
class Auto(Memory):
    """The fastest of the others that fits into the GPU's free memory; without a GPU, resident. The default.

    The engine chooses when it loads (engines/placing.py): from then on there is one of the others.
    """

    placement: ClassVar[str] = "auto"
    wants_captions: ClassVar[bool] = True

    def taken(self, kind: type[Memory]) -> Memory:
        """Another placement with these settings."""
        return kind(**{one.name: getattr(self, one.name) for one in fields(self)})


@dataclass(kw_only=True, slots=True)
class Resident(Memory):
    """Everything stays on the device: fastest."""

    placement: ClassVar[str] = "resident"


@dataclass(kw_only=True, slots=True)
class Staged(Memory):
    """All prompts are encoded first, then the text encoder makes room for the denoiser: 8 GB less, full speed."""

    placement: ClassVar[str] = "staged"
    staged: ClassVar[bool] = True
    wants_captions: ClassVar[bool] = True


@dataclass(kw_only=True, slots=True)
class Streamed(Memory):
    """Weights wait in host memory and come to the GPU block by block while the blocks before compute: the least memory
    at which a batch of pictures still takes about full speed."""

    placement: ClassVar[str] = "streamed"
    engines: ClassVar[tuple[str, ...]] = ("native",)
    staged: ClassVar[bool] = True
    streamed: ClassVar[bool] = True
    wants_captions: ClassVar[bool] = True


@dataclass(kw_only=True, slots=True)
class ModelOffload(Memory):
    """One whole component on the GPU at a time, the others in host memory."""

    placement: ClassVar[str] = "model_offload"
    engines: ClassVar[tuple[str, ...]] = ("diffusers",)
    offloads: ClassVar[bool] = True

    def place(self, pipe: Any, device: Any) -> None:
        pipe.enable_model_cpu_offload(device=device)


@dataclass(kw_only=True, slots=True)
class SequentialOffload(Memory):
    """One layer on the GPU at a time: the least memory, and many times slower. The article's step 3."""

    placement: ClassVar[str] = "sequential_offload"
    engines: ClassVar[tuple[str, ...]] = ("diffusers",)
    offloads: ClassVar[bool] = True
    compiles: ClassVar[bool] = False
    needs_gpu: ClassVar[bool] = True
    merges: ClassVar[bool] = False

    def place(self, pipe: Any, device: Any) -> None:
        pipe.enable_sequential_cpu_offload(device=device)


@dataclass(kw_only=True, slots=True)
class GroupOffload(Memory):
    """Groups of blocks travel to the GPU just before they are used, with streams while the previous group computes."""

    placement: ClassVar[str] = "group_offload"
    engines: ClassVar[tuple[str, ...]] = ("diffusers",)
    offloads: ClassVar[bool] = True
    compiles: ClassVar[bool] = False
    merges: ClassVar[bool] = False

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

    def place(self, pipe: Any, device: Any) -> None:
        use_stream = self.use_stream and device.type == "cuda"
        pipe.enable_group_offload(
            onload_device=device,
            offload_type=self.offload_type.value,
            num_blocks_per_group=self.num_blocks_per_group,
            use_stream=use_stream,
            record_stream=use_stream and self.record_stream,
            low_cpu_mem_usage=use_stream and self.low_cpu_mem_usage_pinning,
        )


def check_memory(memory: Memory) -> None:
    """Raise UserError for a common field whose value is out of range."""
    fraction = memory.per_process_fraction
    if fraction is not None and not 0 < fraction <= 1:
        raise UserError(f"memory.per_process_fraction={fraction} is out of range: use more than 0 and at most 1")
    alloc_string(memory.alloc_conf, memory.alloc)
    _check_device_map(memory)


def _check_device_map(memory: Memory) -> None:
    wanted = memory.device_map
    if wanted in (None, "cuda", "cpu"):
        return
    raise UserError(
        f"memory.device_map={wanted} would split one model over several GPUs, which is slower than one: keep the model "
        "on one GPU (memory.device_map=null) and use several by one process each, with CUDA_VISIBLE_DEVICES=0 "
        "prompts.shard=1/2 and CUDA_VISIBLE_DEVICES=1 prompts.shard=2/2; "
        "too little memory for one GPU: memory=staged or memory=group_offload"
    )
