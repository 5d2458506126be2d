"""The text encoder's table of token vectors, left in the file where it was published.

A caption reads some hundred of its 151,936 rows. On a device the whole table would take 0.8 GB, and be read and copied
there at every start.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from zimage_runner.engines.native.loading import tensor_files
from zimage_runner.errors import UserError
from zimage_runner.weights.formats.decode import TORCH_DTYPES, PublishedTensor, StoredTensor
from zimage_runner.weights.formats.files import open_stored
from zimage_runner.weights.formats.source import source_component
from zimage_runner.weights.io import read_exactly
from zimage_runner.weights.prepared.names import canonical

NAME = "embed_tokens.weight"


class TokenTable:
    """Vectors of tokens, read when a caption needs them."""

    def __init__(self, folder: Path, rows: int, columns: int, dtype: torch.dtype) -> None:
        """``folder``: the published text encoder. ``rows`` and ``columns``: what its config.json says.

        Raises UserError where the table is missing or of another shape.
        """
        self._columns, self._dtype = columns, dtype
        self._table = published_table(folder)
        if self._table.shape != (rows, columns):
            found = list(self._table.shape)
            raise UserError(f"text_encoder: {NAME} has shape {found}, its config.json says {[rows, columns]}")
        # Held open: a run whose model is deleted or replaced meanwhile goes on with what it began with.
        self._file = self._table.stored.path.open("rb", buffering=0)

    def vectors(self, ids: Sequence[int]) -> torch.Tensor:
        """[tokens, columns] on the CPU, new memory. Raises OSError, and UserError for ids that are not in the table."""
        info, rows = self._table.info, self._table.shape[0]
        if ids and max(ids) >= rows:
            raise UserError(f"the tokenizer gives token {max(ids)}, text_encoder's {NAME} has {rows} rows")
        if info is None:  # its rows must be decoded
            decoded = [self._table.elements(token * self._columns, self._columns) for token in ids]
            return torch.stack(decoded).to(self._dtype)
        stored = torch.empty(len(ids), self._columns, dtype=getattr(torch, TORCH_DTYPES[info.dtype]))
        nbytes = info.nbytes // rows
        memory = stored.view(torch.uint8).numpy().data.cast("B")
        for place, token in enumerate(ids):
            row = memory[place * nbytes : (place + 1) * nbytes]
            read_exactly(self._file.fileno(), info.start + token * nbytes, row, self._table.stored.path)
        return stored.to(self._dtype)


def published_table(folder: Path) -> PublishedTensor:
    """Where the table lies: in a file of the folder, or in the file that the folder names. Raises UserError."""
    component = source_component(folder)
    if component is not None:
        return component.tensors[NAME]
    for path in tensor_files(folder):
        for name, info in open_stored(path).tensors.items():
            if canonical("text_encoder", name) == NAME:
                stored = StoredTensor(path, name, info, info.shape)
                return PublishedTensor(NAME, info.shape, stored, 0, stored.rows)
    raise UserError(f"text_encoder: 1 tensor is missing: {NAME}")
