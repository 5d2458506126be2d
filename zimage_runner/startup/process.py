"""The one call with which a process of the runner begins."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # this comes before everything else: it imports next to nothing
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any, NoReturn

PLAIN_START = "ZIMAGE_RUNNER_PLAIN_START"
"""Environment variable: 1 turns off everything in this room. Only the time of the start differs."""


def begin(*, warns: bool = True) -> bool:
    """Prepare this process: a folder for bytecode, and a lean import of torch when it comes.

    Returns False, and does nothing, where the user wants a plain start. ``warns``: print a line about a bytecode
    folder that is not safe to use; processes that another one starts leave that to it.
    """
    if os.environ.get(PLAIN_START, "") not in ("", "0"):
        return False
    from zimage_runner.startup.bytecode import keep_bytecode

    keep_bytecode(warns=warns)
    import_torch_lean()
    return True


def import_torch_lean() -> None:
    """Make the first ``import torch`` of this process, by whomever, a lean one. Nothing changes once torch is there."""
    if "torch" not in sys.modules and not any(isinstance(finder, FirstImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, FirstImport())


class FirstImport:
    """Finder that hands torch's first import to lean_torch.py, and then leaves.

    Python lets one thread import torch and has all others wait for it. Where that import fails, others may try again;
    but a second attempt of torch's always fails, and for another reason than the first. All get the first error.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """torch's own spec with another loader; None for every other module. Imports nothing: Python holds a lock."""
        if name != "torch":
            return None
        if self.error is not None:
            raise self.error
        finders = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        others = (finder.find_spec(name, path, target) for finder in finders)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = FirstLoader(spec.loader, self)  # type: ignore[assignment]
        return spec


class FirstLoader:
    """Loads torch lean, once."""

    def __init__(self, loader: Any, finder: FirstImport) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        """Whatever else is asked of a loader (sources, resources) is the real one's to answer."""
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        from zimage_runner.startup.lean_torch import execute

        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        try:
            execute(module, self._loader.exec_module)
        except Exception as error:
            self._finder.error = error
            vars(module)["__getattr__"] = self._refuse
            raise
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)

    def _refuse(self, name: str) -> NoReturn:
        """What a module that failed answers: Python hands it, with no error, to threads that waited for it."""
        assert self._finder.error is not None
        raise self._finder.error
