"""Files named on the command line: what is drawn and recorded, what is refused in one line before anything loads."""

from __future__ import annotations

import functools
import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.support import NANO
from tests.support import weight_formats as support
from zimage_runner.engines.native.config import NativeEngine
from zimage_runner.prepare import main

Cli = Callable[..., tuple[int, str, str]]
Weights = support.Weights
DRAW = ("prompt=a red apple", "seeds=7", "sampling.num_inference_steps=2", "sampling.height=32", "sampling.width=48",
        "warmup=none", "engine=native", "engine.device=cpu", "output_file=p.png")  # fmt: skip
FILE = ("model=file", "model.path=z.safetensors", "model.source=embedded", "model.variant=turbo")


@functools.cache
def comfyui() -> Weights:
    return support.comfyui(
        load_file(NANO / "transformer/diffusion_pytorch_model.safetensors"), "model.diffusion_model."
    )


def changed(name: str, value: torch.Tensor | None) -> Weights:
    key = f"model.diffusion_model.{name}"
    kept = {other: tensor for other, tensor in comfyui().items() if other != key}
    return kept if value is None else {**kept, key: value}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_a_file_draws_the_repositorys_picture_and_says_where_the_rest_is_from(cli: Cli, tmp_path: Path) -> None:
    support.write(tmp_path / "z.safetensors", comfyui())
    code, _, err = cli(*FILE, *DRAW)
    assert code == 0, err
    assert err.startswith(
        f"zimage_runner: model.path={tmp_path}/z.safetensors has the transformer; text_encoder, vae and tokenizer come "
        f"from {NANO}\n"
    )
    drawn = pixels(tmp_path / "p.png")
    (record,) = tmp_path.glob("outputs/run/*/items/*/*/record.json")
    model = json.loads(record.read_text(encoding="utf-8"))["model"]
    assert (model["name"], model["files"]) == ("file", {"path": "z.safetensors"})
    code, _, err = cli("model=local", f"model.path={NANO}", *DRAW)
    assert code == 0, err
    assert np.array_equal(pixels(tmp_path / "p.png"), drawn)
    assert cli(*FILE, *DRAW, "model.variant=base")[0] == 0  # shift 6: another picture
    assert not np.array_equal(pixels(tmp_path / "p.png"), drawn)


def test_what_the_variant_recommends(cli: Cli, tmp_path: Path) -> None:
    support.write(tmp_path / "z.safetensors", comfyui())
    for variant, text in (("turbo", "1024x1024, 8 steps"), ("base", "1024x1024, 50 steps, guidance 4")):
        code, out, err = cli(*FILE, f"model.variant={variant}", "prompt=x", "dry_run=true")
        assert code == 0, err
        assert text in out, out


def test_a_run_is_not_resumed_with_another_file(cli: Cli, tmp_path: Path) -> None:
    support.write(tmp_path / "z.safetensors", comfyui())
    words = [word for word in DRAW if not word.startswith("output_file")]
    assert cli(*FILE, *words, "seeds=7-8", "hydra.run.dir=run")[0] == 0
    next(tmp_path.glob("run/items/*/seed_8/image.png")).unlink()
    support.write(tmp_path / "z.safetensors", changed("x_pad_token", torch.ones(288)))
    code, _, err = cli("resume=run")
    assert (code, "z.safetensors was altered: sha256" in err) == (2, True), err
    assert main(["accept", *FILE]) == 0
    code, _, err = cli("resume=run")
    assert code == 2, err
    assert "so the run would hold mixed pictures: the weights differ" in err, err
    support.write(tmp_path / "z.safetensors", comfyui())
    assert main(["accept", *FILE]) == 0
    assert cli("resume=run")[0] == 0


def truncated(path: Path) -> None:
    support.write(path, comfyui())
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.safetensors", b"x" * 100)


NAN = torch.full((288,), torch.nan, dtype=torch.bfloat16)
MATRIX = "layers.1.attention.out.weight"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncated, r"^model\.path=\S+ is truncated: its header promises \d+ bytes, the file has \d+$"),
    "zip": (zipped, r"^model\.path=\S+ is a zip archive: unpack it"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"w": 1}, 2)), r"is a pickle checkpoint, which can run code"),
    "torch.save": (lambda p: torch.save({"w": torch.ones(2)}, p), r"is a pickle checkpoint, which can run code"),
    "web page": (lambda p: p.write_bytes(b"<!DOCTYPE html><html>"), r"is a web page, not weights"),
    "LFS pointer": (
        lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\n"),
        r"is a Git LFS pointer",
    ),
    "missing": (lambda p: None, r"^model\.path=\S+: no such file$"),
    "a tensor gone": (
        lambda p: support.write(p, changed(MATRIX, None)),
        r"the transformer lacks 1 tensor: layers\.1\.attention\.to_out\.0\.weight",
    ),
    "wrong shape": (
        lambda p: support.write(p, changed(MATRIX, torch.ones(288, 96))),
        r"layers\.1\.attention\.out\.weight gives layers\.1\.attention\.to_out\.0\.weight the shape \[288, 96\]",
    ),
    "unknown tensor": (
        lambda p: support.write(p, changed("layers.1.extra.weight", NAN)), r"1 tensor belongs? to no part of Z-Image"
    ),
    "NaN": (
        lambda p: support.write(p, changed("layers.1.ffn_norm1.weight", NAN)),
        r"model\.diffusion_model\.layers\.1\.ffn_norm1\.weight holds NaN or infinity: the file is damaged",
    ),
    "infinite scale": (
        lambda p: support.write(p, {
            **changed(MATRIX, torch.ones(288, 288).to(torch.float8_e4m3fn)),
            "model.diffusion_model.layers.1.attention.out.weight_scale": torch.tensor(torch.inf),
        }),
        r"layers\.1\.attention\.out\.weight \(weight_scale\) holds NaN or infinity",
    ),
    "another model": (
        lambda p: support.write(p, {"double_blocks.0.img_attn.qkv.weight": NAN}), r"is FLUX or HunyuanVideo"
    ),
    "TwinFlow": (lambda p: support.write(p, changed("t_embedder_2.mlp.0.weight", NAN)), r"is TwinFlow"),
    "a LoRA": (
        lambda p: support.write(p, {"diffusion_model.layers.0.attention.to_q.lora_A.weight": NAN}),
        r"is a LoRA or another adapter, not a checkpoint: use loras=",
    ),
    "a directory": (lambda p: p.mkdir(), r"^model\.path=\S+ is a directory: write model=local model\.path="),
}  # fmt: skip


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NativeEngine, "create", lambda *_: pytest.fail("an engine was created"))


def refused(cli: Cli, tmp_path: Path, *words: str) -> str:
    """The one line that refuses a command, which leaves nothing behind."""
    code, _, err = cli(*words)
    assert code == 2, err
    assert not list(tmp_path.glob("outputs/*/*/*")), "something was made"
    lines = err.splitlines()
    assert len(lines) == 1, err
    return lines[0].removeprefix("zimage_runner: ")


@pytest.mark.parametrize("case", BAD)
@pytest.mark.usefixtures("nothing_loads")
def test_bad_files_are_refused_in_one_line(case: str, cli: Cli, tmp_path: Path) -> None:
    make, text = BAD[case]
    make(tmp_path / "z.safetensors")
    line = refused(cli, tmp_path, *FILE, *DRAW)
    assert re.search(text, line), line


Z, VARIANT = "model.path=z.safetensors", "model.variant=turbo"
WORDS: list[tuple[list[str], str]] = [
    (["model=z.safetensors"], r"^model=z\.safetensors: write model=file model\.path=z\.safetensors model\.variant=t"),
    (["model=~/z.gguf"], r"^model=~/z\.gguf: write model=file model\.path=~/z\.gguf model\.variant=turbo \(or base\)$"),
    (["model=local", Z], r"model=local is for directories: write model=file model\.path=z"),
    (["model=file"], r"^model\.path is not set: model=file needs model\.path=FILE"),
    (["model=file", Z], r"^model\.variant is not set: a file does not say .* model\.variant=base"),
    (["model.path=wide.safetensors"], r"is no transformer of model=zimage_nano: a file of Z-Image is drawn with mod"),
    (["model.vae=z.safetensors"], r"^model\.vae=\S+ holds no vae: it is for model\.transformer$"),
    (["model.text_encoder=none.gguf"], r"^model\.text_encoder=\S+none\.gguf: no such file$"),
    (["model.tokenizer=z.safetensors"], r"^model\.tokenizer=\S+ is no directory: give the one that holds tokenizer"),
    (
        ["model=file", Z, VARIANT, "model.offline=true", "model.cache_dir=hub", "engine.device=cpu"],
        r"^model\.path=\S+ has the transformer, and not text_encoder, vae, tokenizer: model\.offline=true and "
        r"Tongyi-MAI/Z-Image-Turbo is not in ModelScope's cache",
    ),
    (
        ["model=zimage_turbo", "model.variant=base"],
        r"^model\.variant: not a field of the model chosen, only of model",
    ),
    (["model.text_encoder=wide_encoder.safetensors"], r"hidden_size=256, but the transformer takes captions of"),
]


@pytest.mark.parametrize(("words", "text"), WORDS, ids=[" ".join(words) for words, _ in WORDS])
@pytest.mark.usefixtures("nothing_loads")
def test_what_is_typed_first_is_answered_with_the_words_that_work(
    words: list[str], text: str, cli: Cli, tmp_path: Path
) -> None:
    support.write(tmp_path / "z.safetensors", comfyui())
    support.write(tmp_path / "wide.safetensors", support.comfyui(support.transformer(support.NARROW)))
    support.write(tmp_path / "wide_encoder.safetensors", support.text_encoder())
    line = refused(cli, tmp_path, "prompt=x", *words)
    assert re.search(text, line), line


@pytest.mark.usefixtures("nothing_loads")
def test_a_quantised_directory_names_the_words_that_read_its_file(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "nano"
    shutil.copytree(NANO, folder)
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    values, scale = support.fp8(weights["layers.0.attention.to_q.weight"])
    weights |= {"layers.0.attention.to_q.weight": values, "layers.0.attention.to_q.weight_scale": scale}
    support.write(file, weights)
    line = refused(cli, tmp_path, "model=local", f"model.path={folder}", "prompt=x")
    assert line.endswith(f"give the file as what it is, with model.transformer={file}"), line
    code, _, err = cli("model=local", f"model.path={folder}", f"model.transformer={file}", "prompt=x", "dry_run=true")
    assert code == 0, err
