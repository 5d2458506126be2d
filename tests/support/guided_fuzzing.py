"""``python -m tests.support.guided_fuzzing READER FOLDER SECONDS``: fuzzing guided by coverage, with atheris."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris  # pyright: ignore[reportMissingImports]  # optional: pip install atheris

with atheris.instrument_imports(include=["zimage_runner"]):  # pyright: ignore[reportAttributeAccessIssue]
    from tests.support.readers import READERS


def main() -> None:
    """Exit code 0 when the time is up, another one where a reader raised what it may not."""
    name, folder, seconds = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    reader, good, corpus = READERS[name], folder / "good", folder / "corpus"
    good.mkdir()
    corpus.mkdir()
    reader.write(good)
    for n, file in enumerate(reader.files):
        (corpus / str(n)).write_bytes(bytes([n]) + (good / file).read_bytes())

    def one(data: bytes) -> None:
        if data:  # the first byte says which file
            file = reader.files[data[0] % len(reader.files)]
            reader.try_one(folder / "tried", good, file, data[1:])

    options = [f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=4000", f"-artifact_prefix={folder}/"]
    atheris.Setup([sys.argv[0], str(corpus), *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
