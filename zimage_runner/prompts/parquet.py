"""Parquet tables, read batch by batch through pyarrow (extra: parquet)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from zimage_runner.errors import UserError
from zimage_runner.model import FREE_TEXT
from zimage_runner.prompts.arrow import import_pyarrow, rows, text_columns
from zimage_runner.prompts.base import INPUT, Prompt
from zimage_runner.prompts.carried import warn_binary
from zimage_runner.prompts.rows import RowReader, TableSource
from zimage_runner.prompts.text import input_path, open_input, shown

_ROWS_AT_ONCE = 4096


@dataclass(kw_only=True, slots=True)
class Parquet(TableSource):
    """``prompts=parquet prompts.path=FILE``; rows are numbered from 1 in messages."""

    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)

    path: str | None = field(default=None, metadata=INPUT | FREE_TEXT)
    """The file; relative to where the program is started."""

    def read(self) -> Iterator[Prompt]:
        file = input_path(self.path, "parquet")
        with open_input(file):
            pass  # a missing file is reported before a missing library
        pyarrow = import_pyarrow("parquet")
        reader, name = RowReader(self, file.parent), shown(file)
        try:
            with open_input(file) as stream, pyarrow.parquet.ParquetFile(stream) as table:
                columns = text_columns(table.schema_arrow, name)
                reader.check_header(tuple(columns), name)
                leaves, number = _leaves(table.schema, columns, name), 0
                for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=leaves):
                    for row in rows(batch, name, number):
                        number += 1
                        yield reader.prompt(row, f"{name}:{number}")
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            problem = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"prompts.path={name} is not a Parquet file: {problem}") from None


def _leaves(schema: Any, columns: list[str], name: str) -> list[str]:
    """Paths of what is read of these columns: not the pictures within them (a data set's ``image.bytes``)."""
    paths, binaries = [], []
    for column in (schema.column(n) for n in range(len(schema))):
        binary = (
            column.physical_type in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")
            and column.logical_type.type == "NONE"
            and column.converted_type == "NONE"
        )
        of_columns = any(column.path == one or column.path.startswith(f"{one}.") for one in columns)
        if of_columns:
            (binaries if binary and column.path not in columns else paths).append(column.path)
    warn_binary(binaries, name)
    return paths
