"""--help names every option with what it is, and imports nothing heavy."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from zimage_runner import __version__
from zimage_runner.__main__ import _run
from zimage_runner.cli.help import RUN, help_text
from zimage_runner.config.paths import CONFIG_DIR
from zimage_runner.config.registry import SCHEMAS
from zimage_runner.config.schema import RunConfig


def test_every_option_is_listed_and_described() -> None:
    lines = help_text(["--help"]).splitlines()
    for path in CONFIG_DIR.glob("*/*.yaml"):
        entries = [line.split(maxsplit=1) for line in lines if line.startswith(f"    {path.stem} ")]
        assert entries, path
        assert all(len(entry) == 2 for entry in entries), path


def test_exit_codes_and_completion_are_told() -> None:
    text = help_text(["--help"])
    assert "\nExit codes: 0 all items done, 1 some items failed, 2 bad config or input, 130 interrupted" in text
    assert "--shell-completion install=bash" in text


def test_options_of_a_config_dir_are_listed(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\n# My cats.\n", encoding="utf-8")
    assert "My cats." in help_text(["--config-dir", str(tmp_path), "--help"])


@pytest.mark.parametrize("word", [*SCHEMAS, RUN, *(f"{g}={name}" for g, all_ in SCHEMAS.items() for name in all_)])
def test_a_groups_fields_are_told_with_default_and_meaning(word: str) -> None:
    group, _, option = word.partition("=")
    chosen = [RunConfig] if group == RUN else [s for name, s in SCHEMAS[group].items() if option in ("", name)]
    lines = help_text(["--help", word]).splitlines()
    for schema in chosen:
        for field in dataclasses.fields(schema):
            if field.name in SCHEMAS:
                continue
            name = field.name if group == RUN else f"{group}.{field.name}"
            told = [n for n, line in enumerate(lines) if re.match(rf"  {re.escape(name)}[=.:]", line)]
            assert told, name
            if "(" not in lines[told[0]] and name != "model.name" and f"{name}." not in lines[told[0]]:
                assert ": " in lines[told[0]] or lines[told[0] + 1].startswith("      "), name


def test_defaults_are_shown_as_one_types_them() -> None:
    text = help_text(["--help", "output=folders", "run"])
    for line in ("output.fsync=item    (never, run, item)", "output.metadata=true", "  prompt=null", "  seeds=42"):
        assert line in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["--version"]) == 0
    assert capsys.readouterr().out == f"zimage_runner {__version__}\n"


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
        "from zimage_runner.cli.main import main\n"
        "assert main(['sampling.height=x']) == 2\n"
        "assert not {'torch', 'diffusers', 'transformers', 'modelscope', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_what_is_no_group_of_fields(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/cats.yaml").write_text("# @package _global_\n# Mine.\nprompt: a\n", encoding="utf-8")
    text = help_text(["--help", "experiment", f"--config-dir={tmp_path}"])
    assert re.search(r"^    quickstart +Pictures in seconds", text, re.M)
    assert re.search(r"^    cats +Mine.$", text, re.M)
    assert re.search(r"^  continue=null\n +Begin the run", help_text(["--help", "run"]), re.M)


@pytest.mark.parametrize("words", [["--help", "foo"], ["foo", "-h"]])
def test_the_name_of_no_group_is_refused(words, capsys):
    from zimage_runner import __main__

    assert __main__._run(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("zimage_runner: --help foo: no such group; the groups are run, model, engine")


@pytest.mark.parametrize("words", [["--help", "prompt=a"], ["--config-dir", "mine", "--help"], ["-h", "a.b"]])
def test_other_words_beside_help(words, capsys):
    from zimage_runner import __main__

    assert __main__._run(words) == 0
    assert capsys.readouterr().out.startswith("zimage_runner: batches of pictures")


def test_information_that_is_not_read_to_its_end():
    command = f"{sys.executable} -m zimage_runner --info defaults-tree | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, encoding="utf-8")
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr
