"""GGUF: every type that Z-Image is published in, for the transformer and the text encoder."""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants

from tests.support import weight_formats as support
from tests.support.quantised_layouts import finish, write_gguf
from zimage_runner.errors import UserError
from zimage_runner.weights.formats.checkpoint_file import ComponentTensors, open_checkpoint_file
from zimage_runner.weights.formats.decode import StoredTensor
from zimage_runner.weights.formats.files import open_stored
from zimage_runner.weights.formats.gguf_header import BLOCKS
from zimage_runner.weights.safetensors_file import TensorInfo

KINDS = [Kind[name] for name, *_ in BLOCKS.values()]
WRITTEN = [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]
"""What the package can write; the others are written block by block here."""


@functools.cache
def original() -> support.Weights:
    return support.transformer(support.transformer_shapes(384, 3))  # rows of whole blocks of 32


def write(path: Path, weights: Mapping[str, torch.Tensor], kind: Kind, architecture: str = "lumina2") -> Path:
    return write_gguf(path, weights, kind, is_in_kind, architecture)


def is_in_kind(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and ("layers.1." in name or "blk." in name) and "adaLN" not in name


@pytest.mark.parametrize("kind", [Kind.BF16, Kind.F16, Kind.F32, *WRITTEN], ids=lambda kind: kind.name)
def test_transformer_files(kind: Kind, tmp_path: Path) -> None:
    component = open_checkpoint_file(write(tmp_path / "z.gguf", support.comfyui(original()), kind)).components[
        "transformer"
    ]
    assert component.layout == "ComfyUI"
    found = ComponentTensors(component, dtype=torch.float32)
    assert set(found) == set(original())
    for name, tensor in original().items():
        values = tensor.float()
        if kind in WRITTEN and is_in_kind(name, tensor):
            values = torch.from_numpy(quants.dequantize(quants.quantize(values.numpy(), kind), kind))
        elif kind is Kind.F16 and is_in_kind(name, tensor):
            values = values.half().float()
        assert torch.equal(found[name], values), name
    assert any(tensor.info is None for tensor in component.tensors.values()) == (kind in WRITTEN)


def random_blocks(kind: Kind, rows: int, columns: int) -> np.ndarray:
    """Blocks of random bits whose half-float scales are small numbers."""
    name, elements, nbytes = next(entry for entry in BLOCKS.values() if entry[0] == kind.name)
    rng = np.random.default_rng(len(name))
    blocks = rng.integers(0, 256, (rows, columns // elements, nbytes), dtype=np.uint8)
    scales = rng.uniform(0.001, 0.01, blocks.shape[:2]).astype(np.float16).view(np.uint8).reshape(*blocks.shape[:2], 2)
    for place in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2)}.get(name, (0, 2)):
        if name not in ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS") or place == 0:
            blocks[:, :, place : place + 2] = scales
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in (Kind.F32, Kind.F16, Kind.BF16)], ids=lambda k: k.name)
def test_rows_of_every_type_are_the_rows_of_the_whole(kind: Kind, tmp_path: Path) -> None:
    blocks = random_blocks(kind, 48, 512)
    path = tmp_path / "blocks"
    path.write_bytes(b"before" + blocks.tobytes())
    info = TensorInfo(kind.name, (48, 512), 6, blocks.nbytes)
    tensor = StoredTensor(path, "w", info, (48, 512), "gguf")
    whole = quants.dequantize(blocks, kind)
    assert np.isfinite(whole).all()
    assert len(np.unique(whole)) > 10
    assert np.array_equal(tensor.read(16, 32).numpy(), whole[16:32])
    assert np.array_equal(tensor.read().numpy(), whole)


def test_q6_k_means_what_ggml_defines(tmp_path: Path) -> None:
    """d * scale * (q - 32): 128 bytes of low halves, 64 of high pairs, 16 scales, d (ggml-quants.c, block_q6_K)."""
    rng = np.random.default_rng(6)
    codes, scales = rng.integers(0, 64, 256), rng.integers(-128, 128, 16)
    low, high = np.zeros(128, np.uint8), np.zeros(64, np.uint8)
    for i in range(256):
        half, quarter, place = i // 128, i % 128 // 32, i % 32
        low[64 * half + place + 32 * (quarter % 2)] |= (codes[i] & 15) << (4 * (quarter // 2))
        high[32 * half + place] |= (codes[i] >> 4) << (2 * quarter)
    d = np.float16(0.01)
    block = low.tobytes() + high.tobytes() + scales.astype(np.int8).tobytes() + d.tobytes()
    path = tmp_path / "block"
    path.write_bytes(block)
    tensor = StoredTensor(path, "w", TensorInfo("Q6_K", (1, 256), 0, 210), (1, 256), "gguf")
    expected = np.float32(d) * scales[np.arange(256) // 16] * (codes - 32)
    np.testing.assert_allclose(tensor.read().numpy()[0], expected, rtol=1e-6)


def test_k_quants_in_a_file_split_into_query_key_and_value(tmp_path: Path) -> None:
    weights = support.transformer()
    blocks = random_blocks(Kind.Q4_K, 3 * 768, 768)
    writer = gguf.GGUFWriter(tmp_path / "z.gguf", "lumina2")
    for name, tensor in support.comfyui(weights).items():
        if name == "layers.0.attention.qkv.weight":
            writer.add_tensor(name, blocks, raw_dtype=Kind.Q4_K)
        else:
            writer.add_tensor(name, tensor.float().numpy())
    finish(writer)
    component = open_checkpoint_file(tmp_path / "z.gguf").components["transformer"]
    whole = torch.from_numpy(quants.dequantize(blocks, Kind.Q4_K))
    for i, part in enumerate("qkv"):
        found = component.tensors[f"layers.0.attention.to_{part}.weight"].read()
        assert torch.equal(found, whole[768 * i : 768 * (i + 1)])
    assert "Q4_K (1 tensors)" in component.precision


def test_rearranged_tensors_come_back_in_their_shape(tmp_path: Path) -> None:
    """A row of 64 is no whole K-quant block: converters store such tensors flattened and note the shape."""
    writer = gguf.GGUFWriter(tmp_path / "z.gguf", "lumina2")
    embedder = original()["all_x_embedder.2-1.weight"].float().numpy()
    stored = quants.quantize(embedder.reshape(-1, 256), Kind.Q8_0)
    for name, tensor in support.comfyui(original(), "model.diffusion_model.").items():
        if name.endswith(".x_embedder.weight"):
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
            writer.add_tensor(name, stored, raw_dtype=Kind.Q8_0)
        else:
            values = tensor.float().numpy()
            writer.add_tensor(name, values[0] if name.endswith("pad_token") else values)
    finish(writer)
    component = open_checkpoint_file(tmp_path / "z.gguf").components["transformer"]
    expected = torch.from_numpy(quants.dequantize(stored, Kind.Q8_0)).reshape(384, 64)
    assert torch.equal(component.tensors["all_x_embedder.2-1.weight"].read(), expected)
    assert torch.equal(component.tensors["x_pad_token"].read(torch.bfloat16), original()["x_pad_token"])


def test_files_of_stable_diffusion_cpp_have_no_architecture(tmp_path: Path) -> None:
    path = write(tmp_path / "z.gguf", support.comfyui(original(), "model.diffusion_model."), Kind.Q8_0, "lumina2")
    data = path.read_bytes()
    # The field that GGUFWriter always writes is renamed, which leaves the file without it.
    path.write_bytes(data.replace(b"general.architecture", b"general.xrchitecture", 1))
    file = open_checkpoint_file(path)
    assert "format: GGUF (no architecture)" in file.description()[1]
    assert file.components["transformer"].prefix == "model.diffusion_model."


LLAMA = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def llama_cpp(weights: support.Weights) -> support.Weights:
    out = {}
    for name, tensor in weights.items():
        name = name.replace("model.embed_tokens", "token_embd").replace("model.norm", "output_norm")
        for ours, theirs in LLAMA.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        out[name.replace("model.layers.", "blk.")] = tensor
    return out


def test_text_encoder_files(tmp_path: Path) -> None:
    weights = support.text_encoder()
    file = open_checkpoint_file(write(tmp_path / "t.gguf", llama_cpp(weights), Kind.Q8_0, "qwen3"))
    component = file.components["text_encoder"]
    assert component.layout == "llama.cpp"
    assert component.config["num_key_value_heads"] == 2
    for name, tensor in weights.items():
        values = tensor.float()
        if ".layers." in name and tensor.ndim == 2:
            values = torch.from_numpy(quants.dequantize(quants.quantize(values.numpy(), Kind.Q8_0), Kind.Q8_0))
        assert torch.equal(component.tensors[name.removeprefix("model.")].read(torch.float32), values), name


@pytest.mark.parametrize(("component", "architecture"), [("transformer", "flux"), ("text_encoder", "qwen3vl")])
def test_other_architectures_are_refused(component: str, architecture: str, tmp_path: Path) -> None:
    weights = support.comfyui(original()) if component == "transformer" else llama_cpp(support.text_encoder())
    path = write(tmp_path / "z.gguf", weights, Kind.Q8_0, architecture)
    with pytest.raises(
        UserError, match=f"general.architecture is '{architecture}', which is not Z-Image's {component}"
    ):
        open_checkpoint_file(path)


def test_unsupported_types_are_refused_by_number(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "z.gguf", "lumina2")
    writer.add_tensor("layers.0.attention.out.weight", np.zeros((2, 66), np.uint8), raw_dtype=Kind.IQ2_XXS)
    finish(writer)
    with pytest.raises(UserError, match=r"holds tensors of ggml type 16 \(layers\.0\.attention\.out\.weight\)"):
        open_stored(tmp_path / "z.gguf")


def header(tensors: int = 0, fields: int = 0, version: int = 3, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + rest


TEXT = struct.pack("<Q", 1) + b"a"
HOSTILE = {
    "only the magic": (b"GGUF", "not a whole GGUF file"),
    "version": (header(version=1), "has GGUF version 1: only 2 and 3"),
    "tensors": (header(tensors=2**60), "are absurd"),
    "fields": (header(fields=2**60), "are absurd"),
    "no fields there": (header(fields=90_000), "not a whole GGUF file"),
    "long name": (header(fields=1, rest=struct.pack("<Q", 2**63)), "its header alone needs more than the"),
    "long list": (
        header(fields=1, rest=TEXT + struct.pack("<IIQ", 9, 4, 2**62)), "its header alone needs more than the"
    ),
    "long list of texts": (header(fields=1, rest=TEXT + struct.pack("<IIQ", 9, 8, 2**40)), "its header alone needs"),
    "nested lists": (header(fields=1, rest=TEXT + struct.pack("<IIQ", 9, 9, 1)), "a list of type 9"),
    "type": (header(fields=1, rest=TEXT + struct.pack("<I", 77)), "a field of type 77"),
    "dimensions": (header(tensors=1, rest=TEXT + struct.pack("<I", 2**31)), "has 2147483648 dimensions"),
    "huge tensor": (
        header(tensors=1, rest=TEXT + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0)), "truncated: its header promises"
    ),
    "no utf-8": (header(fields=1, rest=struct.pack("<Q", 2) + b"\xff\xfe" + bytes(8)), "not a whole GGUF file"),
    "alignment": (
        header(fields=1, rest=struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, 0)),
        "alignment 0 is absurd",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    data, text = HOSTILE[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        open_stored(path)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    small = {name: tensor for name, tensor in support.comfyui(original()).items() if tensor.numel() < 3000}
    data = write(tmp_path / "z.gguf", small, Kind.Q8_0).read_bytes()
    bad = tmp_path / "cut.gguf"
    for length in range(4, len(data), len(data) // 60):
        bad.write_bytes(data[:length])
        with pytest.raises(UserError):
            open_stored(bad)
