"""A gate before each picture, whatever process draws it: how far a run gets is no matter of which process is faster."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Gate:
    """Sessions with ``environment`` draw while the run in ``folder`` has fewer lines in its ledger than were let in."""

    def __init__(self, folder: Path, lines: int) -> None:
        self.folder = folder
        self._file = folder / "gate"
        self.environment = {"FAULTS_GATE": str(self._file), "FAULTS_GATE_RUN": str(folder / "run")}
        self.let(lines)

    @property
    def variables(self) -> dict[str, str]:
        """``environment`` as Run.start takes it."""
        return {name.removeprefix("FAULTS_"): value for name, value in self.environment.items()}

    def let(self, lines: int) -> None:
        """Let the ledger grow to so many lines, and a few more: those of pictures that are past the gate."""
        new = self._file.with_suffix(".new")
        new.write_text(str(lines), encoding="utf-8")
        new.replace(self._file)  # whoever reads it meanwhile reads a whole number


def wait_at_gate() -> None:
    """Return when another picture may be drawn; at once without a gate."""
    while gate := os.environ.get("FAULTS_GATE"):
        if ledger_lines(Path(os.environ["FAULTS_GATE_RUN"])) < int(Path(gate).read_text(encoding="utf-8")):
            return
        time.sleep(0.005)


def ledger_lines(run_dir: Path) -> int:
    """Return how many lines the ledger has."""
    try:
        return (run_dir / "records.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0
