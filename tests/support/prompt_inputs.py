"""Prompts read from what a test writes: their texts, or the message of the refusal."""

from __future__ import annotations

import json

import pytest

from zimage_runner.errors import UserError
from zimage_runner.prompts import read_prompts
from zimage_runner.prompts.inline import Inline
from zimage_runner.prompts.template import Template


def message(source) -> str:
    with pytest.raises(UserError) as caught:
        read_prompts(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def texts(text: str | list[str], **options) -> list[str]:
    given_texts = [text] if isinstance(text, str) else text
    return [p.text for p in read_prompts(Inline(texts=given_texts, template=Template(**options)))]


def refusal(text: str, **options) -> str:
    with pytest.raises(UserError) as caught:
        texts(text, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save_dataset(directory, *parts):
    """The files of datasets' save_to_disk, as its version 4 writes them."""
    pyarrow = pytest.importorskip("pyarrow")
    directory.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(parts):05d}.arrow" for i in range(len(parts))]
    for name, columns in zip(names, parts, strict=True):
        table = pyarrow.table(columns)
        with pyarrow.ipc.new_stream(str(directory / name), table.schema) as stream:
            stream.write_table(table)
    state = {"_data_files": [{"filename": n} for n in names], "_fingerprint": "f", "_format_type": None, "_split": None}
    (directory / "state.json").write_text(json.dumps(state), encoding="utf-8")
