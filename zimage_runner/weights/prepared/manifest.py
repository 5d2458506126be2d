"""What a prepared checkpoint says of itself: its source, what was fused or left out, digests, versions."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from zimage_runner import __version__
from zimage_runner.weights.find.checkpoint import Checkpoint
from zimage_runner.weights.find.digest import sampled_digests
from zimage_runner.weights.find.layout import Layout
from zimage_runner.weights.prepared import prepared
from zimage_runner.weights.prepared.names import COMPONENTS
from zimage_runner.weights.prepared.pieces import PlannedTensor
from zimage_runner.weights.safetensors_file import read_header


def describe(
    checkpoint: Checkpoint,
    layout: Layout,
    plan: dict[str, list[PlannedTensor]],
    folder: Path,
    sha256: dict[str, str],
    config_files: list[str],
    packed: bool,
    precision: str = prepared.BF16,
) -> dict[str, Any]:
    """The manifest of what was made in ``folder``, whose files have these sha256."""
    import torch

    files = {component: read_header(prepared.component_file(folder, component)) for component in COMPONENTS}
    sampled = dict(zip(files, sampled_digests(list(files.values())), strict=True))
    return {
        "format": prepared.FORMAT,
        "version": prepared.VERSION,
        "source": {
            "path": str(layout.path),
            "revision": checkpoint.revision,
            "digest": checkpoint.digest,
            "files": {layout.name_of(path): path.stat().st_size for path in layout.weight_paths},
        },
        "dtype": "bfloat16",
        "precision": precision,
        "packed": packed,
        "lossless": precision == prepared.BF16 and is_bfloat16(layout),
        "versions": {"zimage_runner": __version__, "torch": torch.__version__},
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "config_files": config_files,
        "components": {
            component: {
                "file": prepared.component_file(Path(), component).as_posix(),
                "size": files[component].size,
                "sha256": sha256[component],
                "sampled_sha256": sampled[component],
                "tensors": len(tensors),
                "fused": {t.name: [origin.name for origin in t.sources] for t in tensors if len(t.sources) > 1},
                "in_eight_bits": sum(t.dtype != "BF16" and t.dtype != "F32" for t in tensors),
                "left_out": _left_out(layout, component, tensors),
            }
            for component, tensors in plan.items()
        },
    }


def _left_out(layout: Layout, component: str, plan: list[PlannedTensor]) -> list[str]:
    used = {origin.name for tensor in plan for origin in tensor.sources}
    return sorted(name for file in layout.weights[component] for name in file.tensors if name not in used)


def is_bfloat16(layout: Layout) -> bool:
    """Whether every tensor is bfloat16 already, so that preparing rounds nothing."""
    infos = (info for files in layout.weights.values() for file in files for info in file.tensors.values())
    return all(info.dtype == "BF16" for info in infos)
