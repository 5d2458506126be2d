"""Attention backends of ``engine=diffusers``: which there are, what each needs, and which ``auto`` takes.

A backend that cannot run is refused before the weights are loaded. The plan puts only captions of equal padded length
into one batch, so no attention mask is needed, which the flash and sage backends would refuse.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from zimage_runner.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """What a backend needs."""

    package: str | None = None
    """Python package that must be installed."""
    cuda: bool = False
    half: bool = False
    """Computes in bfloat16 or float16 alone."""
    capability: tuple[int, int] = (0, 0)
    """Lowest CUDA compute capability."""
    only_major: int | None = None
    """Written for this generation of GPUs alone."""
    exact: bool = True
    """False for backends that quantise: pictures differ visibly from the other backends'."""


BACKENDS: dict[str, Backend] = {
    "native": Backend(),
    "_native_cudnn": Backend(cuda=True, half=True, capability=(8, 0)),
    "_native_flash": Backend(cuda=True, half=True, capability=(8, 0)),
    "_native_efficient": Backend(cuda=True),
    "_native_math": Backend(),
    "flash": Backend(package="flash_attn", cuda=True, half=True, capability=(8, 0)),
    "_flash_3": Backend(package="flash_attn_interface", cuda=True, half=True, only_major=9),
    "sage": Backend(package="sageattention", cuda=True, half=True, capability=(8, 0), exact=False),
}
"""Backends by their diffusers names."""

MASKLESS = ("_native_flash", "flash", "_flash_3", "sage")
"""Backends that refuse an attention mask, which guidance brings when prompt and negative prompt differ in length."""
AUTO_ORDER = ("_flash_3", "_native_cudnn", "native")
"""``auto`` takes the first that runs here. On an H100 with 30 heads of 128 and 4160 tokens cuDNN does 576 TFLOP/s and
torch's default, flash attention 2, 327. Quantising backends are never chosen unasked."""
AUTO_CUDNN_MAJOR = 9
"""cuDNN's lead was measured on Hopper; on older GPUs torch's default is as fast."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What decides whether a backend can run."""

    device: str
    dtype: str
    capability: tuple[int, int]
    """(0, 0) without CUDA."""


def check_name(attention: str) -> None:
    """Raise UserError for an unknown backend. Imports nothing."""
    if attention != "auto" and attention not in BACKENDS:
        raise UserError(f"engine.attention={attention}: no such backend; use auto or one of {', '.join(BACKENDS)}")


def choose_backend(attention: str, machine: Machine) -> str:
    """The backend to use; ``auto`` falls back along AUTO_ORDER. Raises UserError for one that cannot run here."""
    check_name(attention)
    if attention != "auto":
        reason = why_not(attention, machine)
        if reason:
            raise UserError(f"engine.attention={attention} cannot run here: {reason}; use engine.attention=auto")
        return attention
    return next(name for name in AUTO_ORDER if _auto_takes(name, machine))


def _auto_takes(name: str, machine: Machine) -> bool:
    if name == "_native_cudnn" and machine.capability[0] < AUTO_CUDNN_MAJOR:
        return False
    return why_not(name, machine) is None


def why_not(name: str, machine: Machine) -> str | None:
    """Why the backend cannot run on this machine, or None when it can."""
    backend = BACKENDS[name]
    if backend.cuda and machine.device != "cuda":
        return "it needs a CUDA GPU"
    if backend.half and machine.dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 and the model runs in {machine.dtype}"
    if machine.capability < backend.capability:
        have, need = (".".join(map(str, c)) for c in (machine.capability, backend.capability))
        return f"it needs compute capability {need} and this GPU has {have}"
    if backend.only_major is not None and machine.capability[0] != backend.only_major:
        return f"it is written for compute capability {backend.only_major}.x and this GPU has {machine.capability[0]}.x"
    if backend.package and not is_installed(backend.package):
        return f"the package {backend.package} is not installed"
    return None


def this_machine(device: str, dtype: str) -> Machine:
    """Describe the machine; imports torch."""
    import torch

    capability = torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
    return Machine(device=device, dtype=dtype, capability=capability)


def is_installed(package: str) -> bool:
    """True when the package can be imported; it is not imported."""
    return importlib.util.find_spec(package) is not None
