"""Many prompt files at once."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from zimage_runner.errors import UserError
from zimage_runner.model import FREE_TEXT
from zimage_runner.prompts.base import INPUT, Prompt
from zimage_runner.prompts.csv_file import Csv
from zimage_runner.prompts.jsonl import Jsonl
from zimage_runner.prompts.parquet import Parquet
from zimage_runner.prompts.rows import TableSource
from zimage_runner.prompts.text import check_text, decode_whole, shown
from zimage_runner.prompts.text_file import TextFile

_TABLES = {".jsonl": Jsonl, ".json": Jsonl, ".csv": Csv, ".tsv": Csv, ".tab": Csv, ".parquet": Parquet}


@dataclass(kw_only=True, slots=True)
class FileGlob(TableSource):
    """``prompts=files prompts.glob='captions/**/*.txt'``: every match, sorted, each read as its extension says."""

    glob: str | None = field(default=None, metadata=INPUT | FREE_TEXT)
    """Pattern; ** descends into folders."""
    whole: bool = False
    """Each text file is one prompt (its name is the prompt's id), not one prompt a line."""
    flags: bool = True
    """As in prompts=text_file."""

    def read(self) -> Iterator[Prompt]:
        for file in self._matches():
            table = _TABLES.get(file.suffix.lower())
            if table:
                yield from table(path=str(file), columns=self.columns, metadata=self.metadata).read()
            elif self.whole:
                yield Prompt(text=check_text(decode_whole(file), shown(file)), source=shown(file), id=self._id(file))
            else:
                yield from TextFile(path=str(file), flags=self.flags).read()

    def _matches(self) -> list[Path]:
        if not self.glob:
            raise UserError("prompts.glob is not set: prompts=files needs prompts.glob='captions/*.txt'")
        pattern = str(Path(self.glob).expanduser())
        files = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
        if not files and Path(pattern).is_dir():
            raise UserError(
                f"prompts.glob={self.glob} is a folder: say which files in it, '{Path(self.glob) / '*.txt'}'"
            )
        if not files:
            raise UserError(f"prompts.glob={self.glob} matches no file (looked from {Path.cwd()})")
        return files

    def _id(self, file: Path) -> str:
        """Path below the pattern's fixed part, without the extension: unique among the matches of one extension."""
        fixed = _fixed_part(str(Path(self.glob or "").expanduser()))
        return shown(file.relative_to(fixed).with_suffix("") if file.is_relative_to(fixed) else file.stem)


def _fixed_part(pattern: str) -> Path:
    parts = Path(pattern).parts
    magic = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:magic])
