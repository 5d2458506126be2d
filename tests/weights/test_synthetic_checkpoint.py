"""The synthetic checkpoint has the published layout: names, shapes, counts, shards; and it draws."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file

from zimage_runner.model import Model, Source
from zimage_runner.weights.find.layout import inspect
from zimage_runner.weights.find.resolve import resolve


@pytest.fixture(scope="module")
def synthetic() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "synthetic_checkpoint.py"
    spec = importlib.util.spec_from_file_location("synthetic_checkpoint", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["synthetic_checkpoint"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny(synthetic: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("synthetic") / "tiny"
    synthetic.write_checkpoint(target, "tiny", "fp32", 0, "cpu")
    return target


def test_full_size_counts_are_the_published_ones(synthetic: ModuleType) -> None:
    models = synthetic.meta_models("full")
    counts, shards = {}, {}
    for component in models:
        shapes = synthetic.tensor_shapes(models, component)
        kind = torch.float32 if component == "transformer" else torch.bfloat16
        counts[component] = (len(shapes), sum(math.prod(shape) for shape in shapes.values()))
        stored = {name: torch.empty(shape, dtype=kind, device="meta") for name, shape in shapes.items()}
        split = split_torch_state_dict_into_shards(stored, max_shard_size=int(synthetic.SHARD_BYTES[component]))
        shards[component] = len(split.filename_to_tensors)
    assert counts["transformer"] == (521, 6_154_908_736)
    assert counts["text_encoder"] == (398, 4_022_468_096)
    assert shards == {"transformer": 3, "text_encoder": 3, "vae": 1}
    total = 4 * counts["transformer"][1] + 2 * (counts["text_encoder"][1] + counts["vae"][1])
    assert round(total / 1e9, 2) == 32.83  # 32.84 on disk, with headers and tokenizer


def test_tiny_has_the_same_layout(tiny: Path) -> None:
    layout = inspect(tiny)
    assert {component: len(files) for component, files in layout.weights.items()} == {
        "text_encoder": 3, "transformer": 3, "vae": 1,
    }  # fmt: skip
    dtypes = {c: {info.dtype for f in files for info in f.tensors.values()} for c, files in layout.weights.items()}
    assert dtypes == {"text_encoder": {"BF16"}, "transformer": {"F32"}, "vae": {"BF16"}}
    assert layout.configs["text_encoder"]["architectures"] == ["Qwen3ForCausalLM"]
    assert resolve(Model(name="t", source=Source.local, path=str(tiny))).path == tiny


def test_values_are_normal_and_depend_on_seed_and_name(synthetic: ModuleType) -> None:
    weight = synthetic.fill("layers.0.attention.to_q.weight", (512, 256), "fp32", 0, "cpu")
    assert weight.std().item() == pytest.approx(1 / 16, rel=0.02)
    assert torch.equal(weight, synthetic.fill("layers.0.attention.to_q.weight", (512, 256), "fp32", 0, "cpu"))
    assert not torch.equal(weight, synthetic.fill("layers.0.attention.to_k.weight", (512, 256), "fp32", 0, "cpu"))
    assert not torch.equal(weight, synthetic.fill("layers.0.attention.to_q.weight", (512, 256), "fp32", 1, "cpu"))
    rounded = synthetic.fill("layers.0.attention.to_q.weight", (512, 256), "bf16", 0, "cpu")
    assert torch.equal(rounded, weight.bfloat16())
    norm = synthetic.fill("norm.weight", (4096,), "fp32", 0, "cpu")
    assert norm.mean().item() == pytest.approx(1, abs=0.01)


def test_reference_pipeline_draws_with_it(tiny: Path) -> None:
    from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline

    pipe = ZImagePipeline.from_pretrained(str(tiny), torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    stored = {n: t for f in sorted((tiny / "text_encoder").glob("*.safetensors")) for n, t in load_file(f).items()}
    loaded = pipe.text_encoder.state_dict()
    assert loaded.keys() == {name.removeprefix("model.") for name in stored}
    assert all(torch.equal(loaded[name.removeprefix("model.")], stored[name]) for name in stored)
    output: Any = pipe("a cat", height=64, width=64, num_inference_steps=2, guidance_scale=0.0, output_type="np")
    image = output.images
    assert image.shape == (1, 64, 64, 3)
    assert 0.05 < image.std() < 0.45


def test_index_names_every_tensor(tiny: Path) -> None:
    index = json.loads(
        (tiny / "transformer/diffusion_pytorch_model.safetensors.index.json").read_text(encoding="utf-8")
    )
    layout = inspect(tiny)
    assert index["weight_map"] == {
        name: file.path.name for file in layout.weights["transformer"] for name in file.tensors
    }
    assert index["metadata"]["total_size"] == sum(f.size - f.data_start for f in layout.weights["transformer"])
