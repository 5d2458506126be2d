"""Token ids that tell where in a word a token stands, for a BPE tokenizer that drops spaces.

Without them "an ship" and the end of "craftsmanship" are the same ids. Every token is told apart by its place: a whole
word (`ship</w>`), the start (`ship`), the middle (`##ship`) or the end of one (`##ship</w>`), by BPE's own
`continuing_subword_prefix` and `end_of_word_suffix`. Where a text is cut stays the same: each merge becomes the merges
of its places, in its rank. So a model of the unmarked tokenizer draws the same when the new ids' embeddings are copies.
"""

from __future__ import annotations

import copy
from typing import Any

from tokenizers import pre_tokenizers

CONTINUED, ENDED = "##", "</w>"
WHOLE, START, MIDDLE, END = ("", ENDED), ("", ""), (CONTINUED, ""), (CONTINUED, ENDED)
Place = tuple[str, str]
"""What a token's text has (before, after) it."""


def mark_words(tokenizer: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """The marked tokenizer, and the unmarked id of each of its ids; both tokenizers as their tokenizer.json holds them.

    A token's first possible place keeps its id, the others are appended; places that no text can give a token are left
    out. The tokenizer must be of `training.tokenizer`'s kind: lower case, split at white space, Han and kana isolated.
    """
    marked, model = copy.deepcopy(tokenizer), tokenizer["model"]
    added = {t["content"] for t in tokenizer["added_tokens"]}
    assert not is_marked(tokenizer)
    assert not any(CONTINUED in t or ENDED in t for t in model["vocab"])
    places = {token: [("", "")] if token in added else possible_places(as_bytes(token)) for token in model["vocab"]}
    by_id = sorted(model["vocab"], key=model["vocab"].__getitem__)
    assert [model["vocab"][t] for t in by_id] == list(range(len(by_id)))
    names = [_marked(token, places[token][0]) for token in by_id]
    origin = list(range(len(by_id)))
    for number, token in enumerate(by_id):
        names += [_marked(token, place) for place in places[token][1:]]
        origin += [number] * len(places[token][1:])
    vocab = {name: number for number, name in enumerate(names)}
    assert len(vocab) == len(names)
    merges = [pair for left, right in model["merges"] for pair in _merges(left, right, vocab)]
    marked["model"] |= {
        "vocab": vocab, "merges": merges, "continuing_subword_prefix": CONTINUED, "end_of_word_suffix": ENDED,
    }  # fmt: skip
    strip = [{"type": "Replace", "pattern": {"Regex": p}, "content": ""} for p in (f"^{CONTINUED}", f"{ENDED}$")]
    marked["decoder"] = {"type": "Sequence", "decoders": [*strip, tokenizer["decoder"]]}
    return marked, origin


def is_marked(tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer.json has marks already."""
    return tokenizer["model"]["continuing_subword_prefix"] == CONTINUED


def _marked(token: str, place: Place) -> str:
    return place[0] + token + place[1]


def _merges(left: str, right: str, vocab: dict[str, int]) -> list[list[str]]:
    """The merge in every place. In the order of the places in a word: BPE takes the leftmost of equal ranks first."""
    found = []
    for before, after in (WHOLE, START, MIDDLE, END):
        pair = [before + left, CONTINUED + right + after]
        if before + left + right + after in vocab and pair[0] in vocab and pair[1] in vocab:
            found.append(pair)
    return found


def as_bytes(token: str) -> bytes:
    """The bytes that a byte-level token stands for."""
    return bytes(_BYTES[c] for c in token)


def possible_places(raw: bytes) -> list[Place]:
    """The places in a word that valid UTF-8 allows a token: whole first, as most names are whole words."""
    if len(raw) == 1 and raw[0] in _NEVER:
        return [WHOLE]
    begins, ends = not _is_trailing(raw[0]), _ends_a_character(raw)
    if begins and _is_isolated(raw):  # Han and kana: a word is one character
        return [WHOLE] if ends else [START]
    if not begins:
        return [MIDDLE, END] if ends else [MIDDLE]
    return [WHOLE, START, MIDDLE, END] if ends else [START, MIDDLE]


def _is_trailing(byte: int) -> bool:
    return 0x80 <= byte < 0xC0


def _is_isolated(raw: bytes) -> bool:
    """Whether the first character can only be in [\\u3040-\\u30ff\\u3400-\\u9fff]."""
    if 0xE4 <= raw[0] <= 0xE9:
        return True
    return raw[0] == 0xE3 and len(raw) > 1 and (0x81 <= raw[1] <= 0x83 or raw[1] >= 0x90)


def _ends_a_character(raw: bytes) -> bool:
    """Whether the last character is, or may be, complete."""
    lead = max((i for i, b in enumerate(raw) if not _is_trailing(b)), default=None)
    if lead is None:
        return True
    width = 1 + sum(raw[lead] >= first for first in (0xC0, 0xE0, 0xF0))
    return len(raw) - lead >= width


def _byte_alphabet() -> dict[str, int]:
    """The byte-level alphabet: printable bytes stand for themselves, the others count from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable} | {chr(0x100 + k): b for k, b in enumerate(others)}
    assert set(table) == set(pre_tokenizers.ByteLevel.alphabet())
    return table


_BYTES = _byte_alphabet()
_NEVER = {*b"ABCDEFGHIJKLMNOPQRSTUVWXYZ \t\n\r\v\f", 0xC0, 0xC1, *range(0xF5, 0x100)}
"""Bytes that lower case, split at white space and valid UTF-8 leave no place at all."""
