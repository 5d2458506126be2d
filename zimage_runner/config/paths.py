"""Where the package's own configuration lies."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
# conf/ lies inside the package in a wheel and beside it in a checkout or an editable install.
CONFIG_DIR = next(d for d in (PACKAGE / "conf", PACKAGE.parent / "conf") if d.is_dir())
"""The folder of YAML files: one folder for each config group, one file for each of its options."""
