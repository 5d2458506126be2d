"""--help names every option with what it is, and imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from zimage_runner.help import CONFIG_DIR, help_text


def test_every_option_is_listed_and_described() -> None:
    lines = help_text(["--help"]).splitlines()
    for path in CONFIG_DIR.glob("*/*.yaml"):
        entries = [line.split(maxsplit=1) for line in lines if line.startswith(f"    {path.stem} ")]
        assert entries, path
        assert all(len(entry) == 2 for entry in entries), path


def test_options_of_a_config_dir_are_listed(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\n# My cats.\n")
    assert "My cats." in help_text(["--config-dir", str(tmp_path), "--help"])


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['x', '--help']\n"
        "from zimage_runner.__main__ import entry_point\n"
        "try: entry_point()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'hydra', 'omegaconf', 'numpy', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_config_error_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from zimage_runner.cli import main\n"
        "assert main(['sampling.height=x']) == 2\n"
        "assert not {'torch', 'diffusers', 'transformers', 'modelscope', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
