"""The runner, torch and the CUDA context, made ready in threads while the config is composed elsewhere."""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.util
import os
import threading
from pathlib import Path

from zimage_runner.executors.handing import is_resident

TYPE_CHECKING = False
if TYPE_CHECKING:  # these come in the thread
    from zimage_runner.config.schema import RunConfig
    from zimage_runner.weights.preload.page_cache import CudaContext

DEVICE_NODES = ("/dev/nvidiactl", "/dev/dxg")
OWN = ("libnvJitLink.so", "libnvrtc.so")
"""NVIDIA's libraries of which torch's import takes its own before those of LD_LIBRARY_PATH."""


def sees_gpu() -> bool:
    """Whether an NVIDIA driver is there and a GPU is not hidden. Asks neither the driver nor torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip()
    return visible not in ("", "-1") and any(map(os.path.exists, DEVICE_NODES))


def load_libraries(package: str) -> bool:
    """Load the shared libraries of torch, which lies in ``package``, without holding the GIL. False where that fails.

    ``import`` holds it for as long as the system loads them, two seconds from a cold disk, and no other thread goes on.
    Which libraries, and how: ``torch/__init__.py``.
    """
    others = [Path(folder) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if folder]
    if any(found for folder in others for name in OWN for found in folder.glob(f"{name}*")):
        return False
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return False
    folder = Path(spec.origin).with_name("lib")
    dlopen = ctypes.CDLL(None).dlopen  # called as a foreign function, it lets go of the GIL; CDLL itself does not
    dlopen.argtypes, dlopen.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
    modes = {"libtorch_global_deps.so": os.RTLD_NOW | os.RTLD_GLOBAL, "libtorch_python.so": os.RTLD_NOW}
    return all(dlopen(os.fsencode(folder / name), mode) for name, mode in modes.items())


class Imports:
    """The runner, then torch, in a thread; the CUDA context in another.

    Whoever imports a module meanwhile waits for it, and gets its error: Python sees to that.
    """

    def __init__(self) -> None:
        self._context: CudaContext | None = None
        self._thread = threading.Thread(target=self._import, name="import", daemon=True)
        self._thread.start()

    @property
    def are_done(self) -> bool:
        return not self._thread.is_alive()

    def suit(self, config: RunConfig) -> None:
        """Give the CUDA context back where the config does not want it in this process."""
        if config.dry_run or _is_native_here(config):
            return
        self._thread.join()
        if self._context is not None:
            self._context.release()

    def _import(self) -> None:
        from zimage_runner.weights.preload.gil import switch_as_usual, switch_quickly

        switch_quickly()
        try:
            from zimage_runner.weights.preload.cuda_driver import torch_is_cpu_only

            if sees_gpu() and not torch_is_cpu_only():
                from zimage_runner.weights.preload.page_cache import CudaContext

                self._context = CudaContext(pin=True)
            import zimage_runner.runner.execute  # noqa: F401 - the main thread needs it first
            from zimage_runner.engines.threads import wait_passively

            wait_passively()
            load_libraries("torch")
            importlib.import_module("torch")
        except Exception as error:  # the main thread gets it when it imports the same
            import logging

            logging.getLogger(__name__).debug("cannot import ahead: %s", error)
        finally:
            gc.enable()  # switched off when the process began
            switch_as_usual()


def _is_native_here(config: RunConfig) -> bool:
    """Whether the native engine will draw on the GPU, in this process."""
    here = ("InlineExecutorConfig", "ResidentExecutorConfig" if is_resident() else "")
    if type(config.executor).__name__ not in here or config.engine.device.value == "cpu":
        return False
    takes_native = getattr(config.engine, "takes_native", None)
    if takes_native is not None:  # engine=auto
        return takes_native(config.model, config.memory, config.compile)
    return type(config.engine).__name__ == "NativeEngine"
