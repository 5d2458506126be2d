"""FlashAttention 3's operator is called as its own interface calls it, without importing that interface."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from zimage_runner.engines.native import flash3
from zimage_runner.engines.native.sdpa import plain_attention, try_attention

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) for name in (*flash3.INTERFACES, *flash3.EXTENSIONS)),
    reason="plays a machine without FlashAttention 3",
)
SCHEMA = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new = None, Tensor(v_new!)? v_new = None, "
    "Tensor? q_v = None, Tensor(out!)? out = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None, "
    "Tensor? cu_seqlens_k_new = None, Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None, "
    "int? max_seqlen_k = None, Tensor? page_table = None, Tensor? kv_batch_idx = None, Tensor? leftpad_k = None, "
    "Tensor? rotary_cos = None, Tensor? rotary_sin = None, Tensor? seqlens_rotary = None, Tensor? q_descale = None, "
    "Tensor? k_descale = None, Tensor? v_descale = None, float? softmax_scale = None, bool is_causal = False, "
    "int window_size_left = -1, int window_size_right = -1, int attention_chunk = 0, float softcap = 0.0, "
    "bool is_rotary_interleaved = False, Tensor? scheduler_metadata = None, int num_splits = 0, "
    "bool? pack_gqa = None, int sm_margin = 0) -> (Tensor(out!), Tensor, Tensor, Tensor)"
)
"""As fa3-fwd 0.0.3 registers it."""

LEAN = """
import sys
from zimage_runner.startup.process import import_torch_lean
import_torch_lean()
import torch
from zimage_runner.engines.native import flash3
library = torch._C._dispatch_library("DEF", "fa3_fwd", "")
library.define(sys.argv[1])
torch.ops.load_library = lambda path: None
flash3.load_flash3()
absent = ("fa3_fwd_interface", "fa3_fwd", "torch._dynamo", "torch._subclasses", "torch.export")
print([name for name in absent if name in sys.modules])
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """fa3-fwd's files, which fail when imported."""
    folder = tmp_path / "fa3_fwd"
    folder.mkdir()
    (folder / "_C.abi3.so").write_bytes(b"not a library")
    for name in ("fa3_fwd/__init__.py", "fa3_fwd_interface.py"):
        (tmp_path / name).write_text("raise ImportError('imported')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


@pytest.fixture
def loaded(package: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """define(schema) makes loading fa3-fwd's library register that operator; its calls are in ``calls``."""
    library = torch.library.Library("fa3_fwd", "FRAGMENT")
    calls: list[tuple[Any, ...]] = []

    def fwd(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
        calls.append(rest)
        nothing = query.new_empty(0)
        return plain_attention(query, key, value).to(query.dtype), nothing, nothing.clone(), nothing.clone()

    def define(schema: str) -> list[tuple[Any, ...]]:
        def load_library(path: str) -> None:
            assert path == str(package / "_C.abi3.so")
            library.define(schema)
            library.impl("fwd", fwd, "CPU")

        monkeypatch.setattr(torch.ops, "load_library", load_library)
        return calls

    yield define
    library._destroy()


def heads(*shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


def test_the_operator_is_called_directly(loaded):
    calls = loaded(SCHEMA)
    query, key, value = heads(1, 5, 2, 16)
    out = flash3.load_flash3()(query, key, value)
    torch.testing.assert_close(out, plain_attention(query, key, value))
    defaults = dict(zip(flash3.ARGUMENTS[3:], calls[0]))
    given = {name: value for name, value in defaults.items() if value not in (None, False, 0)}
    assert given == {"softmax_scale": 0.25, "window_size_left": -1, "window_size_right": -1, "num_splits": 1}


def test_an_operator_of_other_arguments_is_left_to_its_interface(loaded, package):
    interface = package.parent / "fa3_fwd_interface.py"
    interface.write_text("def flash_attn_func(query, key, value):\n    return query + 1, None\n", encoding="utf-8")
    loaded(SCHEMA.replace("int attention_chunk = 0", "int chunk = 0"))
    query, key, value = heads(1, 5, 2, 16)
    try:
        assert torch.equal(flash3.load_flash3()(query, key, value), query + 1)
    finally:
        sys.modules.pop("fa3_fwd_interface", None)


@pytest.mark.usefixtures("package")
def test_a_library_that_does_not_load_is_left_to_its_interface():
    with pytest.raises(ImportError, match="imported"):
        flash3.load_flash3()


def test_not_installed():
    with pytest.raises(ImportError):
        flash3.load_flash3()
    attention, reason = try_attention("flash3", torch.bfloat16, 128)
    assert attention is None
    assert "fa3_fwd_interface" in reason


def test_its_own_build_comes_first(package, monkeypatch):
    own: Any = ModuleType("flash_attn_interface")
    own.flash_attn_func = lambda query, key, value: value
    monkeypatch.setitem(sys.modules, "flash_attn_interface", own)
    query, key, value = heads(1, 5, 2, 16)
    assert flash3.load_flash3()(query, key, value) is value


def test_nothing_else_is_imported(package):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(package.parent)!r})\n{LEAN}", SCHEMA],
        capture_output=True, text=True, timeout=120, check=False, encoding="utf-8")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
