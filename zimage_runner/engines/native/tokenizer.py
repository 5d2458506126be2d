"""Captions to token ids with the ``tokenizers`` library alone, in the chat template the model was trained with.

A caption becomes the user turn of a conversation, followed by the start of the assistant's turn
(``add_generation_prompt=True, enable_thinking=True``), cut at max_sequence_length tokens as diffusers does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from zimage_runner.engines.native.chat_template import render
from zimage_runner.errors import UnsupportedCheckpoint, UserError, one_line
from zimage_runner.outputs.parsed import from_json

USER_TURN = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
"""What Qwen3's template puts before and after a single user message."""

KNOWN_TEMPLATES = {"94d754f89b5c462771bdd267b01a769ab6c028d5e077e0ade4e9f837c248e31d": USER_TURN}
"""sha256 of templates whose rendering is known; any other is rendered once with jinja2."""

_kept: dict[str, Tokenizer] = {}
"""The last tokenizer by the sha256 of its tokenizer.json."""


class CaptionTokenizer:
    """Token ids of captions."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UnsupportedCheckpoint(
                f"{path} is missing: engine=native needs it; use engine=diffusers for this checkpoint"
            )
        self._tokenizer = _parsed(path)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.before, self.after = user_turn(read_chat_template(folder), str(folder))

    def __call__(self, texts: Sequence[str], max_sequence_length: int) -> list[list[int]]:
        """Ids of each caption in its template, at most ``max_sequence_length`` of them."""
        self._tokenizer.enable_truncation(max_sequence_length)
        encodings = self._tokenizer.encode_batch([self.before + text + self.after for text in texts])
        return [encoding.ids for encoding in encodings]


def _parsed(path: Path) -> Tokenizer:
    """The tokenizer, kept while no other is read: planning and encoding need the same, and it takes 0.3 s to make."""
    tokenizer_json = path.read_bytes()
    digest = hashlib.sha256(tokenizer_json).hexdigest()
    if digest not in _kept:
        _kept.clear()
        try:
            _kept[digest] = Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the library raises Exception itself
            reason = one_line(str(error), 200)
            raise UserError(f"{path} is not a tokenizer ({reason}): copy or download it again") from error
    return _kept[digest]


def read_chat_template(folder: Path) -> str:
    """The checkpoint's template: chat_template.jinja, else the field of tokenizer_config.json."""
    separate = folder / "chat_template.jinja"
    if separate.is_file():
        return separate.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    try:
        content = from_json(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except ValueError as error:
        raise UserError(f"{config} cannot be read ({one_line(str(error), 200)}): copy or download it again") from error
    template = content.get("chat_template") if isinstance(content, dict) else None
    if not isinstance(template, str):
        raise UnsupportedCheckpoint(f"{folder} holds no chat template: use engine=diffusers for this checkpoint")
    return template


def user_turn(template: str, where: str) -> tuple[str, str]:
    """What the template puts before and after a lone user message.

    Raises UnsupportedCheckpoint if the template cannot be rendered or changes the message itself.
    """
    known = KNOWN_TEMPLATES.get(hashlib.sha256(template.encode()).hexdigest())
    if known is not None:
        return known
    try:
        probes = [(message, render(template, message)) for message in ("a probe", "<other>  probe\n2 ")]
    except Exception as error:  # a template is a program; whatever it raises, the user is told what to do
        raise UserError(
            f"{where}: chat template cannot be rendered ({one_line(str(error), 200)}): use engine=diffusers"
        ) from None
    before, found, after = probes[0][1].partition(probes[0][0])
    if not found or any(rendered != before + message + after for message, rendered in probes):
        raise UnsupportedCheckpoint(f"{where}: chat template changes the message it wraps: use engine=diffusers")
    return before, after
