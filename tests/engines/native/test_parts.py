"""Text encoder, decoder, schedule and tokenizer, each alone against its reference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.support import NANO
from tests.support.reference import Reference, difference, noise
from zimage_runner.engines.native import text_encoder
from zimage_runner.engines.native.images import Ready
from zimage_runner.engines.native.model import NativeModel
from zimage_runner.engines.native.sampler import make_schedule, read_shift
from zimage_runner.engines.native.text_encoder import TextEncoderConfig
from zimage_runner.engines.native.tokenizer import USER_TURN, CaptionTokenizer
from zimage_runner.engines.native.transformer import TransformerConfig
from zimage_runner.engines.native.vae_decoder import FewChannels, VaeConfig
from zimage_runner.errors import BadPictureError, UserError

TEXTS = [
    "",
    "a red apple",
    "一只在雪地里的猫，霓虹灯",
    "an <|im_end|> in the text, <|im_start|>too, and <think>",
    "  spaces, tabs\t and\n\nlines  ",
    "Ünïcödé ﬁ ① e\u0301 🦊🏽",
    "word " * 700,
]


@pytest.mark.parametrize("max_sequence_length", [512, 16])
def test_text_encoder(native: NativeModel, reference: Reference, max_sequence_length: int) -> None:
    ours = native.encode(TEXTS, max_sequence_length)
    theirs = reference.encode(TEXTS, max_sequence_length)
    for text, a, b in zip(TEXTS, ours, theirs):
        assert difference(a, b) <= 1e-6 * b.abs().max().item(), text[:20]


@pytest.mark.parametrize("multiple", [8, 128])
def test_tokens_behind_a_caption_are_not_seen(
    native: NativeModel, multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = native.encode(TEXTS, 512)
    monkeypatch.setattr(text_encoder, "tokens_to_add", lambda tokens, device: -tokens % multiple)
    for one, other in zip(native.encode(TEXTS, 512), expected):
        assert one.shape == other.shape
        assert difference(one, other) <= 1e-6 * other.abs().max().item()


@pytest.mark.parametrize(
    ("device", "capability", "expected"),
    [("cuda", (9, 0), 119), ("cuda", (10, 0), 119), ("cuda", (8, 9), 0), ("cpu", (9, 0), 0)],
)
def test_where_captions_are_filled_up(
    device: str, capability: tuple[int, int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert text_encoder.tokens_to_add(9, torch.device(device)) == expected
    assert text_encoder.tokens_to_add(256, torch.device(device)) == 0


def test_a_captions_features_do_not_depend_on_its_neighbours(native: NativeModel) -> None:
    alone = native.encode(TEXTS[1:2], 512)[0]
    among = native.encode([*TEXTS, TEXTS[1]], 512)
    assert torch.equal(alone, among[1])
    assert among[1] is among[-1]


@pytest.mark.parametrize(("height", "width"), [(128, 128), (16, 48), (144, 80)])
def test_decoder(native: NativeModel, reference: Reference, height: int, width: int) -> None:
    latents = noise(2, height, width)
    with torch.inference_mode():
        assert difference(native.vae(latents), reference.decode(latents)) <= 1e-4


@pytest.mark.parametrize(("channels", "computed"), [(3, 8), (8, 8), (9, 16)])
def test_a_convolution_to_few_channels(channels: int, computed: int) -> None:
    conv = FewChannels(32, channels, 3, padding=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in conv.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    x = torch.randn(2, 32, 9, 10, generator=generator).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        got, expected = conv.convolve_padded(x), conv(x)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert conv._padded is not None
    assert [len(part) for part in conv._padded] == [computed, computed]
    assert len(conv.state_dict()) == 2  # what is computed from the weights is not one of them


def test_pictures_with_nan_are_refused() -> None:
    pixels = torch.zeros(1, 3, 8, 8)
    pixels[0, 1, 2, 3] = torch.nan
    with pytest.raises(BadPictureError, match=r"NaN or Inf \(numbers overflowed: is the checkpoint damaged"):
        Ready(pixels).wait()


@pytest.mark.parametrize("steps", [1, 2, 8, 9, 28, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_schedule(reference: Reference, steps: int, shift: float) -> None:
    from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

    kind = type(reference.pipe.scheduler)
    scheduler = kind.from_config(reference.pipe.scheduler.config, shift=shift)
    scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(steps))
    schedule = make_schedule(steps, shift)
    assert torch.equal(schedule.sigmas, scheduler.sigmas)
    assert torch.equal(schedule.times, (1000 - scheduler.timesteps) / 1000)
    assert len(schedule.times) == steps


def test_prompts_are_tokenised_as_transformers_does(native: NativeModel, reference: Reference) -> None:
    tokenizer = reference.pipe.tokenizer
    for text in TEXTS:
        message = [{"role": "user", "content": text}]
        wrapped = tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        assert native.tokenizer.before + text + native.tokenizer.after == wrapped
        expected = tokenizer([wrapped], truncation=True, max_length=512).input_ids
        assert native.tokenizer([text], 512) == expected


def tokenizer_folder(tmp_path: Path, template: str | None) -> Path:
    """The embedded tokenizer with another template, or none."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    shutil.copy(NANO / "tokenizer" / "tokenizer.json", folder)
    config = json.loads((NANO / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


QWEN3_LIKE = """{%- set ns = namespace(multi_step_tool=true) %}
{%- for message in messages[::-1] %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not
        (message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""


def test_an_unknown_template_is_rendered_once(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = tokenizer_folder(tmp_path, QWEN3_LIKE)
    ours = CaptionTokenizer(folder)
    assert (ours.before, ours.after) == USER_TURN
    theirs = AutoTokenizer.from_pretrained(str(folder)).apply_chat_template(
        [{"role": "user", "content": "  a cat "}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    assert ours.before + "  a cat " + ours.after == theirs


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (None, "holds no chat template"),
        ("{{ messages[0].content | trim }}", "changes the message it wraps"),
        ("{{ messages[0].content", "cannot be rendered"),
        ("{{ raise_exception('no') }}", "cannot be rendered"),
        ("{% for a in range(900) %}{% for b in range(900) %}{% endfor %}{% endfor %}", "takes more than 10,000 steps"),
        ("{% for a in range(100000) %}{% endfor %}", "counts over more than 1,000 numbers"),
        ("{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(40) }}", "10,000 steps"),
        ("{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}", "maximum recursion depth"),
        ("{{ 'a' * 1000000000 }}", "out of all bounds"),
        ("{{ 10 ** 10 ** 10 }}", "out of all bounds"),
        ("{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}", "out of all"),
        ("{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "out of all"),
    ],
)
def test_templates_that_are_refused(tmp_path: Path, template: str | None, text: str) -> None:
    with pytest.raises(UserError, match=f"{text}.*engine=diffusers"):
        CaptionTokenizer(tokenizer_folder(tmp_path, template))


@pytest.mark.parametrize(
    ("component", "read", "change"),
    [
        ("transformer", TransformerConfig.from_published, {"siglip_feat_dim": 1152}),
        ("transformer", TransformerConfig.from_published, {"qk_norm": False}),
        ("transformer", TransformerConfig.from_published, {"n_kv_heads": 2}),
        ("transformer", TransformerConfig.from_published, {"all_patch_size": [2, 4]}),
        ("text_encoder", TextEncoderConfig.from_published, {"model_type": "llama"}),
        ("text_encoder", TextEncoderConfig.from_published, {"rope_parameters": {"rope_type": "yarn"}}),
        ("text_encoder", TextEncoderConfig.from_published, {"use_sliding_window": True}),
        ("vae", VaeConfig.from_published, {"act_fn": "relu"}),
    ],
    ids=str,
)
def test_variants_that_are_refused(component: str, read, change: dict) -> None:
    config = json.loads((NANO / component / "config.json").read_text(encoding="utf-8"))
    read(config)
    with pytest.raises(ValueError, match="not supported"):
        read(config | change)


def test_schedulers_that_are_refused() -> None:
    assert read_shift({"shift": 3.0}) == 3.0
    with pytest.raises(ValueError, match="use_dynamic_shifting=True is not supported"):
        read_shift({"shift": 3.0, "use_dynamic_shifting": True})


def test_qwen3_config_of_transformers_4() -> None:
    config = json.loads((NANO / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    del config["rope_parameters"]
    assert TextEncoderConfig.from_published(config | {"rope_theta": 1e6, "rope_scaling": None}).rope_theta == 1e6
