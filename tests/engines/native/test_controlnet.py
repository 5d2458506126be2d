"""The native ControlNet steers as diffusers' does: every layout, latents within 1e-4 in float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import NANO
from tests.support.controlnets import LAYOUTS, TRANSFORMER, make_controlnet, write_controlnet
from tests.support.reference import TOLERANCE, Reference, difference, noise
from zimage_runner.engines.native.assembly import load_controlnet, load_model
from zimage_runner.engines.native.model import Control, NativeModel, Options
from zimage_runner.engines.native.sampler import Guidance
from zimage_runner.model import Convention, Model, Source
from zimage_runner.weights.find.controlnet import find_controlnet

STEPS = 3


class Steered:
    """diffusers' ZImageControlNetModel beside its transformer, in either convention."""

    def __init__(self, reference: Reference, layout: str, convention: Convention) -> None:
        from diffusers.models.controlnets.controlnet_z_image import ZImageControlNetModel

        self.transformer, self.scheduler = reference.pipe.transformer, reference.pipe.scheduler
        self.net = ZImageControlNetModel.from_transformer(make_controlnet(layout), self.transformer)
        kind = LAYOUTS[layout]["add_control_noise_refiner"]
        self.reaches = convention is Convention.trained and kind is not None
        self.refiner = self.net.control_layers if kind == "control_layers" else self.net.control_noise_refiner

    @torch.inference_mode()
    def draw(
        self, embeds: torch.Tensor, z: torch.Tensor, condition: torch.Tensor, scale: float, active: range | None = None
    ) -> torch.Tensor:
        """Latents of one picture after STEPS steps, of which ``active`` are steered."""
        self.scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / STEPS, STEPS).tolist())
        for step, t in enumerate(self.scheduler.timesteps):
            given = ([z[0][:, None]], ((1000 - t) / 1000)[None], [embeds])
            if active is None or step in active:
                out = self._steered(given, condition, scale)
            else:
                out = self.transformer(*given)[0][0]
            z = self.scheduler.step(-out[None, :, 0], t, z, return_dict=False)[0]
        return z

    def _steered(self, given: tuple, condition: torch.Tensor, scale: float) -> torch.Tensor:
        rows: list[torch.Tensor] = []
        last = self.refiner[-1].register_forward_hook(lambda module, args, out: rows.append(out))
        samples = self.net(*given, [condition[0][:, None]], conditioning_scale=scale)
        last.remove()
        if not self.reaches:
            return self.transformer(*given, controlnet_block_samples=samples)[0][0]
        # As VideoX-Fun: the first hint of the condition's refiner is added behind the transformer's noise refiner.
        first = self.transformer.noise_refiner[0]
        handle = first.register_forward_hook(lambda module, args, out: out + scale * rows[0][0])
        try:
            return self.transformer(*given, controlnet_block_samples=samples)[0][0]
        finally:
            handle.remove()


def native(path: Path, **options: Any) -> NativeModel:
    model = load_model(NANO, Options(**options))
    config = Model(name="nano", source=Source.embedded, controlnet=str(path))
    found = find_controlnet(config, TRANSFORMER)
    assert found is not None
    load_controlnet(model, found)
    return model


@pytest.fixture(scope="module", params=list(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def file(layout: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_controlnet(tmp_path_factory.mktemp("control") / "any name.safetensors", layout)


def condition(layout: str, batch: int, height: int, width: int) -> torch.Tensor:
    channels = LAYOUTS[layout]["control_in_dim"]
    return torch.randn(batch, channels, height // 8, width // 8, generator=torch.Generator().manual_seed(9))


def test_the_layout_is_told_from_the_tensors(layout: str, file: Path) -> None:
    found = find_controlnet(Model(name="nano", source=Source.embedded, controlnet=str(file)), TRANSFORMER)
    assert found is not None
    fields = LAYOUTS[layout]
    kind = {None: "plain", "control_layers": "shared", "control_noise_refiner": "own"}
    assert found.layout.record() == {
        "channels": fields["control_in_dim"],
        "refiner": kind[fields["add_control_noise_refiner"]],
        "places": fields["control_layers_places"],
        "refiner_places": [] if layout == "1.0" else [0],
    }


@pytest.mark.parametrize("convention", list(Convention))
def test_a_velocity_is_diffusers(layout: str, file: Path, convention: Convention, reference: Reference) -> None:
    # 80x48 pixels are 15 image tokens, padded to 32. Two pictures, each with a scale of its own.
    model = native(file, convention=convention)
    embeds = model.encode(["a red apple", "a cat on a blue table in the snow and a dog"], 512)
    z, given = noise(2, 80, 48), condition(layout, 2, 80, 48)
    steered, scales = Steered(reference, layout, convention), (0.4, 0.9)
    ours = model.denoise(embeds, z, STEPS, control=Control(condition=given, scales=scales))
    rows = [slice(i, i + 1) for i in range(2)]
    theirs = torch.cat([steered.draw(embeds[i], z[row], given[row], scales[i]) for i, row in enumerate(rows)])
    plain = model.denoise(embeds, z, STEPS)
    print(difference(ours, theirs), difference(ours, plain), plain.std(), ours.std())
    assert difference(ours, theirs) <= TOLERANCE
    assert difference(ours, plain) > 0.05
