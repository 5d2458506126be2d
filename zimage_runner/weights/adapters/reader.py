"""Reading an adapter file: every key is used, or the file is refused with the keys' names."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_runner.errors import UserError, counted, one_line
from zimage_runner.weights.adapters.adapter import Adapter, Delta
from zimage_runner.weights.adapters.changes import (
    Additive,
    Change,
    Decomposed,
    Difference,
    Hadamard,
    Kronecker,
    LowRank,
    Replacement,
)
from zimage_runner.weights.adapters.keys import Target, split_key, target_of
from zimage_runner.weights.formats.decode import TORCH_DTYPES, read_tensor
from zimage_runner.weights.formats.files import open_stored

if TYPE_CHECKING:
    import torch

_FACTORS = {
    "lora": ("down", "up"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
}
_KINDS = {
    "down": "LoRA", "hada_w1_a": "LoHa", "lokr_w1": "LoKr", "lokr_w1_a": "LoKr", "magnitude": "DoRA",
    "diff": "full difference", "diff_b": "bias difference", "set_weight": "replacement",
}  # fmt: skip
_RANKED = ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
_LOKR = re.compile(r"lokr_w([12])(_[ab])?")


@dataclass(slots=True)
class _Module:
    """What a file says of one module."""

    name: str
    """As spelled."""
    target: Target
    factors: dict[str, torch.Tensor]
    label: str
    """File and module, for messages."""


def read_adapter(path: Path, label: str = "") -> Adapter:
    """Read a LoRA, LoHa, LoKr, DoRA or full-difference file into what it does to the weights.

    Raises UserError, one line, for a damaged file, keys that mean nothing here, factors that do not fit together and
    values that are no numbers; file, module and keys are named. Whether it fits a model: ``Adapter.check``.
    """
    file = open_stored(path, label)
    if file.kind != "safetensors":
        raise UserError(f"{path} is a GGUF file: adapters are read from .safetensors")
    unknown = []
    modules: dict[str, _Module] = {}
    for key, info in file.tensors.items():
        parts = split_key(key)
        target = target_of(parts[0]) if parts else None
        if parts is None or target is None or info.dtype not in TORCH_DTYPES:
            unknown.append(key)
            continue
        module = modules.setdefault(parts[0], _Module(parts[0], target, {}, f"{path}: {one_line(parts[0], 120)}"))
        if parts[1] in module.factors:
            raise UserError(f"{module.label} has its {parts[1]} factor twice, the second as {one_line(key, 160)}")
        module.factors[parts[1]] = _read(path, key, info)
    if unknown:
        raise UserError(_why_unknown(path, unknown, len(file.tensors)))
    if not modules:
        raise UserError(f"{path} holds no tensors: not an adapter")
    settings = _PeftSettings.of(path, file.metadata)
    deltas = [delta for module in _without_repeats(list(modules.values())) for delta in _deltas(module, settings)]
    _refuse_twice(path, deltas)
    return Adapter(path, tuple(deltas))


def describe_adapter(path: Path, label: str = "") -> list[str]:
    """What an adapter file is, in a few lines, from its header alone. Raises UserError as ``read_adapter``."""
    file = open_stored(path, label)
    kinds: Counter[str] = Counter()
    ranks: set[int] = set()
    targets: dict[str, set[str]] = {}
    unknown = 0
    for key, info in file.tensors.items():
        parts = split_key(key)
        target = target_of(parts[0]) if parts else None
        if parts is None or target is None:
            unknown += 1
            continue
        targets.setdefault(target.component, set()).add(parts[0])
        kinds.update([kind] if (kind := _KINDS.get(parts[1])) else [])
        ranks.update(info.shape[:1] if parts[1] in _RANKED else ())
    rank = f", rank {'-'.join(map(str, sorted({min(ranks), max(ranks)})))}" if ranks else ""
    found = ", ".join(f"{kind} of {count} modules" for kind, count in kinds.items()) or "no adapter of Z-Image"
    lines = [f"file: {path}", f"format: {file.kind}, {file.size / 1e6:.1f} MB, {counted(len(file.tensors), 'tensor')}"]
    lines.append(f"adapter: {found}{rank}")
    lines += [f"{component}: {len(modules)} modules" for component, modules in targets.items()]
    return [*lines, f"unknown keys: {unknown}"] if unknown else lines


def _read(path: Path, key: str, info: Any) -> torch.Tensor:
    import torch

    tensor = read_tensor(path, info)
    if tensor.numel() > 1 and not tensor.is_floating_point():
        raise UserError(
            f"{path}: {one_line(key, 160)} is {info.dtype}: quantised adapters are not read, get one in bf16"
        )
    if tensor.dtype.itemsize == 1:  # fp8 has few operations; its values fit bfloat16
        tensor = tensor.to(torch.bfloat16)
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"{path}: {one_line(key, 160)} holds NaN or Inf: the file is damaged or its training diverged")
    return tensor


def _why_unknown(path: Path, unknown: list[str], total: int) -> str:
    shown = ", ".join(one_line(key, 120) for key in unknown[:3])
    more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
    if len(unknown) == total:
        return f"{path} is no adapter of Z-Image: none of its {total} keys is known ({shown}{more})"
    return f"{path}: {len(unknown)} of {total} keys belong to no known part of Z-Image: {shown}{more}"


def _without_repeats(modules: list[_Module]) -> list[_Module]:
    """Without the fused spellings (qkv, out) of what is there in split spelling too: some files hold a change twice."""
    split = {name for module in modules if not module.target.is_fused_spelling for name in module.target.modules}
    return [m for m in modules if not m.target.is_fused_spelling or not split.issuperset(m.target.modules)]


def _refuse_twice(path: Path, deltas: list[Delta]) -> None:
    seen: dict[tuple[str, str], Delta] = {}
    for delta in deltas:
        for tensor in delta.tensors:
            if (delta.component, tensor) in seen:
                first = seen[delta.component, tensor].source
                raise UserError(f"{path}: {first} and {delta.source} both change {tensor}: which of them is meant?")
            seen[delta.component, tensor] = delta


def _deltas(module: _Module, settings: _PeftSettings) -> list[Delta]:
    """The changes of a module's weight and bias."""
    found: list[Delta] = []
    factors = dict(module.factors)
    bias = factors.pop("diff_b", None)
    if bias is not None:
        found.append(_delta(module, "bias", Difference(bias)))
    if factors:
        found.append(_delta(module, "weight", _change(module, factors, settings)))
    return found


def _delta(module: _Module, leaf: str, change: Change) -> Delta:
    return Delta(module.target.component, module.target.tensors(leaf), change, module.name)


def _change(module: _Module, factors: dict[str, torch.Tensor], settings: _PeftSettings) -> Change:
    alpha = factors.pop("alpha", None)
    magnitude = factors.pop("magnitude", None)
    if alpha is not None and alpha.numel() != 1:
        raise UserError(f"{module.label}: alpha has {alpha.numel()} values: need one")
    number = None if alpha is None else float(alpha.float())
    if magnitude is None and set(factors) == {"diff"}:
        return Difference(factors["diff"])
    if magnitude is None and set(factors) == {"set_weight"}:
        return Replacement(factors["set_weight"])
    additive = _additive(module, factors, number, settings)
    return additive if magnitude is None else _decomposed(module, additive, magnitude)


def _additive(
    module: _Module, factors: dict[str, torch.Tensor], alpha: float | None, settings: _PeftSettings
) -> Additive:
    names = set(factors)
    if names == set(_FACTORS["lora"]):
        down, up = (_matrix(module, factors, name) for name in _FACTORS["lora"])
        _fits(module, ("lora_down / lora_A", down), ("lora_up / lora_B", up))
        return LowRank(down, up, settings.scale(module, alpha, down.shape[0]))
    if names == set(_FACTORS["loha"]):
        w1_a, w1_b, w2_a, w2_b = (_matrix(module, factors, name) for name in _FACTORS["loha"])
        _fits(module, ("hada_w1_b", w1_b), ("hada_w1_a", w1_a))
        _fits(module, ("hada_w2_b", w2_b), ("hada_w2_a", w2_a))
        if (len(w1_a), w1_b.shape[1]) != (len(w2_a), w2_b.shape[1]):
            raise UserError(f"{module.label}: hada_w1 gives [{len(w1_a)}, {w1_b.shape[1]}], hada_w2 another shape")
        return Hadamard(w1_a, w1_b, w2_a, w2_b, 1.0 if alpha is None else alpha / len(w1_b))
    if names and all(_LOKR.fullmatch(name) for name in names):
        return _lokr(module, factors, alpha)
    raise UserError(f"{module.label} has {', '.join(sorted(names)) or 'only an alpha'}: a factor is missing")


def _lokr(module: _Module, factors: dict[str, torch.Tensor], alpha: float | None) -> Kronecker:
    """alpha / rank counts only where a factor is itself a product; ai-toolkit writes an alpha of 1e10 otherwise."""
    w1, w2 = _kronecker_factor(module, factors, "lokr_w1"), _kronecker_factor(module, factors, "lokr_w2")
    ranks = [len(factor[1]) for factor in (w2, w1) if len(factor) == 2]
    return Kronecker(w1, w2, alpha / ranks[0] if ranks and alpha is not None else 1.0)


def _kronecker_factor(module: _Module, factors: dict[str, torch.Tensor], name: str) -> tuple[torch.Tensor, ...]:
    found = {role for role in factors if role.startswith(name)}
    if found == {name}:
        return (_matrix(module, factors, name),)
    if found != {f"{name}_a", f"{name}_b"}:
        raise UserError(f"{module.label} has {', '.join(sorted(factors))}: need {name}, or {name}_a and {name}_b")
    first, second = (_matrix(module, factors, f"{name}_{half}") for half in "ab")
    _fits(module, (f"{name}_b", second), (f"{name}_a", first))
    return first, second


def _decomposed(module: _Module, additive: Additive, magnitude: torch.Tensor) -> Decomposed:
    out, into = additive.shape
    if tuple(magnitude.shape) not in ((out,), (out, 1), (1, into)):
        raise UserError(
            f"{module.label}: its magnitude has shape {list(magnitude.shape)}: need [{out}], [{out}, 1] or [1, {into}]"
        )
    return Decomposed(additive, magnitude)


def _matrix(module: _Module, factors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """A factor as a matrix: what was trained as a 1 x 1 convolution has two dimensions of 1 more."""
    tensor = factors[name]
    if tensor.ndim < 2 or math.prod(tensor.shape[2:]) != 1:
        raise UserError(f"{module.label}: its {name} factor has shape {list(tensor.shape)}: need a matrix")
    return tensor.reshape(tensor.shape[:2])


def _fits(module: _Module, right: tuple[str, torch.Tensor], left: tuple[str, torch.Tensor]) -> None:
    if left[1].shape[1] != right[1].shape[0]:
        raise UserError(
            f"{module.label}: ranks differ: {right[0]} is {list(right[1].shape)}, {left[0]} {list(left[1].shape)}"
        )
    if right[1].shape[0] == 0:
        raise UserError(f"{module.label}: its rank is 0")


@dataclass(frozen=True, slots=True)
class _PeftSettings:
    """The header's ``lora_adapter_metadata``: peft's LoraConfig, which diffusers writes beside the tensors."""

    config: Mapping[str, Any]

    @classmethod
    def of(cls, path: Path, metadata: Mapping[str, object]) -> _PeftSettings:
        text = metadata.get("lora_adapter_metadata")
        if text is None:
            return cls({})
        try:
            config = dict(json.loads(str(text)))
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: its header's lora_adapter_metadata cannot be read: {error}") from error
        for name, patterns in config.items():
            if name.endswith("alpha_pattern"):
                _check_patterns(path, patterns)
        return cls(config)

    def scale(self, module: _Module, alpha: float | None, rank: int) -> float:
        """What up @ down is multiplied by: alpha / rank; without any alpha, 1."""
        component = module.target.component
        if alpha is None:
            patterns = self._get(component, "alpha_pattern") or {}
            spelled = module.name.removeprefix(f"{component}.")
            alpha = next(
                (value for end, value in patterns.items() if spelled == end or spelled.endswith(f".{end}")),
                self._get(component, "lora_alpha"),
            )
        if alpha is None:
            return 1.0
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise UserError(f"{module.label}: alpha {alpha!r} is no number")
        return alpha / math.sqrt(rank) if self._get(component, "use_rslora") else alpha / rank

    def _get(self, component: str, name: str) -> Any:
        return self.config.get(f"{component}.{name}", self.config.get(name))


def _check_patterns(path: Path, patterns: object) -> None:
    """peft takes a pattern as a regular expression; what diffusers saves are plain ends of module names."""
    odd = (
        next((p for p in patterns if not re.fullmatch(r"[\w.-]+", p)), None) if isinstance(patterns, dict) else patterns
    )
    if odd:
        raise UserError(
            f"{path}: its header's alpha_pattern {one_line(repr(odd), 120)} is not the end of a module's name"
        )
