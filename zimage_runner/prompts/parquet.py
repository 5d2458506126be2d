"""Parquet tables, read batch by batch through pyarrow (extra: parquet)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from zimage_runner.errors import UserError
from zimage_runner.prompts.base import Prompt
from zimage_runner.prompts.rows import RowReader, TableSource
from zimage_runner.prompts.text import input_path, open_input

_ROWS_AT_ONCE = 4096


@dataclass(kw_only=True, slots=True)
class Parquet(TableSource):
    """``prompts=parquet prompts.path=FILE``; rows are numbered from 1 in messages."""

    path: str | None = None
    """The file; relative to where the program is started."""

    def read(self) -> Iterator[Prompt]:
        file = input_path(self.path, "parquet")
        with open_input(file):
            pass  # a missing file is told before a missing library
        pyarrow = import_pyarrow("parquet")
        reader = RowReader(self)
        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                names = table.schema_arrow.names
                reader.check_header(tuple(names), str(file))
                number = 0
                for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE):
                    for row in batch.to_pylist():
                        number += 1
                        yield reader.prompt(row, f"{file}:{number}")
        except pyarrow.ArrowException as error:
            raise UserError(f"prompts.path={file} is not a Parquet file: {str(error).splitlines()[0]}") from None


def import_pyarrow(option: str) -> Any:
    """The pyarrow package, or a UserError that says how to get it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"prompts={option} needs pyarrow: pip install 'zimage-runner[parquet]'") from None
    return pyarrow
