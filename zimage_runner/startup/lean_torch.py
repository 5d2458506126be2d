"""``import torch`` without the parts that drawing pictures does not use, in half the modules and half the time.

Most of the seconds that ``import torch`` takes go into Python modules for tracing, exporting, quantising and
training. While torch is imported lean, stand-ins take their places; afterwards the stand-ins are gone from
``sys.modules``. The first touch of any of them - an attribute such as ``torch.export``, an import, ``torch.compile``,
fake tensors, diffusers - imports all of them for real, in torch's own order, and from then on nothing differs from
a plain import.

What a plain import has and a lean one has not until then: kernels written in Python for the meta device (its
factory functions and most operators have theirs in C++), and device backends of other makers, found by entry points.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

VERIFIED = ("2.11.", "2.13.", "2.14.")
"""Versions of torch whose import was read, line by line. Any other is imported plainly."""

BACKEND_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
DEFERRED = (
    "torchgen.model",
    "torch.utils.data",
    "torch.distributions",
    "torch.optim",
    "torch.profiler",
    "torch.ao",
    "torch.nn.intrinsic",
    "torch.nn.qat",
    "torch.nn.quantizable",
    "torch.nn.quantized",
    "torch.quantization",
    "torch.masked",
    "torch.export",
    "torch.func",
    "torch._higher_order_ops",
    "torch.distributed._meta_registrations",
    "torch._meta_registrations",
    "torch.compiler",
    "torch._subclasses",
    "torch._subclasses.fake_tensor",
)
"""Modules that torch imports and nothing here uses, in torch's order."""

ALONE = ("unittest.mock", "pynvml")
"""Modules of other packages, pynvml if it is installed, that torch imports for functions hardly ever called. They are
deferred too, but each for itself: using one imports it and nothing else."""

TAKEN_FROM = {
    "torch.func": {"vmap"},
    "torch._higher_order_ops": {"cond", "while_loop"},
    "torch._subclasses.fake_tensor": {"is_fake_tensor"},
}
"""Functions that torch's own modules take from them while torch is imported."""

NEEDS_ALL = (
    "functorch",
    "torch._decomp",
    "torch._dynamo",
    "torch._export",
    "torch._functorch.aot_autograd",
    "torch._inductor",
    "torch._prims",
    "torch._refs",
    "torch._subclasses",
    "torch.distributed.tensor",
    "torch.fx.experimental.proxy_tensor",
    "torch.fx.experimental.symbolic_shapes",
    "torch.onnx",
    "accelerate",
    "diffusers",
    "transformers",
)
"""Modules that rely on what the deferred ones register; importing one of these imports those first."""


log = logging.getLogger(__name__)


def execute(module: ModuleType, load: Callable[[ModuleType], None]) -> None:
    """Import torch into its new, empty ``module``: lean where that is known to work, else plainly.

    ``load`` is the import system's own way of doing it. Others may import anything meanwhile; Python has them wait for
    torch.
    """
    if not _is_verified():
        log.debug("torch is imported whole, with no gain: how this version is imported is not known here")
        load(module)
        return
    with _paused_collection():
        Deferral().execute(module, load)
    # Modules live as long as the process. Looking through them for garbage, over and over while the model is built and
    # once more at the end, took a fifth of a short run.
    gc.freeze()


def _is_verified() -> bool:
    if "KINETO_USE_DAEMON" in os.environ:  # torch.profiler, deferred, is what reads it
        return False
    try:
        return metadata.version("torch").startswith(VERIFIED)
    except metadata.PackageNotFoundError:
        return False


class StandIn(ModuleType):
    """Holds a deferred module's place. Any use of it makes the real one appear and is passed on to that."""

    def __init__(self, name: str, deferral: Deferral) -> None:
        super().__init__(name)
        vars(self)["_deferral"] = deferral

    def __getattr__(self, attribute: str) -> Any:
        state = vars(self)
        if "_ready" not in state or attribute == "__path__":  # the import machinery: what it made, is it a package
            raise AttributeError(attribute)
        deferral: Deferral = state["_deferral"]
        if deferral.importing and attribute in TAKEN_FROM.get(self.__name__, ()):
            return Later(deferral, self.__name__, attribute)
        return getattr(deferral.real(self.__name__), attribute)

    def __setattr__(self, attribute: str, value: Any) -> None:
        state = vars(self)
        if "_ready" not in state or (isinstance(value, StandIn) and state["_deferral"].importing):
            state[attribute] = value
        else:
            setattr(state["_deferral"].real(self.__name__), attribute, value)


class Later:
    """A function of TAKEN_FROM: makes the real one appear when it is called."""

    def __init__(self, deferral: Deferral, module: str, name: str) -> None:
        self._deferral, self.module, self.name = deferral, module, name

    def __call__(self, *args: Any, **options: Any) -> Any:
        return getattr(self._deferral.real(self.module), self.name)(*args, **options)


class Deferral(MetaPathFinder):
    """One lean import: hands out the stand-ins, and replaces all of them when one is used."""

    def __init__(self, names: Sequence[str] = (*DEFERRED, *ALONE)) -> None:
        self._names = set(names)
        self._given: list[str] = []
        self._hidden: dict[str, str] = {}
        self._busy = threading.local()
        self._autoload = os.environ.get(BACKEND_AUTOLOAD)
        self._importer = threading.get_ident()
        self.importing = True

    def execute(self, torch: ModuleType, load: Callable[[ModuleType], None]) -> None:
        """Import torch; afterwards no stand-in is left where another module's import would find it."""
        self._importer = threading.get_ident()
        sys.meta_path.insert(0, self)
        os.environ[BACKEND_AUTOLOAD] = "0"
        try:
            load(torch)
        except BaseException:
            sys.meta_path.remove(self)
            raise
        finally:
            self.importing = False
            self._restore_autoload()
        for name in self._given:
            if isinstance(sys.modules.get(name), StandIn):
                del sys.modules[name]
                if name in ALONE:
                    _unbind_from_package(name)
        self._take_back()
        self._hide(torch)
        _prepare_generators(torch)
        if any(name in sys.modules for name in NEEDS_ALL):
            self.complete()

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        """A stand-in's spec while torch is imported; afterwards the real modules, first, for whoever needs them."""
        if getattr(self._busy, "completing", False):
            return None
        if self.importing:
            if threading.get_ident() != self._importer:  # nothing that torch imports is meant
                return None
            if fullname in self._names:
                return self._stand_in_spec(fullname, path, target)
            if isinstance(sys.modules.get(fullname.rpartition(".")[0]), StandIn):
                self.real(fullname.rpartition(".")[0])
            return None
        if fullname in ALONE or (fullname not in self._given and fullname not in NEEDS_ALL):
            return None
        self.complete()
        return _loaded_spec(fullname)

    def real(self, name: str) -> ModuleType:
        """The module behind a stand-in: while torch is imported that one alone, afterwards with all others."""
        if not self.importing:
            if name not in ALONE:
                self.complete()
        elif name in self._names:
            self._names.discard(name)
            if isinstance(sys.modules.get(name), StandIn):
                sys.modules.pop(name, None)
        return importlib.import_module(name)

    def complete(self) -> None:
        """Make up for everything that the lean import left out."""
        if self not in sys.meta_path or getattr(self._busy, "completing", False):
            return
        self._busy.completing = True
        try:
            with _paused_collection():
                for name in self._given:
                    importlib.import_module(name)
                if self._autoload in (None, "1"):
                    sys.modules["torch"]._import_device_backends()
        finally:
            self._busy.completing = False
        self._put_in_place()
        with contextlib.suppress(ValueError):  # another thread was as quick
            sys.meta_path.remove(self)

    def _stand_in_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None:
            return None
        self._given.append(fullname)
        spec.loader = _StandInLoader(self)
        return spec

    def _take_back(self) -> None:
        """What other threads imported meanwhile may have met a stand-in in ``sys.modules``: give it the real one."""
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] not in ("torch", "torchgen"):
                for attribute, value in list(getattr(module, "__dict__", {}).items()):
                    if type(value) is StandIn:
                        vars(module)[attribute] = self.real(value.__name__)

    def _restore_autoload(self) -> None:
        if self._autoload is None:
            del os.environ[BACKEND_AUTOLOAD]
        else:
            os.environ[BACKEND_AUTOLOAD] = self._autoload

    def _hide(self, torch: ModuleType) -> None:
        """Take torch's own attributes away, so that a use of one comes to torch's ``__getattr__``."""
        namespace = vars(torch)
        for name, value in list(namespace.items()):
            if isinstance(value, StandIn):
                self._hidden[name] = value.__name__
                del namespace[name]
            elif isinstance(value, Later):
                self._hidden[name] = value.module
                del namespace[name]
        torch_getattr = namespace["__getattr__"]

        def __getattr__(name: str) -> Any:
            if name not in self._hidden:
                return torch_getattr(name)
            self.complete()
            return self._value(name)

        namespace["__getattr__"] = __getattr__
        self._torch_getattr = torch_getattr

    def _value(self, name: str) -> Any:
        """What torch's attribute ``name`` is after a plain import."""
        module = importlib.import_module(self._hidden[name])
        return getattr(module, name) if name in TAKEN_FROM.get(module.__name__, ()) else module

    def _put_in_place(self) -> None:
        """Bind the real modules wherever a stand-in was bound, and give torch its own ``__getattr__`` back."""
        namespace = vars(sys.modules["torch"])
        for name in self._hidden:
            namespace[name] = self._value(name)
        namespace["__getattr__"] = self._torch_getattr
        for module in list(sys.modules.values()):
            for name, value in list(getattr(module, "__dict__", {}).items()):
                if type(value) is StandIn:
                    vars(module)[name] = sys.modules[value.__name__]
                elif type(value) is Later:
                    vars(module)[name] = getattr(sys.modules[value.module], value.name)


def _unbind_from_package(name: str) -> None:
    package, _, module = name.rpartition(".")
    if package in sys.modules:
        vars(sys.modules[package]).pop(module, None)


def _prepare_generators(torch: ModuleType) -> None:
    """The one thing that a deferred module (torch._prims.rng_prims, from 2.12 on) does for everyday use."""
    prepare = getattr(torch._C, "_set_generator_metaclass", None)
    if prepare is not None:
        try:
            prepare(importlib.import_module("torch._custom_class_base").CustomClassBaseMeta)
        except ModuleNotFoundError:  # before 2.14
            prepare(importlib.import_module("torch._opaque_base").OpaqueBaseMeta)


class _StandInLoader(Loader):
    def __init__(self, deferral: Deferral) -> None:
        self._deferral = deferral

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name, self._deferral)

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["_ready"] = True


class _Loaded(Loader):
    """Hands over a module that was imported while it was being looked for."""

    def __init__(self, module: ModuleType, spec: ModuleSpec | None) -> None:
        self._module, self._spec = module, spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


def _loaded_spec(fullname: str) -> ModuleSpec | None:
    module = sys.modules.get(fullname)
    if module is None:
        return None
    # importlib trusts the spec of a module that appeared meanwhile more than the one it is given.
    module.__spec__ = ModuleSpec(fullname, _Loaded(module, module.__spec__))
    return module.__spec__


@contextlib.contextmanager
def _paused_collection() -> Iterator[None]:
    """Importing makes hundreds of thousands of objects and no garbage; looking for some costs a fifth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
