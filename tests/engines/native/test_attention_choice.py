"""engine.attention=auto finds out once a machine what runs there."""

from __future__ import annotations

import pytest
import torch

from zimage_runner.engines.native import flash3
from zimage_runner.engines.native import sdpa as attention
from zimage_runner.errors import UserError


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch, tmp_path) -> list[str]:
    """Names tried, on a machine where flash3 is not installed and cuDNN computes nonsense."""
    names: list[str] = []

    def try_attention(name, dtype, head_dim):
        names.append(name)
        works = name == "flash"
        return (attention.Attention(name, attention.scaled_dot_product), "") if works else (None, "no")

    monkeypatch.setenv("ZIMAGE_RUNNER_CACHE", str(tmp_path))
    monkeypatch.setattr(attention, "try_attention", try_attention)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return names


def choose(dtype: torch.dtype = torch.bfloat16, head_dim: int = 128) -> str:
    return attention.choose_attention("auto", "cuda", dtype, head_dim).name


def test_what_was_found_out_is_kept(tried):
    assert choose() == choose() == "flash"
    assert tried == ["flash3", "cudnn", "flash"]


def test_another_question_is_asked_anew(tried, monkeypatch):
    choose()
    choose(torch.float32)
    choose(head_dim=48)
    monkeypatch.setattr(flash3, "INTERFACES", ("json", *flash3.INTERFACES))  # installed meanwhile
    choose()
    assert len(tried) == 4 * 3


def test_a_name_is_always_tried(tried):
    for _ in range(2):
        with pytest.raises(UserError, match=r"engine\.attention=cudnn does not run here \(no\)"):
            attention.choose_attention("cudnn", "cuda", torch.bfloat16, 128)
    assert tried == ["cudnn", "cudnn"]


def test_that_nothing_works_is_not_kept(tried, tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "try_attention", lambda *args: (None, "no"))
    assert choose() == "native"
    assert list(tmp_path.rglob("*.json")) == []
