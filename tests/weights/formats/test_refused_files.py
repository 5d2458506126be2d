"""What is no file of Z-Image, or not a whole one, is refused in one line that says what it is."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import weight_formats as support
from zimage_runner.errors import UserError
from zimage_runner.weights.formats.checkpoint_file import open_checkpoint_file


@functools.cache
def comfyui() -> support.Weights:
    return support.comfyui(support.transformer(support.NARROW))


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_checkpoint_file(path)
    text = str(caught.value)
    assert "\n" not in text
    assert path.name in text
    return text


def torch_zip() -> bytes:
    file = io.BytesIO()
    torch.save({"w": torch.ones(2)}, file)
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model.safetensors", b"x" * 100)
    return file.getvalue()


def header(entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def entry(dtype: str, shape: list, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


FILES = {
    "empty": (b"", "is empty (0 bytes)"),
    "five bytes": (b"abcde", "truncated: 5 bytes"),
    "pickle": (pickle.dumps({"w": [1.0]}, 2), "is a pickle checkpoint, which can run code"),
    "torch.save": (torch_zip(), "is a pickle checkpoint, which can run code"),
    "zip": (zipped(), "is a zip archive: unpack it"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(50), "is a 7z archive"),
    "gzip": (b"\x1f\x8b\x08" + bytes(50), "is a gzip archive"),
    "lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12309866400\n", "is a Git LFS pointer"
    ),
    "web page": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page, not weights"),
    "json": (b'{"error": "Unauthorized"}', "is JSON text, not weights"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(50), "is a picture"),
    "noise": (bytes(range(200, 256)) * 9, "its header length is absurd"),
    "header alone": (struct.pack("<Q", 10**7) + b"{}", "truncated: the header alone needs"),
    "no json": (struct.pack("<Q", 8) + b"{nonsens", "its header cannot be read"),
    "deep json": (struct.pack("<Q", 90_000) + b'{"a":' * 18_000, "its header cannot be read"),
    "cut": (header({"w": entry("F32", [4], 0, 16)}) + bytes(8), "truncated: its header promises"),
    "other numbers": (
        header({"w": entry("C64", [2], 0, 16)}) + bytes(16),
        "is not readable: its header has the dtype 'C64', which weights of Z-Image do not have",
    ),
    "negative": (header({"w": entry("F32", [-4], 0, 16)}) + bytes(16), "a negative or fractional size"),
    "overlap": (
        header({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}) + bytes(12), "overlaps its neighbour"
    ),
    "a name of two lines": (
        header({"layers.0.atte\ntion.qkv.weight": entry("F32", [4, 32], 0, 512)}) + bytes(512),
        "or damaged (it holds layers.0.atte tion.qkv.weight)",
    ),
    "no tensors": (header({}), "holds no part of Z-Image (no tensors)"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_what_is_no_weights_file_is_named(case: str, tmp_path: Path) -> None:
    data, text = FILES[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    assert text in refused(path)


def test_what_is_no_file_is_never_opened(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    assert "is not a regular file" in refused(pipe)
    assert "is a directory" in refused(tmp_path)
    assert "cannot be read: No such file" in refused(tmp_path / "none.safetensors")


def test_a_label_names_the_field(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"^model\.path=x\.safetensors is empty"):
        open_checkpoint_file(path, label="model.path=x.safetensors")


def without(*names: str) -> support.Weights:
    return {name: tensor for name, tensor in comfyui().items() if name not in names}


ONE = torch.ones(1)
RELATIVES = {
    "TwinFlow": (lambda: comfyui() | {"t_embedder_2.mlp.0.weight": ONE}, "is TwinFlow"),
    "pixel space": (lambda: comfyui() | {"dec_net.cond_embed.weight": ONE}, "is a pixel-space relative of Z-Image"),
    "Omni": (lambda: comfyui() | {"siglip_embedder.0.weight": ONE}, "is Z-Image-Omni or -Edit"),
    "Ming marker": (lambda: comfyui() | {"__ming_image__": ONE}, "is Ming-Image"),
    "Ming": (lambda: without("cap_pad_token"), "cap_pad_token is missing: Ming-Image or a damaged file"),
    "Lumina 2": (
        lambda: {"x_embedder.weight": torch.ones(2304, 64), "cap_embedder.0.weight": torch.ones(2304),
                 "layers.0.attention.qkv.weight": ONE},
        "is Lumina 2",
    ),
    "FLUX": (lambda: {"double_blocks.0.img_attn.qkv.weight": ONE}, "is FLUX or HunyuanVideo"),
    "SDXL": (lambda: {"model.diffusion_model.input_blocks.0.0.weight": ONE}, "is Stable Diffusion 1, 2 or XL"),
    "ControlNet": (lambda: {"control_layers.0.attention.to_q.weight": ONE}, "is a ControlNet of Z-Image"),
    "LoRA": (
        lambda: {"diffusion_model.layers.0.attention.to_q.lora_A.weight": ONE}, "is a LoRA or another adapter"
    ),
    "prefix": (
        lambda: {f"net.dit.{name}": tensor for name, tensor in comfyui().items()},
        "names begin with 'net.dit.', a prefix that no layout of Z-Image has: if they are Z-Image's, save them without",
    ),
    "prefix of a text encoder": (
        lambda: {f"qwen.{name}": tensor for name, tensor in support.text_encoder().items()},
        "names begin with 'qwen.model.', a prefix",
    ),
    "prefix of a VAE": (lambda: support.ldm(support.vae(), 3, "ae."), "names begin with 'ae.', a prefix"),
    "something": (lambda: {"a.weight": ONE, "b.weight": ONE.clone()}, "Z-Image's transformer, or damaged (it holds a"),
    "missing": (
        lambda: without("layers.1.attention.qkv.weight", "layers.1.ffn_norm1.weight"),
        "the transformer lacks 4 tensors: layers.1.attention.to_q.weight, layers.1.attention.to_k.weight",
    ),
    "layer": (
        lambda: {name: tensor for name, tensor in comfyui().items() if not name.startswith("layers.0.")},
        "the transformer lacks 15 tensors: layers.0.attention.to_q.weight",
    ),
    "leftover": (
        lambda: comfyui() | {"layers.0.attention.rotary.weight": ONE},
        "1 tensor belongs to no part of Z-Image: layers.0.attention.rotary.weight",
    ),
    "shape": (
        lambda: comfyui() | {"layers.0.feed_forward.w2.weight": torch.ones(256, 600)},
        "layers.0.feed_forward.w2.weight gives layers.0.feed_forward.w2.weight the shape [256, 600], the other tensors "
        "ask for [256, 682]",
    ),
    "thirds": (lambda: comfyui() | {"layers.0.attention.qkv.weight": torch.ones(767, 256)}, "767 rows: 3 equal parts"),
    "heads": (
        lambda: comfyui() | {f"{b}.attention.q_norm.weight": torch.ones(64) for b in support.BLOCKS},
        "attention heads of 64 channels in 256: Z-Image's have 128 ([32, 48, 48])",
    ),
    "twice": (
        lambda: comfyui() | {"model.diffusion_model.x_pad_token": torch.ones(1, 256)},
        "x_pad_token is there twice, as",
    ),
    "twice in two layouts": (
        lambda: comfyui() | {"layers.0.attention.to_q.weight": torch.ones(256, 256)},
        "layers.0.attention.to_q.weight is there twice, as",
    ),
    "absurd layer": (lambda: comfyui() | {"layers.4000000000.ffn_norm1.weight": ONE}, "layers.400000000 is absurd"),
    "half a VAE": (
        lambda: {n: t for n, t in support.ldm(support.vae(), 3).items() if not n.startswith("encoder.mid")},
        "the vae lacks 26 tensors: encoder.mid_block",
    ),
    "another VAE": (lambda: {"decoder.conv_in.weight": torch.ones(8, 4, 3, 3)}, "decoder.up_blocks.0 is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", RELATIVES)
def test_what_is_not_z_image_is_refused_by_name(case: str, tmp_path: Path) -> None:
    weights, text = RELATIVES[case]
    assert text in refused(support.write(tmp_path / "z.safetensors", weights()))


SHAPES = st.lists(st.integers(-1, 2**40), max_size=3)
ENTRIES = st.dictionaries(
    st.sampled_from([*support.SMALL, "x_embedder.weight", "layers.0.attention.qkv.weight", "decoder.up.0.block.0.x.y"]),
    st.one_of(
        st.none(),
        st.fixed_dictionaries(
            {"dtype": st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "X9", 3]), "shape": SHAPES,
             "data_offsets": st.lists(st.integers(-1, 2**50), max_size=3)}
        ),
    ),
    max_size=4,
)  # fmt: skip


@settings(max_examples=60)
@given(entries=ENTRIES, metadata=st.one_of(st.none(), st.text(max_size=5), st.lists(st.integers(), max_size=2)))
def test_any_header_is_read_or_refused_in_one_line(tmp_path_factory, entries: dict, metadata: object) -> None:
    path = tmp_path_factory.getbasetemp() / "hostile.safetensors"
    path.write_bytes(header({**entries, "__metadata__": metadata}) + bytes(64))
    refused(path)


@settings(max_examples=60)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_in_one_line(tmp_path_factory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.safetensors"
    path.write_bytes(data)
    refused(path)


@settings(max_examples=60)
@given(st.binary(max_size=120))
def test_any_gguf_header_is_refused_in_one_line(tmp_path_factory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + data)
    refused(path)
