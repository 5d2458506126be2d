"""The tokenizer: byte-level BPE over NFKC lower case, Han split per character. `python -m training.tokenizer`.

Spaces are dropped; the ids themselves tell where a word starts and ends (`training.word_marks`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from training.captions import CaptionWriter
from training.config import TrainingConfig, command
from training.names import Picture, load_pictures
from training.scenes import SceneWriter
from training.word_marks import mark_words

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(caption: str) -> str:
    """The text that the pipeline makes of a caption with this tokenizer's chat template."""
    return f"{START}user\n{caption}{END}\n{START}assistant\n"


def corpus(pictures: list[Picture], seed: int) -> Iterator[str]:
    """Every name four times, and random captions; mostly without noise, so that merges go to names."""
    writer = CaptionWriter(pictures, random.Random(seed), noisy=0.15)
    scenes = SceneWriter(writer)
    for picture in pictures:
        for name, _ in (*picture.weighted, *picture.weighted_zh):
            yield from [name] * 4
        for _ in range(12):
            yield writer.single(picture.index)
    for _ in range(20 * len(pictures)):
        yield scenes.draw()[1]
    yield from ["user", "assistant", "system"] * 3000


def learn_bpe(texts: Iterator[str], vocab: int) -> Tokenizer:
    """`vocab` tokens, not marked; every byte is in the alphabet, so any text has tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])  # type: ignore[assignment]
    bpe.pre_tokenizer = pre_tokenizers.Sequence([  # type: ignore[assignment]
        pre_tokenizers.Split(Regex(r"\s+"), "removed"),
        pre_tokenizers.Split(Regex(r"[\u3040-\u30ff\u3400-\u9fff]"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])  # fmt: skip
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[PAD, START, END], min_frequency=3, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    return bpe


def build_tokenizer(pictures: list[Picture], vocab: int, seed: int) -> PreTrainedTokenizerFast:
    """Learn where to cut from names and captions, then tell tokens apart by their place in a word."""
    marked, _ = mark_words(json.loads(learn_bpe(corpus(pictures, seed), vocab).to_str()))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(marked)), pad_token=PAD, eos_token=END,
        additional_special_tokens=[START], padding_side="right", clean_up_tokenization_spaces=False,
        model_max_length=512,
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load_tokenizer(work: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer that `python -m training.tokenizer` wrote."""
    return PreTrainedTokenizerFast.from_pretrained(Path(work) / "tokenizer")


def main(cfg: TrainingConfig) -> None:
    """Train and save."""
    pictures = load_pictures(Path(cfg.data.packed), cfg.data.limit)
    tokenizer = build_tokenizer(pictures, cfg.text.vocab, cfg.seed)
    tokenizer.save_pretrained(Path(cfg.data.work) / "tokenizer")
    print(f"{len(tokenizer)} tokens; {tokenizer.tokenize(chat('a cute Cat face, 一只猫 zzyx'))}")


if __name__ == "__main__":
    command(main)
