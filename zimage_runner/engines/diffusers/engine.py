"""engine=diffusers: the reference, on diffusers' own ZImagePipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from zimage_runner.engines.base import Engine, PendingImages
from zimage_runner.engines.device import choose_device, choose_dtype, release
from zimage_runner.engines.diffusers.attention import MASKLESS, choose_backend, this_machine
from zimage_runner.engines.diffusers.config import DiffusersEngine
from zimage_runner.engines.diffusers.setup import Setup, Stage, phase, synchronize
from zimage_runner.engines.diffusers.vae_fallback import fallback_vae
from zimage_runner.engines.merging import Adapters, Component, Slot
from zimage_runner.engines.placing import place
from zimage_runner.engines.request import DenoiseRequest, LoadRequest
from zimage_runner.model import padded_length, unshifted_sigmas
from zimage_runner.weights.prepared.names import canonical

if TYPE_CHECKING:
    import torch

    from zimage_runner.sampling import Lora


class DiffusersPipelineEngine(Engine):
    """A loaded ZImagePipeline behind the Engine contract.

    With ``memory=staged`` the pipeline holds either the text encoder or the denoiser and the VAE; entering the other
    stage frees one and loads the other.
    """

    name = "diffusers"

    def __init__(self, config: DiffusersEngine, request: LoadRequest) -> None:
        self.load_phases = {}
        with phase(self.load_phases, "import"):
            import torch  # noqa: F401
        # What this machine cannot do is refused before diffusers is imported, which takes many seconds.
        self.device = choose_device(config)
        self.dtype = choose_dtype(request.model.dtype, self.device)
        self.attention = choose_backend(config.attention, this_machine(self.device, self.dtype))
        request.memory.apply_limits(self.device)
        self.path = request.checkpoint.path
        self.placed = place(config, request, self.device)
        memory = self.placed.memory
        self._setup = Setup(
            path=request.checkpoint.path,
            device=self.device,
            dtype=self.dtype,
            attention=self.attention,
            memory=memory,
            compile=request.compile,
            vae_channels_last=config.vae_channels_last,
        )
        self._setup.check()
        with phase(self.load_phases, "import"):
            import diffusers  # noqa: F401
            from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline  # noqa: F401

            quiet_libraries()
        self.latent_channels = self._setup.transformer_config()["in_channels"]
        self.pipe: Any = None
        self._stage: Stage | None = None
        self._adapters = Adapters()
        self._enter(Stage.encoder if memory.staged else Stage.whole)
        self.vae_scale_factor = self.pipe.vae_scale_factor

    def _enter(self, stage: Stage) -> None:
        """Load the components of a stage, after freeing those of the one before."""
        if self._stage in (stage, Stage.whole):
            return
        self._free()
        self.pipe = self._setup.load(stage, self.load_phases)
        self._stage = stage
        for name in ("transformer", "text_encoder"):
            if (module := getattr(self.pipe, name)) is not None:
                self._adapters.attach(adapted(name, module, self.device))

    def adapt(self, loras: Sequence[Lora]) -> bool:
        return self._adapters.want(loras)

    def free_memory(self) -> bool:
        return self._adapters.free_memory()

    def _free(self) -> None:
        for name in ("transformer", "text_encoder"):
            self._adapters.detach(name)
        if self.pipe is None:
            return
        networks = [part for part in self.pipe.components.values() if hasattr(part, "parameters")]
        size = sum(parameter.nbytes for network in networks for parameter in network.parameters())
        self.pipe = self._stage = None
        del networks
        release(self.device, size)

    def encode(self, texts: Sequence[str], max_sequence_length: int) -> list[torch.Tensor]:
        import torch

        self._enter(Stage.encoder)
        # One text a call: the pipeline pads every text to max_sequence_length anyway, and its encoder's rounding
        # depends on the batch. A fresh list each time, because _encode_prompt writes into the one it is given.
        with torch.inference_mode():
            return [
                self.pipe.encode_prompt(
                    [text], device=self._input_device, do_classifier_free_guidance=False,
                    max_sequence_length=max_sequence_length,
                )[0][0].to(self._embeds_device, copy=True)
                for text in texts
            ]  # fmt: skip

    def denoise(self, request: DenoiseRequest) -> torch.Tensor:
        self._enter(Stage.denoiser)
        params = request.params
        steps = params.num_inference_steps
        device = self._input_device
        captions = [embeds.to(device) for embeds in request.prompt_embeds]
        negatives = [embeds.to(device) for embeds in request.negative_prompt_embeds or []]
        self._choose_attention([*captions, *negatives])
        self._setup.mark_lengths([*captions, *negatives])
        self._setup.mark_step()
        return self.pipe(
            prompt_embeds=captions,
            negative_prompt_embeds=negatives,
            latents=request.noise,
            height=params.height,
            width=params.width,
            num_inference_steps=steps,
            # Explicit sigmas make num_inference_steps mean transformer forwards in every diffusers version.
            sigmas=unshifted_sigmas(steps),
            guidance_scale=params.guidance_scale,
            cfg_normalization=params.cfg_normalization,
            cfg_truncation=params.cfg_truncation,
            output_type="latent",
            callback_on_step_end=self._setup.mark_step,
            callback_on_step_end_tensor_inputs=[],
        ).images

    def decode(self, latents: torch.Tensor) -> PendingImages:
        import torch

        from zimage_runner.engines.native.images import Ready

        self._enter(Stage.denoiser)
        vae = self.pipe.vae
        with torch.inference_mode():
            scaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
            pixels = vae.decode(scaled, return_dict=False)[0]
            return Ready(pixels)

    def decode_carefully(self, latents: torch.Tensor, *, float32: bool = False, tiled: bool = False) -> PendingImages:
        self._enter(Stage.denoiser)
        side = max(latents.shape[-2:]) * self.vae_scale_factor
        # Offloading hooks keep the weights elsewhere, in the dtype they were loaded in.
        float32 = float32 and not self._setup.memory.offloads
        with fallback_vae(self.pipe.vae, side, float32=float32, tiled=tiled):
            return self.decode(latents)

    def synchronize(self) -> None:
        synchronize(self.device)

    def close(self) -> None:
        self._free()

    def numerics(self) -> dict[str, Any]:
        # Spelled out because super() is the base class's four entries, and these add what else changes a pixel.
        extra = {"vae_tiling": self._setup.memory.vae_tiling, "vae_channels_last": self._setup.vae_channels_last}
        return super().numerics() | {name: True for name, on in extra.items() if on}

    def _choose_attention(self, embeds: Sequence[torch.Tensor]) -> None:
        """Captions of different padded lengths get an attention mask, which the flash and sage backends refuse."""
        if self.attention not in MASKLESS:
            return
        mixed = len({padded_length(len(e)) for e in embeds}) > 1
        self.pipe.transformer.set_attention_backend("native" if mixed else self.attention)

    @property
    def _input_device(self) -> Any:
        return self.pipe._execution_device

    @property
    def _embeds_device(self) -> Any:
        return "cpu" if self._setup.memory.staged else self._input_device


def adapted(name: str, module: torch.nn.Module, device: str) -> Component:
    """A component of the pipeline, for adapters to be merged into; its parameters have the published names."""
    import torch

    slots: dict[str, Slot] = {}
    for parameter, _ in module.named_parameters():
        owner, _, leaf = parameter.rpartition(".")
        slots[canonical(name, parameter)] = Slot(module.get_submodule(owner), leaf)
    return Component(name, slots, torch.device(device))


def quiet_libraries() -> None:
    """Silence the libraries' own progress bars and advice; errors still pass."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
