"""How many different operators a picture takes on the GPU: each loads a kernel, 10 to 60 ms, before the first picture.

The meta device plays the GPU, so that what is computed on the CPU is told from what is not.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import NANO
from tests.support.reference import noise
from zimage_runner.engines.native import model as model_module
from zimage_runner.engines.native.assembly import load_model
from zimage_runner.engines.native.kernels import build, fused_ops
from zimage_runner.engines.native.model import NativeModel, Options

NO_KERNEL = {
    "_unsafe_view", "alias", "as_strided", "chunk", "detach", "empty", "empty_like", "expand", "flatten", "narrow",
    "new_empty", "permute", "reshape", "select", "slice", "split", "split_with_sizes", "t", "transpose", "unbind",
    "unflatten", "unsqueeze", "view", "view_as_real",
}  # fmt: skip


class Operators(TorchDispatchMode):
    """Counts operators that work on the meta device, and copies to it."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: Counter[tuple[str, tuple[torch.dtype, ...]]] = Counter()
        self.attention: set[tuple[torch.Size, ...]] = set()
        self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        flat = [part for arg in args for part in (arg if isinstance(arg, (list, tuple)) else [arg])]
        tensors = [part for part in flat if isinstance(part, torch.Tensor)]
        made = [part for part in (result if isinstance(result, (list, tuple)) else [result]) if part is not None]
        if name in NO_KERNEL or not any(x.device.type == "meta" for x in (*tensors, *made)):
            return result
        if any(x.device.type == "cpu" and x.ndim for x in tensors):
            self.copies += 1
            return result
        if name == "to" and made[0] is tensors[0]:
            return result
        # However many tensors are put together, it is one kernel.
        dtypes = tuple(dict.fromkeys(x.dtype for x in (*tensors, *made)))
        self.kinds[name, dtypes] += 1
        if "attention" in name:
            self.attention.add(tuple(x.shape for x in tensors))
        return result


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> NativeModel:
    """The embedded model as it runs on a GPU, own kernels noted down instead of launched."""
    monkeypatch.setattr(fused_ops, "kernel", build.Recorder())
    monkeypatch.setattr(model_module, "choose_operations", lambda *args: fused_ops)
    monkeypatch.setattr(NativeModel, "_to_device", lambda self, x: x.to("meta"))
    native = load_model(NANO, Options(dtype=torch.bfloat16))
    native.device = torch.device("meta")
    for network in (native.text_encoder, native.transformer, native.vae):
        assert isinstance(network, torch.nn.Module)
        network.to("meta")
    return native


def test_few_operators_before_the_first_picture(on_gpu: NativeModel) -> None:
    with Operators() as encode:
        embeds = on_gpu.encode(["a red apple"], 512)
    assert len(encode.kinds) <= 15, sorted(map(str, encode.kinds))
    assert encode.copies == 2  # token ids, rotary table
    with Operators() as denoise:
        on_gpu.denoise(embeds, noise(1, 128, 128), 8)
    assert len(denoise.kinds) <= 15, sorted(map(str, denoise.kinds))
    assert denoise.copies == 4  # noise, times, and a rotary table each for the caption and for the picture
    # cuDNN plans for each number of tokens anew: caption, picture, both.
    assert len(denoise.attention) == 3


def test_what_a_step_changes_takes_few_launches(on_gpu: NativeModel) -> None:
    blocks = len(on_gpu.transformer.layers) + len(on_gpu.transformer.noise_refiner)
    with Operators() as operators:
        on_gpu._steps(8)
    assert operators.kinds.total() <= 3 * blocks + 20
