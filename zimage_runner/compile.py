"""Compiling the transformer and the VAE decoder: the ``compile`` config group.

The options say what to compile; the engine does it, because it knows its modules. Compiled code is kept in the
runner's cache, so that only the first run on a machine waits for the compiler.
"""

from __future__ import annotations

import atexit
import enum
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from zimage_runner.errors import UserError

log = logging.getLogger(__name__)

CompileMode = enum.Enum(
    "CompileMode", {"default": "default", "reduce-overhead": "reduce-overhead", "max-autotune": "max-autotune"}
)
"""torch.compile's modes; the last two replay CUDA graphs."""
CACHE_VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Environment variables of the compiler's caches and their folder below the cache directory."""


@dataclass(kw_only=True, slots=True)
class Compile:
    """What every option has."""

    @property
    def label(self) -> str:
        """Short name for records and fingerprints: compiled code rounds differently."""
        return "none"

    @property
    def active(self) -> bool:
        """False when nothing is compiled."""
        return False

    @property
    def specializes(self) -> bool:
        """True when code is compiled for each caption length, so that warm-up has to visit them all."""
        return False

    def apply_environment(self) -> None:
        """Point the compiler's caches into the runner's cache; call before importing torch."""


@dataclass(kw_only=True, slots=True)
class NoCompile(Compile):
    """No compilation: nothing to wait for before the first picture."""


@dataclass(kw_only=True, slots=True)
class Compiled(Compile):
    """What both ways of compiling share."""

    mode: CompileMode = CompileMode.default
    fullgraph: bool = True
    """Fail instead of falling back to Python between graphs."""
    vae: bool = False
    """Compile the VAE decoder too."""
    cache_dir: str | None = None
    """Where compiled code is kept; null is the runner's cache. Variables set by the user win."""
    target: str = "transformer"
    """The pipeline's component to compile."""

    def __post_init__(self) -> None:
        check_target(self.target)

    @property
    def label(self) -> str:
        return describe(type(self).__name__.lower(), self.mode, self.vae)

    @property
    def active(self) -> bool:
        return True

    @property
    def specializes(self) -> bool:
        return True

    def apply_environment(self) -> None:
        export_cache(self.cache_dir)


@dataclass(kw_only=True, slots=True)
class Regional(Compiled):
    """One block is compiled and used for all: seconds instead of a minute, nearly the speed of ``full``.

    ``layers`` and ``noise_refiner`` alone: ``context_refiner`` sees the few caption tokens, and shapes tuned on
    those once made the 4096-token blocks slower than eager (sgl-project/sglang#35755).
    """


@dataclass(kw_only=True, slots=True)
class Full(Compiled):
    """The whole transformer as one graph."""


def uses_cuda_graphs(mode: CompileMode) -> bool:
    """True for the modes in which Inductor replays CUDA graphs."""
    return mode is not CompileMode.default


def check_target(target: str) -> None:
    if target == "unet":
        raise UserError(
            "compile.target=unet: ZImagePipeline has no unet (the article's pipe.unet does not exist), its network is "
            "the transformer: use compile.target=transformer, or +experiment=article, the corrected script"
        )
    if target != "transformer":
        raise UserError(f"compile.target={target}: use transformer; compile.vae=true adds the VAE decoder")


def describe(kind: str, mode: CompileMode, vae: bool) -> str:
    """regional, regional:max-autotune+vae ..."""
    return kind + ("" if mode is CompileMode.default else f":{mode.value}") + ("+vae" if vae else "")


def export_cache(cache_dir: str | None) -> None:
    """Set the compiler's cache variables that the user has not set.

    What lies there is executed. Where others could have put it there, or nothing can be written, a temporary folder
    takes the place and a warning says so.
    """
    from zimage_runner.weights.cache import code_folder, make_trusted_folder

    missing = [variable for variable in CACHE_VARIABLES if variable not in os.environ]
    if not missing:
        return
    root = code_folder("compiled") if cache_dir is None else Path(os.path.abspath(os.path.expanduser(cache_dir)))
    if not make_trusted_folder(root):
        log.warning(
            "compiled code is not kept in %s, which cannot be written, or other users can write to it or to a folder "
            "above it: set compile.cache_dir to a folder that only you can write to",
            root,
        )
        root = Path(tempfile.mkdtemp(prefix="zimage_runner-compiled-"))
        atexit.register(shutil.rmtree, root, ignore_errors=True)
    for variable in missing:
        os.environ[variable] = str(root / CACHE_VARIABLES[variable])
