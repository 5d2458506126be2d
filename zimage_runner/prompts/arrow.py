"""Cells of Arrow tables as Python values: what Python cannot hold becomes text, binary data stays out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zimage_runner.errors import UserError
from zimage_runner.prompts.carried import warn_binary


def import_pyarrow(option: str) -> Any:
    """Return the pyarrow package. Raises UserError that says how to install it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"prompts={option} needs pyarrow: pip install 'zimage-runner[parquet]'") from None
    return pyarrow


def is_binary(kind: Any) -> bool:
    """Return whether a column of this Arrow type is binary data and nothing else."""
    from pyarrow import types

    checks = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
    view = getattr(types, "is_binary_view", None)
    return any(check(kind) for check in checks) or bool(view and view(kind))


def text_columns(schema: Any, where: str) -> list[str]:
    """Return the names of the columns that are not binary, in their order, and warn of the others."""
    binary = [field.name for field in schema if is_binary(field.type)]
    warn_binary(binary, where)
    return [name for name in schema.names if name not in binary]


def rows(batch: Any, name: str, number: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a record batch; ``number`` rows of the file ``name`` were before it.

    Raises UserError, and ArrowException for a damaged one: its offsets would lead Arrow out of its memory.
    """
    for column in batch.columns:
        _check_offsets(column)
    columns = {column: _values(batch.column(column), column, name, number) for column in batch.schema.names}
    for row in zip(*columns.values(), strict=True):
        yield dict(zip(columns, row, strict=True))


def _check_offsets(array: Any) -> None:
    """Raise ArrowException for a damaged array. Text that is not UTF-8 is told of later, with its place."""
    import pyarrow

    try:
        array.validate(full=True)
    except pyarrow.ArrowInvalid as error:
        bytes_of = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
        if "UTF8" not in str(error) or array.type not in bytes_of:
            raise
        array.view(bytes_of[array.type]).validate(full=True)


def _values(array: Any, column: str, name: str, number: int) -> list[Any]:
    try:
        return array.to_pylist()
    except (ValueError, OverflowError, TypeError):  # which of them Python cannot hold is found one by one
        return [_value(cell, f"{name}:{number + n}: {column}") for n, cell in enumerate(array, start=1)]


def _value(cell: Any, where: str) -> Any:
    """One cell. Times finer than Python's become ISO text with all their digits."""
    import pyarrow

    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"{where}: byte {error.start} (0x{byte:02x}) is not UTF-8: store the column as text") from None
    except (ValueError, OverflowError, TypeError):
        if isinstance(cell, pyarrow.StructScalar):
            return {field: _value(inner, where) for field, inner in cell.items()}
        if isinstance(cell, pyarrow.ListScalar):
            return [_value(inner, where) for inner in cell.values]
        try:
            return cell.cast(pyarrow.string()).as_py().replace(" ", "T", 1)
        except (pyarrow.ArrowException, AttributeError):
            return str(cell.value) if hasattr(cell, "value") else None
