from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.support.written_runs import PARAMS, noise_pictures
from zimage_runner.errors import UserError
from zimage_runner.outputs.config import Format, Output
from zimage_runner.outputs.encoders import encode
from zimage_runner.outputs.metadata import parameters_text, read_metadata

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=60)  # surrogates and controls too


def recipe(prompt: str, negative: str = "", **fields) -> dict:
    params = {**PARAMS, "negative_prompt": negative, "guidance_scale": 4.0 if negative else 0.0}
    return {
        "prompt": prompt,
        "seed": 42,
        "params": params,
        "model": {"name": "zimage_turbo", "digest": "0123456789abcdef"},
        "versions": {"zimage_runner": "1.0"},
        **fields,
    }


def save(tmp_path, png: bytes):
    path = tmp_path / "x.png"
    path.write_bytes(png)
    return path


def test_parameters_follow_the_convention():
    assert parameters_text(recipe("a cat", "blurry")).splitlines() == [
        "a cat",
        "Negative prompt: blurry",
        "Steps: 8, Sampler: Euler, Schedule type: Simple, CFG scale: 4, Seed: 42, Size: 48x32, "
        "Model hash: 0123456789, Model: zimage_turbo, Version: zimage_runner 1.0",
    ]
    assert "Negative" not in parameters_text(recipe("a cat"))


def test_what_a_picture_started_from_and_followed_is_told_as_a1111_does():
    inputs = {
        "image": {"path": "/x/cat.png"}, "strength": 0.6, "control_image": {"path": "/x/edges.png"},
        "control_scale": 0.75, "control_preprocess": "canny", "control_end": 0.8,
        "controlnet": {"path": "/models/Union-2.1, lite.safetensors"},
    }  # fmt: skip
    text = parameters_text(recipe("a cat", inputs=inputs))
    assert "Denoising strength: 0.6, " in text
    unit = r"Module: canny, Model: \"Union-2.1, lite\", Weight: 0.75, Guidance Start: 0, Guidance End: 0.8"
    assert f'ControlNet 0: "{unit}", ' in text
    assert "Denoising" not in parameters_text(recipe("a cat", inputs={"control_image": {}, "control_scale": 1.0}))


def test_values_with_separators_are_quoted():
    assert 'Model: "a, b: c"' in parameters_text(recipe("x", model={"name": "a, b: c"}))


@given(prompt=ANY_TEXT, extra=ANY_TEXT)
def test_any_recipe_comes_back_exactly(tmp_path_factory, prompt, extra):
    wanted = recipe(prompt, metadata={"note": extra})
    pixels = noise_pictures()[0]
    path = save(tmp_path_factory.mktemp("png"), encode(pixels, wanted, Output()))
    assert read_metadata(path).recipe == wanted
    assert np.array_equal(np.asarray(Image.open(path)), pixels)


@pytest.mark.parametrize(
    ("prompt", "chunk"),
    [("a café", b"tEXtparameters"), ("一只猫 🐈", b"iTXtparameters"), ("é\0\0x", b"tEXtparameters")],
)
def test_text_chunk_fits_the_text(tmp_path, prompt, chunk):
    png = encode(noise_pictures()[0], recipe(prompt), Output())
    assert chunk in png
    parameters = read_metadata(save(tmp_path, png)).parameters
    assert parameters is not None
    assert parameters.startswith(prompt.replace("\0", "") + "\n")


def test_megabyte_prompt(tmp_path):
    prompt = "猫" * 400_000
    metadata = read_metadata(save(tmp_path, encode(noise_pictures()[0], recipe(prompt), Output())))
    assert metadata.recipe is not None
    assert metadata.recipe["prompt"] == prompt


def test_off_and_foreign_pictures(tmp_path):
    bare = save(tmp_path, encode(noise_pictures()[0], recipe("x"), Output(metadata=False)))
    assert read_metadata(bare).recipe is read_metadata(bare).parameters is None
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "BMP")
    with pytest.raises(UserError, match="cannot be read as a PNG"):
        read_metadata(save(tmp_path, buffer.getvalue()))
    with pytest.raises(UserError, match="cannot be read"):
        read_metadata(tmp_path / "missing.png")


@pytest.mark.parametrize(
    ("format", "quality", "pillow", "largest_difference"),
    [
        ("jpeg", None, "JPEG", 255),
        ("jpeg", 100, "JPEG", 16),
        ("webp", 80, "WEBP", 255),
        ("webp", "lossless", "WEBP", 0),
    ],
)
def test_other_formats_say_the_same(tmp_path, format, quality, pillow, largest_difference):
    pixels, wanted = noise_pictures()[0], recipe('一只猫, a "fox"', metadata={"note": "é\0"})
    path = save(tmp_path, encode(pixels, wanted, Output(format=Format[format], quality=quality)))
    said, png = read_metadata(path), read_metadata(save(tmp_path, encode(pixels, wanted, Output())))
    assert said.recipe == {**wanted, "pixels_sha256": hashlib.sha256(pixels.tobytes()).hexdigest()}
    assert said.parameters == png.parameters
    path = save(tmp_path, encode(pixels, wanted, Output(format=Format[format], quality=quality)))
    with Image.open(path) as image:
        assert image.format == pillow
        difference = np.abs(np.asarray(image.convert("RGB"), np.int16) - pixels.astype(np.int16)).max()
    assert difference <= largest_difference


def test_a_jpeg_has_no_room_for_a_long_recipe(tmp_path):
    said = read_metadata(
        save(tmp_path, encode(noise_pictures()[0], recipe("cat " * 50_000), Output(format=Format.jpeg)))
    )
    assert said.recipe is None
    assert said.parameters is not None
    assert said.parameters.startswith("cat cat")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quality": 90}, "output.quality=90 has no effect on PNG, which loses nothing: use jpeg or webp with it"),
        ({"format": Format.jpeg, "quality": "lossless"}, "output.quality=lossless: write a whole number from 1 to 100"),
        ({"format": Format.webp, "quality": 0}, "output.quality=0: write a whole number from 1 to 100 or lossless"),
        (
            {"format": Format.webp, "quality": True},
            "output.quality=True: write a whole number",
        ),
        ({"format": Format.webp, "png_compress_level": 6}, "output.png_compress_level=6 has no effect on webp"),
    ],
)
def test_options_that_have_no_effect_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Output(**options)


@pytest.mark.parametrize("level", [0, 1, 9])
def test_bytes_depend_on_pixels_recipe_and_options_alone(level):
    output = Output(png_compress_level=level)
    pixels = noise_pictures()[0]
    assert encode(pixels, recipe("x"), output) == encode(pixels.copy(), recipe("x"), output)


def test_compress_level_matters():
    flat = np.tile(np.arange(48, dtype=np.uint8)[None, :, None], (32, 1, 3))
    sizes = [len(encode(flat, {}, Output(metadata=False, png_compress_level=n))) for n in (0, 9)]
    assert sizes[1] < sizes[0] / 4
