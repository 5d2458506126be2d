"""Word marks change ids and nothing else: the same cuts, the same pictures, and words that no longer look alike."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tests.support import NANO
from training.cases import load_cases
from training.tokenizer import chat, learn_bpe
from training.warm_start import EMBEDDING, warm_start
from training.word_marks import CONTINUED, ENDED, is_marked, mark_words
from zimage_runner.engines.native.assembly import load_model
from zimage_runner.engines.native.model import Options
from zimage_runner.engines.native.tokenizer import CaptionTokenizer

ROOT = Path(__file__).parents[2]
PROMPTS = [
    "a red apple",
    "一只猫",
    "",
    "craftsmanship of an oversized ship",
    "naïve café 😀😀 don't 12x",
    "熊猫 and 한국어",
]


def unmarked(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """What `mark_words` made a tokenizer from: each token's first id, each merge once."""
    if not is_marked(tokenizer):
        return tokenizer

    def bare(token: str) -> str:
        return token.removeprefix(CONTINUED).removesuffix(ENDED)

    model, vocab = dict(tokenizer["model"]), {}
    for name, number in sorted(model["vocab"].items(), key=lambda item: item[1]):
        vocab.setdefault(bare(name), number)
    merges = list(dict.fromkeys((bare(a), bare(b)) for a, b in model["merges"]))
    model |= {"vocab": vocab, "merges": [list(m) for m in merges]}
    model |= {"continuing_subword_prefix": None, "end_of_word_suffix": None}
    return tokenizer | {"model": model, "decoder": tokenizer["decoder"]["decoders"][-1]}


SHIPPED = json.loads((NANO / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
PLAIN = unmarked(SHIPPED)
MARKED, ORIGIN = mark_words(PLAIN)
BEFORE, AFTER = Tokenizer.from_str(json.dumps(PLAIN)), Tokenizer.from_str(json.dumps(MARKED))


@settings(max_examples=400, deadline=None)
@given(st.text(max_size=60) | st.text(alphabet="abcdefgst 'AZ#</w>一只猫のアé😀·09", max_size=60))
@example("<|im_start|>user\na cat<|im_end|>\n")
@example("##ship ship</w> </w>## ʼn ﬁ Ⅷ ㍿")
def test_any_text_is_cut_as_before(text: str) -> None:
    before, after = BEFORE.encode(text), AFTER.encode(text)
    assert [ORIGIN[i] for i in after.ids] == before.ids
    assert after.offsets == before.offsets
    assert AFTER.decode(after.ids) == BEFORE.decode(before.ids)


@pytest.mark.parametrize("first", range(0x80, 0x10000, 0x4000))
def test_no_character_is_lost_anywhere_in_a_word(first: int) -> None:
    characters = [chr(c) for c in range(first, first + 0x4000) if not 0xD800 <= c < 0xE000]
    text = " ".join(f"{c} a{c} {c}b{c}{c}" for c in characters)
    assert [ORIGIN[i] for i in AFTER.encode(text).ids] == BEFORE.encode(text).ids


def test_every_case_is_cut_as_before() -> None:
    prompts = [chat(c.prompt) for c in load_cases(ROOT / "training" / "reference")]
    pairs = zip(BEFORE.encode_batch(prompts), AFTER.encode_batch(prompts), strict=True)
    assert all([ORIGIN[i] for i in after.ids] == before.ids for before, after in pairs)


def test_ids_stay_and_only_grow() -> None:
    assert ORIGIN[: len(PLAIN["model"]["vocab"])] == list(range(len(PLAIN["model"]["vocab"])))
    assert {name for name, i in MARKED["model"]["vocab"].items() if i < 3} == {
        "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    }  # fmt: skip
    assert sorted(MARKED["model"]["vocab"].values()) == list(range(len(ORIGIN)))


def test_words_no_longer_end_in_other_words() -> None:
    assert BEFORE.encode("craftsmanship").ids[-1] == BEFORE.encode("ship").ids[-1]
    ship = AFTER.encode("ship").ids
    assert ship != AFTER.encode("craftsmanship").ids[-1:]
    assert AFTER.encode("over").ids[0] not in AFTER.encode("oversized").ids
    assert (
        AFTER.encode("a ship").ids[-1:] == AFTER.encode("ship, a").ids[:1] == AFTER.encode("one-ship").ids[-1:] == ship
    )


def test_chinese_characters_keep_their_ids() -> None:
    text = "一只可爱的猫在月亮上，旁边有苹果"
    assert AFTER.encode(text).ids == BEFORE.encode(text).ids


def test_a_newly_learnt_tokenizer_can_be_marked() -> None:
    words = ["a cat", "a catalogue", "the ship", "craftsmanship", "一只猫", "café", "shipping cats 12"] * 20
    plain = json.loads(learn_bpe(iter(words), 330).to_str())
    marked, origin = mark_words(plain)
    assert unmarked(marked)["model"] == plain["model"]
    before, after = Tokenizer.from_str(json.dumps(plain)), Tokenizer.from_str(json.dumps(marked))
    for text in (*words, "shipcat", "éé", "한국"):
        assert [origin[i] for i in after.encode(text).ids] == before.encode(text).ids


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint with a tokenizer without marks and the embeddings of its ids."""
    folder = tmp_path_factory.mktemp("plain") / "nano"
    shutil.copytree(NANO, folder)
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(PLAIN), encoding="utf-8")
    (weights,) = (folder / "text_encoder").glob("*.safetensors")
    state = load_file(weights)
    state[EMBEDDING] = state[EMBEDDING][: len(PLAIN["model"]["vocab"])].clone()
    save_file(state, weights, {"format": "pt"})
    config = folder / "text_encoder" / "config.json"
    text = json.loads(config.read_text(encoding="utf-8")) | {"vocab_size": len(state[EMBEDDING])}
    config.write_text(json.dumps(text), encoding="utf-8")
    return folder


def draw(checkpoint: Path) -> np.ndarray:
    """uint8 [B, 128, 128, 3] of PROMPTS after two forwards."""
    model = load_model(checkpoint, Options())
    noise = torch.randn(len(PROMPTS), 16, 16, 16, generator=torch.Generator().manual_seed(0))
    return np.asarray(model.decode(model.denoise(model.encode(PROMPTS, 512), noise, 2)).wait())


def test_a_warm_start_draws_the_same_bit_for_bit(plain: Path, tmp_path: Path) -> None:
    start = warm_start(plain, tmp_path)
    assert len(load_file(start / "text_encoder" / "model.safetensors")[EMBEDDING]) == len(ORIGIN)
    assert np.array_equal(draw(start), draw(plain))


def test_a_warm_start_is_deterministic_and_marks_once(plain: Path, tmp_path: Path) -> None:
    first, second = warm_start(plain, tmp_path / "a"), warm_start(plain, tmp_path / "b")
    again = warm_start(first, tmp_path / "c")
    files = sorted(f.relative_to(first) for f in first.rglob("*") if f.is_file())
    assert all((first / f).read_bytes() == (second / f).read_bytes() == (again / f).read_bytes() for f in files)
    for part in ("tokenizer", "vae"):
        for file in (first / part).iterdir():
            assert (tmp_path / "a" / part / file.name).read_bytes() == file.read_bytes()
    assert (tmp_path / "a" / "vae.done").exists()


def test_diffusers_and_the_runner_read_the_same_ids(plain: Path, tmp_path: Path) -> None:
    start = warm_start(plain, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline

        pipe: Any = ZImagePipeline.from_pretrained(str(start), torch_dtype=torch.float32)
    own = CaptionTokenizer(start / "tokenizer")(PROMPTS, 512)
    assert own == pipe.tokenizer([chat(p) for p in PROMPTS])["input_ids"]
    assert own == AutoTokenizer.from_pretrained(start / "tokenizer")([chat(p) for p in PROMPTS])["input_ids"]
    assert own == [AFTER.encode(chat(p)).ids for p in PROMPTS]
    assert pipe.text_encoder.config.vocab_size == len(pipe.tokenizer) == len(ORIGIN)
    pipe.tokenizer.save_pretrained(tmp_path / "saved")
    assert CaptionTokenizer(tmp_path / "saved")(PROMPTS, 512) == own


def test_the_command(plain: Path, tmp_path: Path) -> None:
    options = [f"data.work={tmp_path}", f"warm_start.source={plain}"]
    done = subprocess.run(
        [sys.executable, "-m", "training.warm_start", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert f"{len(PLAIN['model']['vocab'])} token ids became {len(ORIGIN)}" in done.stdout
    assert f"transformer.resume={tmp_path / 'start'}" in done.stdout
