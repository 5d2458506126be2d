"""What README and docs/howto.md tell people to type is composed as printed; links on every page lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from tests.support.loras import written
from zimage_runner.cli.commands import MODULES
from zimage_runner.weights.safetensors_file import create

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("", "docs", "benchmarks", "training", "training/results", "zimage_runner/assets/zimage_nano")
    for path in (ROOT / folder).glob("*.md")
)
COMMAND = "python -m zimage_runner "
NOT_HERE = ("resume=", "--help", "--cfg", "$run", "prompts=stdin")
"""Lines that need an earlier run, or are told elsewhere."""
NOTICES = ("no GPU is seen here", "prompts replaces prompt: left out prompt of experiment/turbo.yaml")
"""What the commands rightly say on this machine, and of the experiment's own prompt."""
FILE = "mine.safetensors"
"""The file of weights that the pages draw from."""
PROMPTS = "\n".join(f"a cat number {number}" for number in range(300))


def commands() -> list[str]:
    found = []
    for page in (ROOT / "README.md", ROOT / "docs" / "howto.md"):
        for block in re.findall(r"```\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            for line in block.splitlines():
                _, command, words = line.partition(COMMAND)
                if command and words.split()[0] not in MODULES and not any(sign in words for sign in NOT_HERE):
                    found.append(words)
    return sorted(set(found))


@pytest.mark.parametrize("words", commands())
def test_it_is_composed_as_printed(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    example = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert example
    (tmp_path / "my_conf" / "experiment").mkdir(parents=True)
    (tmp_path / "my_conf" / "experiment" / "cats.yaml").write_text(example[1], encoding="utf-8")
    (tmp_path / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    (tmp_path / "prompts.csv").write_text("caption,width,height,category\na cat,768,1024,animals\n", encoding="utf-8")
    write_header(tmp_path / FILE, "x_pad_token")
    write_header(tmp_path / "ae.safetensors", "decoder.conv_in.bias")
    (tmp_path / "loras").mkdir()
    for name in ("style.safetensors", "loras/style.safetensors", "loras/grain.safetensors"):
        factor = torch.full((1, 1), 1.0 + len(name))  # each is another file
        written(tmp_path / name, {f"layers.0.attention.to_q.lora_{half}.weight": factor for half in "AB"})
    argv = [word for word in shlex.split(words, comments=True) if word.partition("model.path=")[2] in ("", FILE)]
    code, out, err = cli(*argv, *([] if "dry_run=true" in argv else ["dry_run=true"]))
    assert code == 0, err
    assert [line for line in err.splitlines() if not any(notice in line for notice in NOTICES)] == []
    assert re.search(r"pictures? of", out)
    assert not (tmp_path / "cat.png").exists()


def write_header(path: Path, name: str) -> None:
    """A safetensors file with one number, which is enough for its kind to be known."""
    create(path, {name: ("F32", (1,))}, {})


def test_there_are_commands() -> None:
    assert len(commands()) > 12


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert broken_links(ROOT / page) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text(
        "# One `two`: three\n## Again\n## Again\n```\n# no heading\n```\n", encoding="utf-8"
    )
    (tmp_path / "page.md").write_text(
        "[a](other.md) [b](other.md#one-two-three) [c](other.md#again-1) [d](https://example.org/x) ![e](gone.png)\n"
        "[f](other.md#no-heading) [g](#nowhere) `[h](code.md)`\n```\n[i](block.md)\n```\n[j](other.md 'a title')\n",
        encoding="utf-8",
    )
    assert broken_links(tmp_path / "page.md") == ["gone.png", "other.md#no-heading", "#nowhere"]


def broken_links(page: Path) -> list[str]:
    """Links of a page to files that are not there, or to headings that their page has not. The web is not asked."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)[^)]*\)", re.sub(r"`[^`\n]*`", "", without_blocks(page))):
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        if re.match(r"[a-z]+:", link):
            continue
        if not target.exists() or (heading and heading not in headings(target)):
            broken.append(link)
    return broken


def headings(page: Path) -> list[str]:
    """How GitHub names a page's headings in links: the second one of a name ends in -1, and so on."""
    names: list[str] = []
    for line in without_blocks(page).splitlines():
        if match := re.match(r"#+ (.*)", line):
            name = re.sub(r"[^\w\- ]", "", match[1].strip().lower()).replace(" ", "-")
            again = sum(1 for other in names if re.fullmatch(re.escape(name) + r"(-[0-9]+)?", other))
            names.append(f"{name}-{again}" if again else name)
    return names


def without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
