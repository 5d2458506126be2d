"""A Hugging Face dataset saved on disk, read with pyarrow alone (extra: parquet).

``save_to_disk`` writes Arrow stream files and a state.json that lists them. Reading these directly needs neither the
datasets library (seconds to import) nor anything it may run or download.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from zimage_runner.errors import UserError
from zimage_runner.model import FREE_TEXT
from zimage_runner.outputs.parsed import from_json
from zimage_runner.prompts.arrow import import_pyarrow, rows, text_columns
from zimage_runner.prompts.base import INPUT, Prompt
from zimage_runner.prompts.rows import RowReader, TableSource
from zimage_runner.prompts.text import shown


@dataclass(kw_only=True, slots=True)
class HfDataset(TableSource):
    """``prompts=hf_dataset prompts.path=DIR``: what ``dataset.save_to_disk(DIR)`` wrote."""

    path: str | None = field(default=None, metadata=INPUT | FREE_TEXT)
    """The folder; relative to where the program is started."""
    split: str | None = None
    """Which split of a DatasetDict; null when there is only one."""

    def read(self) -> Iterator[Prompt]:
        directory = self._split_directory(self._directory())
        files = _data_files(directory)
        pyarrow = import_pyarrow("hf_dataset")
        reader, name = RowReader(self, directory), shown(directory)
        number = 0
        for file in files:
            if not os.path.isfile(file):  # a named pipe would be waited for
                raise UserError(f"prompts.path={shown(file)} cannot be read: there is no such file")
            try:
                with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as stream:
                    columns = text_columns(stream.schema, name)
                    reader.check_header(tuple(columns), name)
                    for batch in stream:
                        for row in rows(batch.select(columns), name, number):
                            number += 1
                            yield reader.prompt(row, f"{name}:{number}")
            except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
                problem = (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError(f"prompts.path={shown(file)} cannot be read: {problem}") from None

    def _directory(self) -> Path:
        if not self.path:
            raise UserError("prompts.path is not set: prompts=hf_dataset needs prompts.path=DIRECTORY")
        directory = Path(self.path).expanduser()
        if not directory.is_dir():
            raise UserError(f"prompts.path={self.path} is not a directory: give what dataset.save_to_disk wrote")
        return directory

    def _split_directory(self, directory: Path) -> Path:
        listing = directory / "dataset_dict.json"
        if not listing.is_file():
            return directory
        splits = _read_json(listing).get("splits") or []
        name = splits[0] if self.split is None and len(splits) == 1 else self.split
        if name not in splits:
            raise UserError(f"prompts.split={name}: the dataset's splits are {', '.join(map(str, splits))}: name one")
        return directory / str(name)


def _data_files(directory: Path) -> list[Path]:
    state_file = directory / "state.json"
    if not state_file.is_file():
        raise UserError(f"prompts.path={directory} holds no saved dataset: write one with dataset.save_to_disk(DIR)")
    state = _read_json(state_file)
    names = [entry.get("filename") for entry in state.get("_data_files") or [] if isinstance(entry, dict)]
    plain = all(isinstance(name, str) and name.isprintable() and Path(name).name == name for name in names)
    if not names or not plain or state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(f"{state_file}: not as datasets >= 2 writes it: save the dataset again with save_to_disk")
    return [directory / str(name) for name in names]


def _read_json(path: Path) -> dict:
    try:
        value = from_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value
