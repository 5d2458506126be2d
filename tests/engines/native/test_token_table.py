"""Rows of the token table, read from where it was published."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zimage_runner.engines.native.token_table import NAME, TokenTable
from zimage_runner.errors import UserError

IDS = [5, 0, 95, 5]


def write(folder: Path, dtype: torch.dtype, name: str = NAME) -> torch.Tensor:
    table = torch.randn(96, 24).to(dtype)
    save_file({"norm.weight": torch.ones(24), name: table}, folder / "model.safetensors")
    return table


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_are_the_tables_rows(tmp_path: Path, stored: torch.dtype, dtype: torch.dtype) -> None:
    expected = write(tmp_path, stored, f"model.{NAME}").to(dtype)[IDS]
    with torch.inference_mode():
        vectors = TokenTable(tmp_path, 96, 24, dtype).vectors(IDS)
    assert vectors.dtype == dtype
    assert torch.equal(vectors, expected)


def test_a_file_that_is_replaced_meanwhile_changes_nothing(tmp_path: Path) -> None:
    expected = write(tmp_path, torch.bfloat16)[IDS]
    table = TokenTable(tmp_path, 96, 24, torch.bfloat16)
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(table.vectors(IDS), expected)


def test_a_token_beyond_the_table(tmp_path: Path) -> None:
    write(tmp_path, torch.bfloat16)
    with pytest.raises(UserError, match=r"the tokenizer gives token 96, text_encoder's embed_tokens\.weight has 96 r"):
        TokenTable(tmp_path, 96, 24, torch.bfloat16).vectors([1, 96])


def test_another_shape(tmp_path: Path) -> None:
    write(tmp_path, torch.bfloat16)
    with pytest.raises(UserError, match=r"has shape \[96, 24\], its config\.json says \[97, 24\]"):
        TokenTable(tmp_path, 97, 24, torch.bfloat16)


def test_no_table(tmp_path: Path) -> None:
    write(tmp_path, torch.bfloat16, "other.weight")
    with pytest.raises(UserError, match=r"1 tensor is missing: embed_tokens\.weight"):
        TokenTable(tmp_path, 96, 24, torch.bfloat16)
