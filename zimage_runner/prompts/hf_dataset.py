"""A Hugging Face dataset saved on disk (extra: datasets). Nothing is downloaded and no dataset script runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_runner.errors import UserError
from zimage_runner.prompts.base import Prompt
from zimage_runner.prompts.rows import RowReader, TableSource


@dataclass(kw_only=True, slots=True)
class HfDataset(TableSource):
    """``prompts=hf_dataset prompts.path=DIR``: what ``dataset.save_to_disk(DIR)`` wrote."""

    path: str | None = None
    split: str | None = None
    """Which split of a DatasetDict; null when there is only one."""

    def read(self) -> Iterator[Prompt]:
        directory = self._directory()
        reader = RowReader(self)
        dataset = self._load(directory)
        names = tuple(dataset.column_names)
        reader.check_header(names, str(directory))
        for number, row in enumerate(dataset, start=1):
            yield reader.prompt(row, f"{directory}:{number}")

    def _directory(self) -> Path:
        if not self.path:
            raise UserError("prompts.path is not set: prompts=hf_dataset needs prompts.path=DIRECTORY")
        directory = Path(self.path).expanduser()
        if not directory.is_dir():
            raise UserError(f"prompts.path={self.path} is not a directory: give what dataset.save_to_disk wrote")
        return directory

    def _load(self, directory: Path) -> Any:
        if not any((directory / name).is_file() for name in ("state.json", "dataset_dict.json")):
            raise UserError(
                f"prompts.path={self.path} holds no saved dataset: write one with dataset.save_to_disk(DIR)"
            )
        try:
            import datasets
        except ImportError:
            raise UserError("prompts=hf_dataset needs datasets: pip install 'zimage-runner[datasets]'") from None
        loaded = datasets.load_from_disk(str(directory))
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        if self.split in loaded:
            return loaded[self.split]
        if self.split is None and len(loaded) == 1:
            return next(iter(loaded.values()))
        raise UserError(f"prompts.split={self.split}: the dataset's splits are {', '.join(loaded)}: name one")
