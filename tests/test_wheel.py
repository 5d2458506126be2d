"""The wheel holds everything: installed into a fresh environment it draws the quickstart, far from the checkout."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_size(wheel: Path) -> None:
    assert wheel.stat().st_size <= 40e6


def test_quickstart_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False, symlinks=True)
    site = next(environment.glob("lib/python*/site-packages"))
    installer = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(installer, check=True, capture_output=True)
    # The dependencies are this environment's; .pth files in there, such as the editable install's, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    python = environment / "bin" / "python"
    where = [python, "-c", "import zimage_runner; print(zimage_runner.__file__)"]
    found = subprocess.run(where, check=True, capture_output=True, text=True, cwd=elsewhere, encoding="utf-8").stdout
    assert Path(found.strip()).is_relative_to(site)
    command = [python, "-m", "zimage_runner", "+experiment=quickstart", "seeds=1", "warmup=none"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert len(list(elsewhere.glob("outputs/quickstart/*/items/*/seed_1/image.png"))) >= 4
