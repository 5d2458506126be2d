"""What README and docs/howto.md tell people to type is composed as printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMAND = "python -m zimage_runner "
NOT_HERE = ("resume=", "--help", "--cfg", "$run", "prompts=stdin")
"""Lines that need an earlier run, or are told elsewhere."""
PROMPTS = "\n".join(f"a cat number {number}" for number in range(300))


def commands() -> list[str]:
    found = []
    for page in (ROOT / "README.md", ROOT / "docs" / "howto.md"):
        for block in re.findall(r"```\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            for line in block.splitlines():
                _, command, words = line.partition(COMMAND)
                if command and not any(sign in words for sign in NOT_HERE):
                    found.append(words)
    return sorted(set(found))


@pytest.mark.parametrize("words", commands())
def test_it_is_composed_as_printed(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    example = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert example
    (tmp_path / "my_conf" / "experiment").mkdir(parents=True)
    (tmp_path / "my_conf" / "experiment" / "cats.yaml").write_text(example[1], encoding="utf-8")
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    (tmp_path / "prompts.csv").write_text("caption,width,height,category\na cat,768,1024,animals\n")
    argv = [word for word in shlex.split(words, comments=True) if not word.startswith("model.path=")]
    code, out, err = cli(*argv, *([] if "dry_run=true" in argv else ["dry_run=true"]))
    assert code == 0, err
    assert all("no GPU is seen here" in line for line in err.splitlines())
    assert "pictures of" in out
    assert not (tmp_path / "cat.png").exists()


def test_there_are_commands() -> None:
    assert len(commands()) > 12
