"""Prepare to train on from an exported checkpoint: `python -m training.warm_start data.work=FOLDER`.

Writes `<work>/tokenizer`, `<work>/vae` and `<work>/start`, the checkpoint for `transformer.resume`. A tokenizer that
does not mark places in words gets the marks (`training.word_marks`), and each new id a copy of its token's embedding:
the result draws what the source draws, bit for bit.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from training.config import TrainingConfig, command
from training.word_marks import is_marked, mark_words

EMBEDDING = "embed_tokens.weight"


def mark_checkpoint(folder: Path) -> tuple[int, int]:
    """Mark words in a checkpoint's tokenizer, in place, and widen its embedding; returns the ids before and after."""
    file = folder / "tokenizer" / "tokenizer.json"
    marked, origin = mark_words(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(marked, ensure_ascii=False, indent=2), encoding="utf-8")
    config_file = folder / "text_encoder" / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    (weights,) = (folder / "text_encoder").glob("*.safetensors")
    state = load_file(weights)
    before = len(state[EMBEDDING])
    assert before == config["vocab_size"] == max(origin) + 1, (before, config["vocab_size"], max(origin) + 1)
    state[EMBEDDING] = state[EMBEDDING][torch.tensor(origin)].contiguous()
    save_file(state, weights, {"format": "pt"})
    config["vocab_size"] = len(origin)
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return before, len(origin)


def warm_start(source: Path, work: Path) -> Path:
    """Everything that training needs in `work` to go on from `source`; returns the checkpoint to resume."""
    start = work / "start"
    for part, target in {"": start, "vae": work / "vae", "tokenizer": work / "tokenizer"}.items():
        shutil.rmtree(target, ignore_errors=True)
        if part != "tokenizer":
            shutil.copytree(source / part, target)
    if not is_marked(json.loads((start / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))):
        before, after = mark_checkpoint(start)
        print(f"{before} token ids became {after}, told apart by their place in a word")
    shutil.copytree(start / "tokenizer", work / "tokenizer")
    (work / "vae.done").touch()
    return start


def main(cfg: TrainingConfig) -> None:
    """Prepare, and say how to go on."""
    start = warm_start(Path(cfg.warm_start.source), Path(cfg.data.work))
    print(f"now: KEEP_VAE=1 training/train_all.sh 1 data.work={cfg.data.work} transformer.resume={start} ...")


if __name__ == "__main__":
    command(main)
