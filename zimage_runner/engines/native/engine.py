"""The native model behind the Engine contract."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zimage_runner.engines.base import Engine, PendingImages
from zimage_runner.engines.device import choose_device, choose_dtype, release
from zimage_runner.engines.merging import Adapters
from zimage_runner.engines.native.adapted import adapted_text_encoder, adapted_transformer
from zimage_runner.engines.native.assembly import (
    load_controlnet,
    load_text_encoder,
    load_transformer,
    load_vae,
    load_vae_encoder,
    open_model,
)
from zimage_runner.engines.native.config import NativeEngine
from zimage_runner.engines.native.controlnet import condition_of
from zimage_runner.engines.native.model import Control, Options
from zimage_runner.engines.native.sampler import Guidance, Start
from zimage_runner.engines.native.streaming import BlockStream
from zimage_runner.engines.native.text_encoder import TextEncoder
from zimage_runner.engines.placing import place
from zimage_runner.engines.precision import Precision, check_device
from zimage_runner.engines.request import DenoiseRequest, LoadRequest, Posterior
from zimage_runner.errors import RunStopped, UnsupportedCheckpoint, UserError
from zimage_runner.pictures.placed import GREY
from zimage_runner.sampling import Lora
from zimage_runner.weights.find.controlnet import ControlNetFile
from zimage_runner.weights.preload.source import WeightsSource
from zimage_runner.weights.safetensors_file import BadWeightsFile

HIDDEN = 1.1
"""With memory=streamed: computing should take this many times as long as the copying that it hides."""


class NativeEngineAdapter(Engine):
    """Engine contract to NativeModel's calls, and which of its networks are in memory.

    With ``memory=staged`` either the text encoder or the transformer and the decoder are loaded; the first call that
    needs the others frees those.
    """

    name = "native"
    tiles = False
    """Pictures are decoded one by one, with a fraction of a usual decoder's memory."""

    def __init__(
        self,
        weights: WeightsSource,
        options: Options,
        staged: bool,
        encodes: bool = True,
        published: Path | None = None,
        controlnet: ControlNetFile | None = None,
        controlled: bool = False,
    ) -> None:
        """Load the checkpoint. Raises UserError for one that this engine does not compute.

        Without ``encodes`` the text encoder waits for the first call of ``encode``. ``published``: the directory that
        was downloaded, where the weights are those of a prepared copy. ``controlled``: ``controlnet`` is loaded with
        the transformer; without it, for the first item that it steers.
        """
        self.load_phases = {}
        path = weights.path
        self.path: Path = path
        self._staged = staged
        self._weights, self._taken = weights, set[str]()
        self._published, self._adapters = published or path, Adapters()
        self._controlnet, self._controlled = controlnet, controlled
        self._greys = dict[tuple[int, int], torch.Tensor]()
        with self._phase("open"):
            self.model = open_model(path, options)
        if encodes:
            self._load_encoder()
        # Captions are encoded while the transformer is still on its way.
        if not staged and not (encodes and weights.is_travelling):
            self._load_denoiser()
        self.device = options.device
        self.dtype = str(options.dtype).removeprefix("torch.")
        self.attention = self.model.attention.name
        self.latent_channels = self.model.description.transformer.in_channels
        self.vae_scale_factor = self.model.description.vae.scale

    @classmethod
    def load(cls, config: NativeEngine, weights: WeightsSource, request: LoadRequest) -> NativeEngineAdapter:
        """The engine that the configuration asks for."""
        device = choose_device(config)
        dtype = choose_dtype(request.model.dtype, device)
        check_device(config.precision, device, dtype)
        request.memory.apply_limits(device)
        weights.settle(device, dtype)
        placed = place(config, request, device, weights.free_bytes)
        memory = placed.memory
        options = Options(
            device=device,
            dtype=getattr(torch, dtype),
            attention=config.attention,
            fused_kernels=config.fused_kernels,
            precision=config.precision.value,
            bf16_layers=frozenset(config.bf16_layers),
            cuda_graphs=config.cuda_graphs,
            convention=request.model.controlnet_convention,
            streamed=memory.streamed,
            rehearse_decoder=device == "cuda" and not memory.staged,
        )
        checkpoint = request.checkpoint
        control = (checkpoint.controlnet, request.controlled)
        engine = cls(weights, options, memory.staged, request.encodes, checkpoint.path, *control)
        engine.placed = placed
        return engine

    def adapt(self, loras: Sequence[Lora]) -> bool:
        with self._reading():
            return self._adapters.want(loras)

    def encode(self, texts: Sequence[str], max_sequence_length: int) -> list[torch.Tensor]:
        self._load_encoder()
        with self._reading():  # the vectors of tokens, and what is streamed
            return self.model.encode(texts, max_sequence_length)

    def encode_picture(self, pixels: np.ndarray) -> Posterior:
        self._load_denoiser()
        if not hasattr(self.model, "vae_encoder"):
            with self._phase("vae_encoder"):
                load_vae_encoder(self.model, self._published)
        return self.model.encode_picture(torch.from_numpy(pixels.copy()))

    def denoise(self, request: DenoiseRequest) -> torch.Tensor:
        self._load_denoiser()
        params = request.params
        guidance = Guidance(
            scale=params.guidance_scale,
            normalization=params.cfg_normalization,
            truncation=params.cfg_truncation,
        )
        self._drawn = len(request.noise)
        start = None
        if request.start is not None and params.inputs is not None:
            strength, exact = params.inputs.strength, params.inputs.steps_after_strength
            tile = params.inputs.tile // self.vae_scale_factor
            start = Start(latents=request.start, strength=strength, exact=exact, mask=request.mask, tile=tile)
        negatives = request.negative_prompt_embeds
        return self.model.denoise(
            request.prompt_embeds, request.noise, params.num_inference_steps, guidance, negatives, start,
            self._control(request),
        )  # fmt: skip

    def _control(self, request: DenoiseRequest) -> Control | None:
        """What steers the batch, by the ControlNet that is loaded for it."""
        given, inputs = request.control, request.params.inputs
        if given is None or inputs is None:
            return None
        self._load_controlnet()
        height, width = (self.vae_scale_factor * side for side in given.pictures.shape[-2:])
        layout, convention = self.model.controlnet.layout, self.model.options.convention
        condition = condition_of(given, layout.channels, convention, lambda: self._grey(height, width))
        return Control(condition=condition, scales=given.scales, start=inputs.control_start, end=inputs.control_end)

    def _grey(self, height: int, width: int) -> torch.Tensor:
        """Latents of a grey picture."""
        if (height, width) not in self._greys:
            self._greys.clear()
            pixels = np.full((height, width, 3), GREY, dtype=np.float32)
            self._greys[height, width] = self.encode_picture(pixels).mean
        return self._greys[height, width]

    def decode(self, latents: torch.Tensor) -> PendingImages:
        self._load_denoiser()
        return self.model.decode(latents)

    def decode_carefully(self, latents: torch.Tensor, *, float32: bool = False, tiled: bool = False) -> PendingImages:
        self._load_denoiser()
        return self.model.decode(latents, float32=float32)

    def synchronize(self) -> None:
        if self.device != "cuda":
            return
        if hasattr(self.model, "transformer"):
            torch.cuda.synchronize()
        else:  # weights on their way are no work of this engine's yet
            torch.cuda.current_stream().synchronize()

    def numerics(self) -> dict[str, Any]:
        options, numerics = self.model.options, super().numerics()
        if options.precision != Precision.bf16.value:
            numerics["precision"] = options.precision
            if options.bf16_layers:
                numerics["bf16_layers"] = sorted(options.bf16_layers)
        return numerics

    def useful_batch(self) -> int | None:
        stream = self.model.transformer.stream
        if stream is None:
            return None
        control = getattr(self.model, "controlnet", None)
        ratios = [one.copying_over_computing() for one in (stream, control and control.stream) if one is not None]
        return max(1, math.ceil(HIDDEN * self._drawn * max(ratios)))

    def free_memory(self) -> bool:
        held = [self.model.graphs.give_up(), self._adapters.free_memory()]
        self.model.forget()
        return any(held)

    def close(self) -> None:
        self.model.forget()
        self._free("text_encoder", "transformer", "vae", "vae_encoder", "controlnet")

    def _load_encoder(self) -> None:
        if hasattr(self.model, "text_encoder"):
            return
        if self._staged and hasattr(self.model, "transformer") and not self.model.options.streamed:
            self.model.forget()
            self._free("transformer", "vae", "vae_encoder", "controlnet")
        with self._phase("text_encoder"):
            load_text_encoder(self.model, self.path, self._tensors, self._published)
        if isinstance(self.model.text_encoder, TextEncoder):
            self._adapters.attach(adapted_text_encoder(self.model))

    def _load_denoiser(self) -> None:
        if hasattr(self.model, "transformer"):
            return
        if self._staged and not self.model.options.streamed:
            self._free("text_encoder")
        with self._phase("transformer"):
            load_transformer(self.model, self.path, self._tensors)
        self._adapters.attach(adapted_transformer(self.model, self._published / "transformer"))
        with self._phase("vae"):
            load_vae(self.model, self.path, self._tensors)
        if self._controlled:
            self._load_controlnet()

    def _load_controlnet(self) -> None:
        if hasattr(self.model, "controlnet"):
            return
        assert self._controlnet is not None, "refused when the run was planned"
        with self._phase("controlnet"):
            load_controlnet(self.model, self._controlnet)

    def _tensors(self, component: str) -> dict[str, torch.Tensor] | None:
        # What is on its way to the device can be taken once; a network that comes back is read from its files.
        if component in self._taken:
            return None
        self._taken.add(component)
        return self._weights.tensors(component)

    def _free(self, *networks: str) -> None:
        size = 0
        for name in networks:
            self._adapters.detach(name)
            network = getattr(self.model, name, None)
            if network is None:
                continue
            for stream in (getattr(network, name, None) for name in ("stream", "caption_stream")):
                if isinstance(stream, BlockStream):
                    stream.close()
            if isinstance(network, torch.nn.Module):  # a streamed text encoder holds none
                size += sum(parameter.nbytes for parameter in network.parameters())
            delattr(self.model, name)
        release(self.model.device.type, size)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Weights that cannot be read end the run: each further item would fail for the same reason."""
        try:
            yield
        except (OSError, BadWeightsFile) as error:
            raise RunStopped(f"weights cannot be read: {error}: restore that file") from error

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """A part of loading, whenever it comes; its seconds. A checkpoint that does not fit is refused in one line."""
        started = time.perf_counter()
        try:
            with self._reading():
                yield
        except (ValueError, KeyError) as error:
            kind = UnsupportedCheckpoint if name == "open" else UserError
            raise kind(f"engine=native cannot run {self.path}: {error}; use engine=diffusers") from error
        if torch.cuda.is_initialized():
            # The whole device would be waited for with all copies of weights on their way that were begun by then, and
            # the bus is never idle before the last.
            torch.cuda.current_stream().synchronize()
        self.load_phases[name] = self.load_phases.get(name, 0.0) + time.perf_counter() - started
