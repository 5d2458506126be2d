"""Where an engine takes its tensors from, begun before torch is imported.

``begin`` starts what can run while torch is being imported: the prepared checkpoint's way to the GPU, or the page
cache's and the CUDA context's. ``settle``, once torch is there, makes the prepared checkpoint on first use;
``tensors`` then hands out each component.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from zimage_runner.errors import UserError
from zimage_runner.model import Device, Dtype, Model, Prepare
from zimage_runner.weights.find.checkpoint import Checkpoint
from zimage_runner.weights.formats.source import source_file
from zimage_runner.weights.preload.cuda_driver import CudaUnavailable, torch_is_cpu_only
from zimage_runner.weights.preload.page_cache import CudaContext, read_ahead
from zimage_runner.weights.preload.pinned_buffers import pinned_ahead
from zimage_runner.weights.preload.preload import Preload
from zimage_runner.weights.prepared import prepared
from zimage_runner.weights.prepared.names import COMPONENTS
from zimage_runner.weights.prepared.prepared import BF16, Prepared
from zimage_runner.weights.safetensors_file import BadWeightsFile

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

TEXT_ENCODER = "text_encoder"


class WeightsSource:
    """A checkpoint's tensors, component by component, by the fastest way this machine has."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: Model,
        found: Prepared | None,
        preload: Preload | None,
        precision: str = BF16,
    ) -> None:
        """``precision``: of the transformer's products, and of the prepared copy."""
        self._checkpoint, self._precision = checkpoint, precision
        self._model = model
        self._prepared = found
        self._preload = preload
        if preload is None:
            pinned_ahead.close()
        self.device = "cpu"
        self.free_bytes: int | None = None
        """On the GPU before the weights' way there began, once settled; None where it was not read."""

    def settle(self, device: str, dtype: str) -> None:
        """Decide between the prepared and the published files, now that device and compute dtype are known.

        Makes the prepared checkpoint on first use if ``model.prepare`` says so.
        """
        self.device = device
        if self._prepared is not None:  # found, and its digests checked, before torch was there
            if dtype != "bfloat16" and not self._prepared.is_lossless:
                self._prepared = None
        elif device == "cuda":
            from zimage_runner.weights.prepared.prepare import ensure_prepared

            self._prepared = ensure_prepared(self._checkpoint, self._model, dtype, self._precision)
        if self._preload is None:
            return
        self.free_bytes = self._preload.free_bytes() if device == "cuda" else None
        if device != "cuda" or self._prepared is None or self._preload.does_not_fit:
            self._preload.close()
            self._preload = None

    @property
    def path(self) -> Path:
        """The directory whose configs, tokenizer and scheduler go with the tensors."""
        return self._checkpoint.path if self._prepared is None else self._prepared.path

    @property
    def is_travelling(self) -> bool:
        """Whether the prepared checkpoint is on its way to the GPU: each component is there some time after another."""
        return self._preload is not None

    def tensors(self, component: str) -> dict[str, torch.Tensor] | None:
        """A prepared component's tensors on the device; None when the published files are to be read instead."""
        if self._prepared is None:
            return None
        file, packing = self._prepared.weights[component], self._prepared.packings.get(component)
        if self.device != "cuda" and packing is None:  # mapped, and read when they are touched
            return None
        if self._preload is not None and file.path in self._preload:
            from zimage_runner.weights.load import tensor_views

            try:
                unpacked = file if packing is None else packing.unpacked
                return dict(tensor_views(unpacked, _wrap(self._preload, file.path)))
            except (CudaUnavailable, OSError, RuntimeError) as error:
                log.warning("weights are loaded the slow way: %s", error)
                self._preload.close()  # what failed for one file fails for all
        from zimage_runner.weights.load import load_tensors

        try:
            return load_tensors([file.path], self.device)
        except BadWeightsFile as error:
            remedy = f"delete {self._prepared.path}, and it is made again"
            raise UserError(f"{file.path} is damaged: {error}: {remedy}") from error


def begin(
    checkpoint: Checkpoint,
    model: Model,
    device: Device,
    encodes: bool = True,
    precision: str = BF16,
    fits: Callable[[int], bool] | None = None,
) -> WeightsSource:
    """Start what can be started without torch, and return at once. ``encodes``: the text encoder is wanted too.

    ``fits``, where given, says whether all is to be on the GPU together, with so many bytes free there.
    """
    wants_gpu = device is not Device.cpu and not torch_is_cpu_only()
    found = None if model.prepare is Prepare.never else prepared.find(checkpoint, model, precision=precision)
    preload = None
    if wants_gpu and found is not None and model.dtype in (Dtype.auto, Dtype.bfloat16):
        files = [file for name, file in found.weights.items() if encodes or name != TEXT_ENCODER]
        packings = {packing.unpacked.path: packing for packing in found.packings.values()}
        ranges = [(file.path, file.data_start, file.size - file.data_start) for file in files]
        preload = Preload(ranges, packings=packings, fits=fits)
    elif wants_gpu:
        CudaContext()
        folders = [checkpoint.path / name for name in COMPONENTS if encodes or name != TEXT_ENCODER]
        files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
        read_ahead([*dict.fromkeys(file for folder in folders if (file := source_file(folder))), *files])
    return WeightsSource(checkpoint, model, found, preload, precision)


def _wrap(preload: Preload, path: Path) -> torch.Tensor:
    """The file's bytes as a uint8 tensor that keeps their memory alive."""
    import torch

    return torch.as_tensor(preload.take(path), device="cuda")
