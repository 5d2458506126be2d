"""Write a diffusers checkpoint that plain `ZImagePipeline.from_pretrained` loads: `python -m training.export`."""

from __future__ import annotations

# The types that diffusers and torch declare here are narrower than what they take.
# pyright: reportPrivateImportUsage=false
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImagePipeline

from training.config import TrainingConfig, command
from training.models import build_scheduler
from zimage_runner.weights.find.layout import inspect
from zimage_runner.weights.find.resolve import CHECKSUMS

ASSETS = Path("zimage_runner/assets/zimage_nano")
LOADING = {"_name_or_path", "is_local", "local_files_only"}
"""What diffusers and transformers note in a part's config about how it was loaded."""


def save_checkpoint(folder: Path, transformer: Any, encoder: Any, vae: Any, tokenizer: Any, dtype: torch.dtype) -> None:
    """Save copies of the parts in `dtype`, complete before they replace an earlier checkpoint in `folder`."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    build_scheduler().save_pretrained(partial / "scheduler")
    tokenizer.save_pretrained(partial / "tokenizer")
    for name, module in {"transformer": transformer, "text_encoder": encoder, "vae": vae}.items():
        original = type(module)
        state = {k: v.detach().to("cpu", dtype).contiguous() for k, v in module.state_dict().items()}
        copy = original(module.config) if name == "text_encoder" else original.from_config(module.config)
        copy.load_state_dict(state)
        copy.to(dtype).save_pretrained(partial / name)
    pipeline = ZImagePipeline(
        scheduler=build_scheduler(), vae=vae, text_encoder=encoder, tokenizer=tokenizer, transformer=transformer
    )
    pipeline.save_config(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def install(source: Path, target: Path) -> int:
    """Copy a checkpoint's files over those in `target`, each replaced at once; return the bytes there.

    Files that the checkpoint lacks (the model card) stay. How and from where a part was loaded (`LOADING`) is dropped.
    """
    for file in sorted(f for f in source.rglob("*") if f.is_file()):
        content, place = file.read_bytes(), target / file.relative_to(source)
        if file.name in ("config.json", "tokenizer_config.json"):
            config = {k: v for k, v in json.loads(content).items() if k not in LOADING}
            content = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(place.name + ".partial")
        partial.write_bytes(content)
        partial.replace(place)
    write_checksums(target)
    return sum(f.stat().st_size for f in target.rglob("*") if f.is_file())


def write_checksums(folder: Path) -> None:
    """List the sha256 of every file that a picture depends on, as `sha256sum` does."""
    layout = inspect(folder)
    files = sorted([*layout.weight_paths, *layout.config_files])
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(folder).as_posix()}\n" for f in files]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def main(cfg: TrainingConfig) -> None:
    """Put the trained checkpoint into the package."""
    size = install(Path(cfg.data.work) / "nano", ASSETS)
    print(f"{ASSETS}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    command(main)
