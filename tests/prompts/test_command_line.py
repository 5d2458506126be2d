"""Prompt options as they are typed in docs/prompts.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Cli = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("argv", "pictures"),
    [
        (["prompts=csv", "prompts.path=p.csv", "prompts.columns={text: Caption}", 'prompts.metadata=["*"]'], 2),
        (["prompts=csv", "prompts.path=p.csv", "prompts.columns.text=Caption", "prompts.metadata=[author]"], 2),
        (["prompts=files", "prompts.glob=*.txt", "prompts.limit=3"], 5),
        (["prompts=text_file", "prompts.path=a 猫 (1).txt", "seeds=0-1"], 9),
        (
            ["prompts=text_file", "prompts.path=a 猫 (1).txt", "seeds={count: 2, derive: prompt}", "prompts.shard=1/2"],
            4,
        ),
        (["prompt=a {subject}", "prompts.template.fill={subject: [cat, dog]}"], 2),
        (["prompt=a {subject}", "prompts.template.fill.subject=styles.list"], 2),
        (["prompt=a {red|blue} {subject}", "prompts.template.fill.subject=[x]", "prompts.template.dynamic=true"], 2),
        (['prompts.texts=["a {x}","一只{x}"]', 'prompts.template.fill={x: ["狗 (1)", b, c]}'], 6),
    ],
)
def test_it_works_as_printed(cli: Cli, tmp_path: Path, argv: list[str], pictures: int) -> None:
    (tmp_path / "p.csv").write_text("Caption,author\na,b\nc,d\n", encoding="utf-8")
    (tmp_path / "a 猫 (1).txt").write_text("one\ntwo --d 5,6,7\nthree\nfour\n", encoding="utf-8")
    (tmp_path / "styles.list").write_text("ink\noil\n", encoding="utf-8")
    code, out, err = cli(*argv, "dry_run=true")
    assert code == 0, err
    assert f" {pictures} pictures of" in out


def test_user_experiments_may_set_mappings(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "m.yaml").write_text(
        "# @package _global_\nprompts:\n  texts: ['a {x}']\n  template: {fill: {x: [猫, dog]}}\n"
        "seeds: {count: 3, derive: prompt}\n",
        encoding="utf-8",
    )
    code, out, err = cli("--config-dir", str(tmp_path / "mine"), "+experiment=m", "dry_run=true")
    assert code == 0, err
    assert "6 pictures of 2 prompts" in out
    code, out, err = cli("--config-dir", str(tmp_path / "mine"), "+experiment=m", "seeds=7", "dry_run=true")
    assert code == 0, err
    assert "2 pictures of 2 prompts" in out
