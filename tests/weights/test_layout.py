"""What is refused before anything is loaded, and in which words."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.checkpoints import edit_json, refused
from zimage_runner.model import Model, Source
from zimage_runner.weights.find.layout import inspect
from zimage_runner.weights.find.resolve import EMBEDDED, resolve
from zimage_runner.weights.safetensors_file import BadWeightsFile, read_header

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
SHARD = "transformer/diffusion_pytorch_model-00002-of-00003.safetensors"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12309866400\n"


def garble_header(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[8:20] = b"not json at a"[:12]
    path.write_bytes(raw)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0" * 10)


SINGLE_FILE_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (shutil.rmtree, r"model\.path=.*nano: no such directory$"),
    "a file": (
        lambda p: (shutil.rmtree(p), p.write_bytes(b"")),
        r"is a file, and model=local is for directories: write model=file model\.path=",
    ),
    "no index": (lambda p: (p / "model_index.json").unlink(), r"model_index\.json is missing \(it holds .*vae\)"),
    "index not json": (
        lambda p: (p / "model_index.json").write_text("{'a'}", encoding="utf-8"),
        r"model_index\.json cannot be read",
    ),
    "index cut": (
        lambda p: (p / "model_index.json").write_text("{", encoding="utf-8"),
        r"model_index\.json is cut off",
    ),
    "index a list": (
        lambda p: (p / "model_index.json").write_text("[]", encoding="utf-8"),
        r"model_index\.json does not hold a JSON obj",
    ),
    "other pipeline": (
        lambda p: edit_json(p / "model_index.json", _class_name="FluxPipeline"),
        r"_class_name='FluxPipeline' is not a Z-Image pipeline: need ZImagePipeline",
    ),
    "custom pipeline": (
        lambda p: edit_json(p / "model_index.json", _class_name=["my_pipeline", "Mine"]),
        r"asks to run code from the model directory, which is never done",
    ),
    "custom component": (
        lambda p: edit_json(p / "model_index.json", transformer=["my_model", "ZImageTransformer2DModel"]),
        r"transformer comes from 'my_model', which may be code in the model directory and is never run",
    ),
    "component missing in index": (
        lambda p: edit_json(p / "model_index.json", vae=None),
        r"model_index\.json: vae is missing",
    ),
    "wrong component": (
        lambda p: edit_json(p / "model_index.json", text_encoder=["transformers", "T5EncoderModel"]),
        r"text_encoder is a T5EncoderModel, not a Z-Image component: need Qwen3Model",
    ),
    "remote code": (
        lambda p: edit_json(p / "text_encoder/config.json", auto_map={"AutoModel": "evil.Model"}),
        r"text_encoder/config\.json: auto_map asks to run code",
    ),
    "no config": (lambda p: (p / "vae/config.json").unlink(), r"vae/config\.json is missing"),
    "no scheduler": (lambda p: shutil.rmtree(p / "scheduler"), r"scheduler/scheduler_config\.json is missing"),
    "no tokenizer": (lambda p: (p / "tokenizer/tokenizer.json").unlink(), r"tokenizer/tokenizer\.json is missing"),
    "no weights": (lambda p: (p / WEIGHTS).unlink(), rf"{WEIGHTS} \(or its index and shards\) is missing"),
    "no folder": (lambda p: shutil.rmtree(p / "vae"), r"vae/config\.json is missing; vae/diffusion_pytorch_model"),
    "truncated": (lambda p: os.truncate(p / WEIGHTS, 9_000_000), rf"{WEIGHTS} is truncated: .*promises 21489936 bytes"),
    "truncated header": (lambda p: os.truncate(p / WEIGHTS, 500), rf"{WEIGHTS} is truncated: the header alone needs"),
    "empty": (lambda p: os.truncate(p / WEIGHTS, 0), rf"{WEIGHTS} is truncated: 0 bytes"),
    "longer": (lambda p: append(p / WEIGHTS), rf"{WEIGHTS} is altered: 10 bytes more than its header promises"),
    "garbled": (lambda p: garble_header(p / WEIGHTS), rf"{WEIGHTS} is not a safetensors file"),
    "html instead": (
        lambda p: (p / WEIGHTS).write_text("<html>" * 99, encoding="utf-8"),
        rf"{WEIGHTS} is a web page, not weights",
    ),
    "pointer instead": (
        lambda p: (p / WEIGHTS).write_text(POINTER, encoding="utf-8"),
        rf"{WEIGHTS} is a Git LFS pointer.*git lfs pull",
    ),
    "tokenizer a pointer": (
        lambda p: (p / "tokenizer/tokenizer.json").write_text(POINTER, encoding="utf-8"),
        r"tokenizer/tokenizer\.json is a Git LFS pointer, not the file itself: run 'git lfs pull'",
    ),
    "tokenizer empty": (
        lambda p: os.truncate(p / "tokenizer/tokenizer.json", 0),
        r"tokenizer/tokenizer\.json is empty",
    ),
    "tokenizer cut": (
        lambda p: os.truncate(p / "tokenizer/tokenizer.json", 100_000),
        r"tokenizer/tokenizer\.json is cut off",
    ),
    "config a pointer": (
        lambda p: (p / "vae/config.json").write_text(POINTER, encoding="utf-8"),
        r"vae/config\.json is a Git LFS po",
    ),
    "config a web page": (
        lambda p: (p / "vae/config.json").write_text("<!DOCTYPE html>", encoding="utf-8"),
        r"vae/config\.json is a web",
    ),
    "pickle only": (
        lambda p: (p / WEIGHTS).rename(p / "transformer/diffusion_pytorch_model.bin"),
        r"only pickle weights \(diffusion_pytorch_model\.bin\), which can run code and are never loaded",
    ),
    "a pipe": (lambda p: (os.remove(p / WEIGHTS), os.mkfifo(p / WEIGHTS)), rf"{WEIGHTS} \(or its index .* is missing"),
    "a pipe as config": (
        lambda p: (os.remove(p / "vae/config.json"), os.mkfifo(p / "vae/config.json")),
        r"vae/config\.json is missing",
    ),
    "an endless config": (
        lambda p: os.truncate(p / "vae/config.json", 10**10),
        r"vae/config\.json cannot be read \(larger than 64 MiB\)",
    ),
    "deep json": (
        lambda p: (p / "vae/config.json").write_text("[" * 10**5 + "]" * 10**5, encoding="utf-8"),
        r"vae/config\.json cannot be read",
    ),
    "control characters": (
        lambda p: edit_json(p / "model_index.json", vae=["diffusers", "A\x1b[2J\nB"]),
        r"vae is a A\\x1b\[2J\\nB, not",
    ),
    "control characters in a name": (
        lambda p: ((p / "model_index.json").unlink(), (p / "\x1b[31m\n").touch()),
        r"holds SHA256SUMS, \\x1b\[31m\\n, ",
    ),
    "two forms": (
        lambda p: (p / INDEX).write_text("{}", encoding="utf-8"),
        r"holds both .*model\.safetensors and .*index\.json: remove one",
    ),
}
SHARD_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda p: (p / SHARD).unlink(), rf"model\.path=.*{SHARD} is missing: copy or download .* again"),
    "truncated shard": (lambda p: os.truncate(p / SHARD, 3_000_000), rf"{SHARD} is truncated: its header promises"),
    "swapped shard": (
        lambda p: shutil.copyfile(p / SHARD.replace("2-of", "1-of"), p / SHARD),
        rf"{SHARD} lacks tensor '.*' that the index promises",
    ),
    "escaping index": (
        lambda p: (p / INDEX).write_text(
            json.dumps({"weight_map": {"x": "../../secret.safetensors"}}), encoding="utf-8"
        ),
        r"names '\.\./\.\./secret\.safetensors', which is not a safetensors file beside it",
    ),
    "pickle in index": (
        lambda p: (p / INDEX).write_text(json.dumps({"weight_map": {"x": "pytorch_model.bin"}}), encoding="utf-8"),
        r"names 'pytorch_model\.bin', which is not a safetensors file beside it",
    ),
    "empty index": (lambda p: (p / INDEX).write_text("{}", encoding="utf-8"), rf"{INDEX} has no weight_map"),
}


@pytest.mark.parametrize("fault", SINGLE_FILE_FAULTS)
def test_damaged_directory_is_refused(nano: Path, fault: str) -> None:
    damage, text = SINGLE_FILE_FAULTS[fault]
    damage(nano)
    refused(nano, text)


@pytest.mark.parametrize("fault", SHARD_FAULTS)
def test_damaged_shards_are_refused(sharded: Path, fault: str) -> None:
    damage, text = SHARD_FAULTS[fault]
    damage(sharded)
    refused(sharded, text)


def test_sharded_directory_is_read(sharded: Path) -> None:
    layout = inspect(sharded)
    assert [file.path.name[-22:] for file in layout.weights["transformer"]] == [
        f"0000{n}-of-00003.safetensors"[-22:] for n in (1, 2, 3)
    ]
    names = {name for file in layout.weights["transformer"] for name in file.tensors}
    assert names == set(read_header(EMBEDDED / WEIGHTS).tensors)


def test_many_problems_fit_in_one_line(nano: Path) -> None:
    for folder in ("vae", "scheduler", "transformer", "tokenizer"):
        shutil.rmtree(nano / folder)
    refused(nano, r"transformer/config\.json is missing; .*; and 3 more: copy")


def test_code_in_the_directory_is_never_run(nano: Path, tmp_path: Path) -> None:
    """Python files and pickles beside good weights stay unread, by the reference engine's loading too."""
    marker = tmp_path / "executed"
    code = f"open({str(marker)!r}, 'w').close()"
    for place in ("pipeline.py", "__init__.py", "transformer/modeling.py", "text_encoder/modeling_qwen3.py"):
        (nano / place).write_text(code, encoding="utf-8")
    (nano / "text_encoder/pytorch_model.bin").write_bytes(pickle.dumps(Evil(code)))
    checkpoint = resolve(Model(name="l", source=Source.local, path=str(nano)))
    from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline

    ZImagePipeline.from_pretrained(str(checkpoint.path), local_files_only=True)
    assert not marker.exists()
    pickle.loads((nano / "text_encoder/pytorch_model.bin").read_bytes())
    assert marker.exists()  # the trap itself works


class Evil:
    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> tuple:
        return exec, (self.code,)


@given(position=st.integers(0, 3000), value=st.integers(0, 255), length=st.integers(0, 3_000_000))
def test_any_damage_to_a_header_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int, length: int
) -> None:
    """Whatever byte of the header changes or wherever the file ends: a clear error, or a header that adds up."""
    raw = bytearray((EMBEDDED / "vae/diffusion_pytorch_model.safetensors").read_bytes())
    raw[position] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(raw[: len(raw) - length])
    try:
        header = read_header(path)
    except BadWeightsFile:
        return
    assert length == 0
    assert sum(info.nbytes for info in header.tensors.values()) == header.size - header.data_start


def test_huge_header_length_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "bomb.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(BadWeightsFile, match="absurd"):
        read_header(path)
