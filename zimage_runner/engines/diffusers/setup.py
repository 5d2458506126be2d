"""Loading, placing and compiling ZImagePipeline as the ``memory`` and ``compile`` groups say."""

from __future__ import annotations

import contextlib
import enum
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_runner.compile import Compile, Full, Regional, uses_cuda_graphs
from zimage_runner.engines.diffusers.from_file import load_from_file
from zimage_runner.errors import UserError
from zimage_runner.memory.policies import Memory

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

RECOMPILE_LIMIT = 256
"""Static shapes: one compilation per size, caption length and batch size of the plan. Dynamo gives up after 8."""


class Stage(enum.Enum):
    """Which components are loaded."""

    whole = "whole"
    encoder = "encoder"
    denoiser = "denoiser"


ABSENT = {Stage.whole: (), Stage.encoder: ("transformer", "vae"), Stage.denoiser: ("text_encoder", "tokenizer")}
"""Components that a stage goes without."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """How the pipeline is made."""

    path: Path
    device: str
    dtype: str
    attention: str
    memory: Memory
    compile: Compile
    vae_channels_last: bool = False

    def transformer_config(self) -> dict[str, Any]:
        """The transformer's config.json."""
        return json.loads((self.path / "transformer" / "config.json").read_text(encoding="utf-8"))

    def load(self, stage: Stage, phases: dict[str, float]) -> Any:
        """A pipeline with the components of ``stage``, placed and compiled. Adds its seconds to ``phases``."""
        from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline

        options: dict[str, Any] = dict.fromkeys(ABSENT[stage])
        if self._straight_to_gpu:
            options["device_map"] = self.device
        elif self.memory.device_map == "cpu":
            options["device_map"] = "cpu"
        with phase(phases, "read"):
            where = self.device if self._straight_to_gpu else "cpu"
            for component in ("transformer", "text_encoder", "vae"):
                if component not in options:
                    module = load_from_file(self.path / component, where, self._torch_dtype)
                    if module is not None:
                        options[component] = module
            pipe = ZImagePipeline.from_pretrained(
                str(self.path),
                dtype=self._torch_dtype,
                low_cpu_mem_usage=self.memory.low_cpu_mem_usage,
                local_files_only=True,
                **options,
            )
            synchronize(self.device)
        pipe.set_progress_bar_config(disable=True)
        self._vae_options(pipe)
        with phase(phases, "to_device"):
            self._place(pipe)
            synchronize(self.device)
        if pipe.transformer is not None:
            if self.attention != "native":
                pipe.transformer.set_attention_backend(self.attention)
            with phase(phases, "compile"):
                self._compile(pipe)
        return pipe

    @property
    def _torch_dtype(self) -> Any:
        import torch

        return getattr(torch, self.dtype)

    @property
    def _straight_to_gpu(self) -> bool:
        return self.device == "cuda" and not self.memory.loads_through_host() and self.memory.low_cpu_mem_usage

    def check(self) -> None:
        """Refuse, or warn of, what makes no sense on this device. Before anything is loaded."""
        if self.device == "cpu" and self.memory.needs_gpu:
            raise UserError(
                "memory=sequential_offload needs a GPU: on the CPU there is nothing to save and accelerate's hooks "
                "fail; use memory=resident"
            )
        if not self.memory.low_cpu_mem_usage:
            log.warning(
                "memory.low_cpu_mem_usage=false initialises all weights before loading them, through host memory: "
                "slower, and it can swap; keep it true"
            )
        if self.device == "cpu" and self.memory.offloads:
            log.warning("memory=%s saves nothing on the CPU, where all weights are anyway", self.memory.placement)

    def _vae_options(self, pipe: Any) -> None:
        import torch

        if pipe.vae is None:
            return
        if self.memory.vae_tiling:
            pipe.vae.enable_tiling()
        if self.memory.vae_slicing:
            pipe.vae.enable_slicing()
        if self.vae_channels_last:
            pipe.vae.to(memory_format=torch.channels_last)

    def _place(self, pipe: Any) -> None:
        import torch

        if not self._straight_to_gpu:
            self.memory.place(pipe, torch.device(self.device))

    def _compile(self, pipe: Any) -> None:
        compile = self.compile
        if not isinstance(compile, Regional | Full):
            return
        import torch._dynamo

        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
        options = {"mode": compile.mode.value, "fullgraph": compile.fullgraph}
        transformer = pipe.transformer
        if isinstance(compile, Full):
            precompute_rope(transformer, self.device)
            transformer.compile(**options)
        else:
            for block in [*transformer.layers, *transformer.noise_refiner]:
                block.compile(**options, dynamic=False)
        if compile.vae:
            pipe.vae.decoder.compile(**options, dynamic=False)

    def mark_lengths(self, captions: Sequence[torch.Tensor]) -> None:
        """With the whole transformer compiled, captions come in unpadded: without this, each length in tokens would
        be compiled anew. The blocks of ``regional`` see padded lengths only."""
        if isinstance(self.compile, Full):
            import torch._dynamo

            for caption in captions:
                torch._dynamo.maybe_mark_dynamic(caption, 0)

    def mark_step(self, *_: Any) -> dict[str, Any]:
        """Tell CUDA graphs that a new forward begins, so that the last one's outputs may be overwritten.

        Without the mark each compiled block would count as a step of its own. Also the pipeline's callback.
        """
        compile = self.compile
        if isinstance(compile, Regional | Full) and uses_cuda_graphs(compile.mode):
            import torch

            torch.compiler.cudagraph_mark_step_begin()
        return {}


def precompute_rope(transformer: Any, device: str) -> None:
    """Build the rotary tables ahead: inside forward they are made under ``torch.device``, which cannot be captured."""
    rope = transformer.rope_embedder
    tables = rope.precompute_freqs_cis(rope.axes_dims, rope.axes_lens, theta=rope.theta)
    rope.freqs_cis = [table.to(device) for table in tables]


def synchronize(device: str) -> None:
    """Wait until the GPU has done all submitted work."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


@contextlib.contextmanager
def phase(phases: dict[str, float], name: str) -> Iterator[None]:
    """Add the block's seconds to ``phases[name]``."""
    started = time.perf_counter()
    yield
    phases[name] = phases.get(name, 0.0) + time.perf_counter() - started
