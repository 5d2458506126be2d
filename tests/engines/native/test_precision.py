"""fp8 and int8: rounding, products, the whole transformer, and pictures beside those of float32 and bfloat16."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import NANO
from tests.support.reference import noise
from zimage_runner.cli.main import main
from zimage_runner.engines.native.assembly import load_model
from zimage_runner.engines.native.kernels import torch_ops
from zimage_runner.engines.native.model import NativeModel, Options
from zimage_runner.engines.native.quantised import QuantisedLinear, quantised, rescaled
from zimage_runner.engines.native.sdpa import Attention, scaled_dot_product
from zimage_runner.engines.native.transformer import Transformer
from zimage_runner.engines.precision import Precision, check_device, likeness_key
from zimage_runner.errors import UserError
from zimage_runner.weights.eight_bits import FLOOR, FP8, INT8, Format, quantise_rows, rotate, rotation_group

FORMS = [pytest.param(form, id=form.name) for form in (FP8, INT8)]
PRODUCT_ERROR = {FP8: 0.045, INT8: 0.015}
"""Relative error of a product of normally distributed factors. e4m3's numbers are an eighth of their size apart, so
each factor is off by 1/8 / sqrt(12) * 0.72 = 2.6 % (root mean square); int8's are a 127th of a row's largest apart."""
STEPS = 3  # bfloat16 is slow on a CPU
EXCESS = 40
"""How many times further from float32 than bfloat16 a picture may be: e4m3 has 4 mantissa bits less, so that a rounding
is 32 times as large, but fewer numbers are rounded; the rest is room for what steps make of it."""


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@settings(deadline=None, max_examples=60)
@given(
    form=st.sampled_from([FP8, INT8]),
    exponents=st.lists(st.integers(-9, 9), min_size=1, max_size=5),
    features=st.sampled_from([32, 96, 288]),
    seed=st.integers(0, 99),
)
def test_each_row_is_rounded_by_its_own_scale(form: Format, exponents: list[int], features: int, seed: int) -> None:
    size = torch.tensor([10.0**exponent for exponent in exponents])
    x = randn(len(exponents), features, seed=seed) * size[:, None]
    values, scale = quantise_rows(x, form)
    assert values.dtype == form.dtype
    assert values.float().abs().amax() <= form.largest
    turned = rotate(x) if form.rotates else x
    back = values.float() * scale[:, None]
    step = turned.abs().amax(-1, keepdim=True) / 127 if form.rotates else turned.abs() / 8
    assert ((back - turned).abs() <= step * 0.502 + 2**-10 * scale[:, None]).all()


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_zeros_stay_zeros(form: Format) -> None:
    values, scale = quantise_rows(torch.zeros(3, 64), form)
    assert not values.float().any()
    assert (scale > 0).all()
    linear = QuantisedLinear(64, 32, form, torch.float32, folded=False)
    linear.take(torch.zeros(32, 64))
    assert torch.equal(rescaled(linear(quantised(randn(3, 64), form))), torch.zeros(3, 32))


@pytest.mark.parametrize("tiny", [FLOOR / 2, 1e-30])
def test_rows_below_the_floor_are_finite(tiny: float) -> None:
    for form in (FP8, INT8):
        values, scale = quantise_rows(torch.full((1, 32), tiny), form)
        assert (values.float() * scale).isfinite().all()


@settings(deadline=None, max_examples=30)
@given(features=st.sampled_from([32, 288, 768, 1536]), seed=st.integers(0, 9))
def test_rotating_keeps_lengths_and_products_and_is_undone_by_itself(features: int, seed: int) -> None:
    x, y = randn(2, features, seed=seed), randn(3, features, seed=seed + 1)
    torch.testing.assert_close(rotate(x) @ rotate(y).t(), x @ y.t(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rotate(rotate(x)), x, atol=1e-5, rtol=1e-5)
    one = torch.zeros(features)
    one[5] = 1.0
    group = rotation_group(features)
    torch.testing.assert_close(rotate(one)[:group].abs(), torch.full((group,), group**-0.5))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("folded", [False, True])
def test_a_product_and_an_outlier_beside_it(form: Format, folded: bool) -> None:
    linear = QuantisedLinear(768, 96, form, torch.float32, folded)
    weight, x = randn(96, 768, seed=1), randn(2, 20, 768)
    linear.take(weight)
    expected = x @ weight.t()
    assert relative(rescaled(linear(quantised(x, form))), expected) < PRODUCT_ERROR[form]
    loud = x.clone()
    loud[0, 3, 7] = 6.6e4  # as SwiGLU's outputs reach; the other tokens do not hear of it
    got = rescaled(linear(quantised(loud, form)))
    quiet = [row for row in range(40) if row != 3]
    assert torch.equal(got.flatten(0, 1)[quiet], rescaled(linear(quantised(x, form))).flatten(0, 1)[quiet])
    assert relative(got[0, 3], loud[0, 3] @ weight.t()) < PRODUCT_ERROR[form]


@pytest.mark.parametrize("form", FORMS)
def test_error_of_each_layer(native: NativeModel, form: Format) -> None:
    """One block after another on the same input, against float32: no layer's weights suit the format badly."""
    model = load_model(NANO, Options(precision=form.name))
    config = native.description.transformer
    x = randn(1, 96, config.dim)
    vectors = native._steps(2)[1][0]
    image_rope, _ = native._tables(8, 8, 32)
    rope = image_rope._replace(cos=image_rope.cos.repeat(2, 1)[:96], sin=image_rope.sin.repeat(2, 1)[:96])
    for number, (exact, rounded) in enumerate(zip(native.transformer.layers, model.transformer.layers)):
        modulation = vectors.block(config.n_refiner_layers + number)
        results = []
        for block, into in ((exact, None), (rounded, form)):
            h = torch_ops.scaled_rms_norm(x, modulation.attention_scale, config.norm_eps, into)
            after, _ = block(x.clone(), h, modulation, None, rope, torch_ops, scaled_dot_product)
            results.append(after - x)
        assert relative(results[1], results[0]) < 4 * PRODUCT_ERROR[form], number


@pytest.fixture(scope="module")
def pictures() -> dict[str, torch.Tensor]:
    """The latents of one caption and noise, by how they were computed."""
    z, embeds = noise(1, 96, 96), None
    result = {}
    for name, options in {
        "float32": Options(),
        "bfloat16": Options(dtype=torch.bfloat16),
        "fp8": Options(precision="fp8"),
        "int8": Options(precision="int8"),
        "fp8 but for half of the layers": Options(precision="fp8", bf16_layers=frozenset(range(0, 12, 2))),
    }.items():
        model = load_model(NANO, options)
        if embeds is None:
            embeds = model.encode(["a red fox in the snow"], 512)
        result[name] = model.denoise([e.to(options.dtype) for e in embeds], z, STEPS)
    return result


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_trained_pictures_stay_near(pictures: dict[str, torch.Tensor], name: str) -> None:
    floor = relative(pictures["bfloat16"], pictures["float32"])
    assert relative(pictures[name], pictures["float32"]) < EXCESS * floor


def test_layers_in_bf16_bring_a_picture_nearer(pictures: dict[str, torch.Tensor]) -> None:
    exact = pictures["float32"]
    assert relative(pictures["fp8 but for half of the layers"], exact) < relative(pictures["fp8"], exact)


def test_all_layers_in_bf16_and_both_refiners_are_what_is_left() -> None:
    config = load_model(NANO, Options()).description.transformer
    options = Options(precision="fp8", bf16_layers=frozenset(range(config.n_layers)))
    with torch.device("meta"):
        transformer = Transformer(config, torch_ops, scaled_dot_product, options.arithmetic)
    eight = {name.split(".")[0] for name, part in transformer.named_modules() if isinstance(part, QuantisedLinear)}
    assert eight == {"noise_refiner"}


def test_attention_of_eight_bits() -> None:
    """Query, key and value fit into their scales, and little is lost."""
    seen: list[float] = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        seen.extend(x.float().abs().amax().item() for x in (query, key, value))
        return scaled_dot_product(*(x.float() * scale[:, None] for x, scale in zip((query, key, value), scales)))

    exact = load_model(NANO, Options())
    eight = load_model(NANO, Options())
    eight.attention = Attention("flash3_fp8", scaled_dot_product, attend_fp8=attend)
    eight.transformer.attend_fp8 = attend
    embeds, z = exact.encode(["a red fox in the snow"], 512), noise(1, 128, 128)
    assert 0 < relative(eight.denoise(embeds, z, 4), exact.denoise(embeds, z, 4)) < 0.1
    assert max(seen) < FP8.largest  # nothing was cut off
    assert min(seen) > 1  # and nothing lost at the lower end


ON_CPU = "needs a CUDA GPU: it would be slower than engine.precision=bf16 on a CPU; leave it out"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["engine=native", "engine.precision=fp8"], f"engine.precision=fp8 {ON_CPU}"),
        (["engine.precision=int8"], f"engine.precision=int8 {ON_CPU}"),  # engine=auto does not draw it another way
        (["engine.precision=int8", "engine.device=cpu"], f"engine.precision=int8 {ON_CPU}"),
        (["engine.precision=int4"], "engine.precision=int4 draws another picture than the model's: use engine."),
        (
            ["engine=native", "engine.precision=fp8", "model.dtype=float32"],
            "engine.precision=fp8 and model.dtype=float32 ",
        ),
        (["engine=diffusers", "engine.precision=fp8"], "engine.precision=fp8 is not for engine=diffusers, which "),
        (["engine=native", "engine.bf16_layers=[1]"], "engine.bf16_layers=[1] says nothing without engine.precision="),
        (["engine=native", "engine.precision=fp9"], "engine.precision=fp9: expected one of [bf16, fp8, int8, int4]"),
        (["engine=diffusers", "memory=streamed"], "memory=streamed is not for engine=diffusers: use engine=native"),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert main(["prompt=a", f"output.root={tmp_path}", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"zimage_runner: {message}")


@pytest.mark.parametrize(
    ("precision", "capability", "message"),
    [
        (
            Precision.fp8,
            (8, 6),
            "engine.precision=fp8 needs a GPU of compute capability 8.9, X has 8.6: use engine.precision=int8",
        ),
        (
            Precision.int8,
            (7, 5),
            "engine.precision=int8 needs a GPU of compute capability 8.0, X has 7.5: use engine.precision=bf16",
        ),
    ],
)
def test_cards_that_lack_it(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, capability: tuple[int, int], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(UserError, match=re.escape(message)):
        check_device(precision, "cuda", "bfloat16")


def test_a_precision_is_part_of_what_decides_a_picture() -> None:
    keys = {likeness_key("abc", numerics) for numerics in (
        {}, {"precision": "fp8"}, {"precision": "int8"}, {"precision": "fp8", "bf16_layers": [1]},
        {"attention": "flash3_fp8"}, {"attention": "flash3"},
    )}  # fmt: skip
    assert len(keys) == 5  # flash3 in bf16 has no key, as the first
