"""The native ControlNet steers as diffusers' does: every layout, latents within 1e-4 in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import NANO
from tests.support.controlnets import LAYOUTS, TRANSFORMER, make_controlnet, write_controlnet
from tests.support.reference import TOLERANCE, Reference, difference, noise
from zimage_runner.engines.native.assembly import load_controlnet, load_model, load_vae_encoder
from zimage_runner.engines.native.controlnet import condition_of
from zimage_runner.engines.native.graphs import GraphCache
from zimage_runner.engines.native.model import Control, NativeModel, Options
from zimage_runner.engines.native.sampler import Guidance, Start
from zimage_runner.engines.native.streaming import BlockStream
from zimage_runner.engines.native.tiles import in_tiles
from zimage_runner.engines.request import ControlLatents
from zimage_runner.model import Convention, Model, Source
from zimage_runner.pictures.placed import GREY, Placed
from zimage_runner.weights.find.controlnet import ControlNetFile, find_controlnet

STEPS = 2


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


def find(path: Path) -> ControlNetFile:
    found = find_controlnet(Model(name="nano", source=Source.embedded, controlnet=str(path)), TRANSFORMER)
    assert found is not None
    return found


def native(path: Path, **options: Any) -> NativeModel:
    model = load_model(NANO, Options(**options))
    load_controlnet(model, find(path))
    return model


def steer(layout: str, batch: int, height: int, width: int, **options: Any) -> Control:
    channels, generator = LAYOUTS[layout]["control_in_dim"], torch.Generator().manual_seed(9)
    condition = torch.randn(batch, channels, height // 8, width // 8, generator=generator)
    return Control(**{"condition": condition, "scales": [0.4, 0.9][:batch], **options})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("controlnets")
    return {layout: write_controlnet(folder / f"{number}.safetensors", layout) for number, layout in enumerate(LAYOUTS)}


@pytest.fixture(scope="module")
def embeds() -> list[torch.Tensor]:
    """Of two captions and of two more, a longer one among them."""
    return load_model(NANO, Options()).encode(["a red apple", "a cat", "", "blurry, ugly " * 12], 512)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_the_layout_is_told_from_the_tensors(layout: str, files: dict[str, Path]) -> None:
    fields = LAYOUTS[layout]
    kind = {None: "plain", "control_layers": "shared", "control_noise_refiner": "own"}
    assert find(files[layout]).layout.record() == {
        "channels": fields["control_in_dim"],
        "refiner": kind[fields["add_control_noise_refiner"]],
        "places": fields["control_layers_places"],
        "refiner_places": [] if layout == "1.0" else [0],
    }


@pytest.mark.parametrize("convention", list(Convention))
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_latents_are_diffusers(
    layout: str, files: dict[str, Path], convention: Convention, reference: Reference, embeds: list[torch.Tensor]
) -> None:
    # 80x48 pixels are 15 image tokens, padded to 32. Two pictures, each with a scale of its own.
    model, z, control = native(files[layout], convention=convention), noise(2, 80, 48), steer(layout, 2, 80, 48)
    ours = model.denoise(embeds[:2], z, STEPS, control=control)
    steered, rows = Steered(reference, layout, convention), [slice(i, i + 1) for i in range(2)]
    theirs = [steered.draw(embeds[i], z[row], control.condition[row], control.scales[i]) for i, row in enumerate(rows)]
    assert difference(ours, torch.cat(theirs)) <= TOLERANCE
    assert difference(ours, model.denoise(embeds[:2], z, STEPS)) > 0.1


def test_the_conventions_differ_only_where_the_noise_refiner_gets_hints(
    files: dict[str, Path], embeds: list[torch.Tensor]
) -> None:
    for layout in ("1.0", "2.1"):
        drawn = [
            native(files[layout], convention=convention).denoise(
                embeds[:1], noise(1, 32, 32), 1, control=steer(layout, 1, 32, 32)
            )
            for convention in Convention
        ]
        assert torch.equal(*drawn) == (layout == "1.0")


@pytest.mark.parametrize(("start", "end", "active"), [(0.5, 1.0, (1, 2)), (0.0, 0.5, (0, 1)), (0.0, 0.4, (0, 0))])
def test_some_of_the_steps(
    start: float, end: float, active: tuple[int, int], files: dict[str, Path], reference: Reference,
    embeds: list[torch.Tensor],
) -> None:  # fmt: skip
    model, z = native(files["2.1"]), noise(1, 32, 32)
    control = steer("2.1", 1, 32, 32, start=start, end=end)
    ours = model.denoise(embeds[:1], z, STEPS, control=control)
    steered = Steered(reference, "2.1", Convention.trained)
    theirs = steered.draw(embeds[0], z, control.condition, control.scales[0], range(*active))
    assert difference(ours, theirs) <= TOLERANCE


def test_a_scale_of_nothing_is_a_picture_without(files: dict[str, Path], embeds: list[torch.Tensor]) -> None:
    model, z = native(files["2.0"]), noise(2, 48, 32)
    plain = load_model(NANO, Options()).denoise(embeds[:2], z, STEPS)
    assert torch.equal(model.denoise(embeds[:2], z, STEPS), plain)
    assert torch.equal(model.denoise(embeds[:2], z, STEPS, control=steer("2.0", 2, 48, 32, scales=[0, 0])), plain)
    one = model.denoise(embeds[:2], z, STEPS, control=steer("2.0", 2, 48, 32, scales=[0, 0.8]))
    assert difference(one[:1], plain[:1]) <= TOLERANCE < difference(one[1:], plain[1:])


def test_guidance_steers_both_prompts(files: dict[str, Path], embeds: list[torch.Tensor]) -> None:
    """Together in one forward, or apart where the negative prompt is longer."""
    model, z, control = native(files["1.0"]), noise(2, 32, 32), steer("1.0", 2, 32, 32)
    negatives = [embeds[2], embeds[3]]
    guided = model.denoise(embeds[:2], z, 1, Guidance(scale=2.0), negatives, control=control)
    positive, negative = (model.denoise(some, z, 1, control=control) for some in (embeds[:2], negatives))
    # One step from noise at sigma 1: latents are noise + velocity.
    assert difference(guided, positive + 2 * (positive - negative)) <= TOLERANCE


@pytest.mark.parametrize(("layout", "options"), [("2.0", {"dtype": torch.bfloat16}), ("2.1", {"precision": "fp8"})])
def test_streamed_weights_draw_the_same(
    layout: str, options: dict[str, Any], files: dict[str, Path], embeds: list[torch.Tensor]
) -> None:
    resident, streamed = (native(files[layout], **options, streamed=s) for s in (False, True))
    assert isinstance(streamed.controlnet.stream, BlockStream)
    z, control = noise(2, 48, 32), steer(layout, 2, 48, 32, end=0.5)
    for _ in range(2):
        drawn = [model.denoise(embeds[:2], z, STEPS, control=control) for model in (resident, streamed)]
        assert torch.equal(*drawn)


def test_eight_bits_are_close(files: dict[str, Path], embeds: list[torch.Tensor]) -> None:
    z, control = noise(1, 64, 64), steer("2.1", 1, 64, 64)
    exact = native(files["2.1"]).denoise(embeds[:1], z, 1, control=control)
    plain = native(files["2.1"]).denoise(embeds[:1], z, 1)
    got = native(files["2.1"], precision="fp8").denoise(embeds[:1], z, 1, control=control)
    assert 0 < (got - exact).norm() < 0.25 * (exact - plain).norm()


def test_a_recorded_forward_is_one_of_its_own(files: dict[str, Path], embeds: list[torch.Tensor]) -> None:
    """Steered or not, the shapes are the same: the recordings must not be."""
    model, z = native(files["2.1"]), noise(1, 32, 32)
    expected = [model.denoise(embeds[:1], z, STEPS, control=c) for c in (None, steer("2.1", 1, 32, 32, end=0.5))]
    recorded: list[int] = []

    def capture(function: Any, inputs: Any) -> Any:
        recorded.append(len(inputs))
        return lambda inputs: function(*inputs)

    model.graphs = GraphCache(4, capture)
    for _ in range(3):
        drawn = [model.denoise(embeds[:1], z, STEPS, control=c) for c in (None, steer("2.1", 1, 32, 32, end=0.5))]
        assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))
    assert len(recorded) == len(set(recorded)) == 2


def pixels(seed: int) -> np.ndarray:
    """A soft picture, 48x64."""
    rough = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(rough).resize((64, 48), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(("layout", "masked"), [("1.0", False), ("2.1", False), ("2.0", True)])
def test_pictures_are_shown_as_in_diffusers_pipelines(
    layout: str, masked: bool, files: dict[str, Path], reference: Reference, embeds: list[torch.Tensor]
) -> None:
    from diffusers.models.controlnets.controlnet_z_image import ZImageControlNetModel
    from diffusers.pipelines.z_image.pipeline_z_image_controlnet import ZImageControlNetPipeline
    from diffusers.pipelines.z_image.pipeline_z_image_controlnet_inpaint import ZImageControlNetInpaintPipeline

    model, z = native(files[layout], convention=Convention.diffusers), noise(1, 48, 64)
    load_vae_encoder(model, NANO)
    mask = np.zeros((48, 64), np.float32)
    mask[13:40, 20:50] = 1
    control, image = pixels(1), pixels(2)
    around = np.where(mask[..., None] < 0.5, image, GREY).astype(np.float32)
    placed = Placed(
        pixels=image,
        mask=mask if masked else None,
        control=control,
        control_scale=0.8,
        around=around if masked else None,
    )
    given = ControlLatents.of([placed], lambda p: model.encode_picture(torch.from_numpy(p.copy())), 8)
    assert given is not None
    channels = LAYOUTS[layout]["control_in_dim"]
    condition = condition_of(given, channels, Convention.diffusers, lambda: pytest.fail("no grey is needed"))
    ours = model.denoise(embeds[:1], z, STEPS, control=Control(condition=condition, scales=given.scales))

    net = ZImageControlNetModel.from_transformer(make_controlnet(layout), reference.pipe.transformer)
    kind = ZImageControlNetInpaintPipeline if masked else ZImageControlNetPipeline
    parts = {name: part for name, part in reference.pipe.components.items() if part is not None}
    pipe: Any = kind(**parts, controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    more = {"image": Image.fromarray(image), "mask_image": Image.fromarray((mask * 255).astype(np.uint8))}
    theirs = pipe(
        prompt_embeds=[embeds[0]], negative_prompt_embeds=[], control_image=Image.fromarray(control), height=48,
        width=64,
        num_inference_steps=STEPS, guidance_scale=0.0, latents=z, controlnet_conditioning_scale=0.8,
        output_type="latent", **(more if masked else {}),
    ).images  # fmt: skip
    assert difference(ours, theirs) <= TOLERANCE


def test_without_a_mask_the_trained_convention_shows_the_hole_of_a_grey_picture() -> None:
    pictures, grey = torch.ones(2, 16, 4, 4), torch.full((16, 4, 4), 0.25)
    given = ControlLatents(pictures=pictures, scales=[1, 1])
    shown = condition_of(given, 33, Convention.trained, lambda: grey)
    assert shown.shape == (2, 33, 4, 4)
    assert torch.equal(shown[:, 16:17], torch.zeros(2, 1, 4, 4))
    assert (shown[:, 17:] == 0.25).all()
    assert not condition_of(given, 33, Convention.diffusers, lambda: grey)[:, 16:].any()
    assert condition_of(given, 16, Convention.trained, lambda: grey) is pictures


def test_a_large_picture_in_tiles(files: dict[str, Path], embeds: list[torch.Tensor]) -> None:
    """Each tile is steered by its own part of the condition, under guidance for both prompts."""
    model, z, control = native(files["2.1"]), noise(2, 64, 32), steer("2.1", 2, 64, 32)
    start = Start(latents=torch.zeros_like(z), strength=1.0, tile=4)
    guidance, negatives = Guidance(scale=2.0), [embeds[2], embeds[2]]
    drawn = model.denoise(embeds[:2], z, 1, guidance, negatives, start, control)

    def velocity(part: torch.Tensor, first: bool) -> torch.Tensor:
        latents, own = part.split([16, 33], dim=1)
        steered = Control(condition=own, scales=control.scales)
        return model.denoise(embeds[:2], latents, 1, guidance, negatives, control=steered) - latents

    assert difference(drawn, z + in_tiles(velocity, z, 4, control.condition)) <= TOLERANCE
