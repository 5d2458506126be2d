"""Adapters as prompts name them: tags in texts, columns of tables, flags of lines, words of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zimage_runner.cli.quoting import quote_free_text
from zimage_runner.errors import UserError
from zimage_runner.prompts import read_prompts
from zimage_runner.prompts.csv_file import Csv
from zimage_runner.prompts.inline import Inline
from zimage_runner.prompts.jsonl import Jsonl
from zimage_runner.prompts.loras import parse_lora, take_tags
from zimage_runner.prompts.prompt import LoraWord, Prompt
from zimage_runner.prompts.snapshot import Snapshot, snapshot
from zimage_runner.prompts.text_file import TextFile


@pytest.mark.parametrize(
    ("text", "left", "loras"),
    [
        ("a cat <lora:style:0.8>", "a cat", [("style", 0.8)]),
        ("<lora:style:.5> a cat", "a cat", [("style", 0.5)]),
        ("<lora:style:1>, a cat", "a cat", [("style", 1.0)]),
        ("a cat, <lora:style:-0.3>, neon", "a cat, neon", [("style", -0.3)]),
        ("a cat, <lora:a:1><lora:b:0.2>", "a cat", [("a", 1.0), ("b", 0.2)]),
        ("a cat <lora:sub/my style:2> sleeps.", "a cat sleeps.", [("sub/my style", 2.0)]),
        ("a cat<lora:style>.", "a cat.", [("style", 1.0)]),
        ("一只猫<lora:水墨:0.8>，霓虹", "一只猫 ，霓虹", [("水墨", 0.8)]),
        ("a (cat) <3 dogs", "a (cat) <3 dogs", []),
    ],
)
def test_tags_are_taken_out_of_the_text(text: str, left: str, loras: list[tuple[str, float]]) -> None:
    (prompt,) = read_prompts(Inline(texts=[text]), lora_tags=True)
    assert (prompt.text, list(prompt.loras)) == (left, loras)


@given(st.text(st.characters(exclude_characters="<>"), max_size=20), st.text(max_size=20), st.floats(-9, 9))
def test_nothing_but_the_tag_goes(before: str, after: str, weight: float) -> None:
    prompt = Prompt(text=f"x{before} <lora:n:{weight:.3f}> {after}".replace("<lora:n:-0.000>", "<lora:n:0.000>"))
    taken = take_tags(prompt)
    first = next(iter(taken.loras))
    assert first == ("n", pytest.approx(round(weight, 3), abs=1e-9))
    kept = [c for c in taken.text if not (c.isspace() or c == ",")]
    if len(taken.loras) == 1:
        assert kept == [c for c in f"x{before}{after}" if not (c.isspace() or c == ",")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<lora:style:1>", r"prompts\.texts\[0\]: there is nothing but LoRA tags"),
        ("a cat <lora:style:strong>", r"<lora:style:strong>: one weight is read, <lora:style:0\.8>"),
        ("a cat <lora:style:0.8:0.5>", "one weight is read"),
        ("a cat <lora:style:unet=0.8>", "one weight is read"),
    ],
)
def test_tags_that_mean_something_else_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_prompts(Inline(texts=[text]), lora_tags=True)


def test_columns_flags_and_a_runs_own_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('prompt,lora,network_mul\na,"style:0.8, b.safetensors:-1",\nb,,"0.8,0.4"\nc,x,\n')
    csv = read_prompts(Csv(path=str(tmp_path / "p.csv")))
    assert [list(p.loras) for p in csv] == [[("style", 0.8), ("b.safetensors", -1.0)], [], [("x", 1.0)]]
    assert [p.lora_weights for p in csv] == [(), (0.8, 0.4), ()]
    (tmp_path / "p.txt").write_text("a cat --am 0.8,-0.4 --w 128\na dog --lora style:0.7\n")
    lines = read_prompts(TextFile(path=str(tmp_path / "p.txt")))
    assert [(p.text, p.loras, p.lora_weights) for p in lines] == [
        ("a cat", (), (0.8, -0.4)), ("a dog", (LoraWord("style", 0.7),), ()),
    ]  # fmt: skip
    (tmp_path / "p.jsonl").write_text(
        '{"text": "a", "loras": [{"path": "x, y", "weight": 0.5}, "b:0.25"], "lora_weights": 0.5}\n'
    )
    rows = read_prompts(Jsonl(path=str(tmp_path / "p.jsonl")))
    assert [(list(p.loras), p.lora_weights) for p in rows] == [([("x, y", 0.5), ("b", 0.25)], (0.5,))]
    for prompts in (csv, lines, rows):
        (tmp_path / "prompts.jsonl").write_bytes(snapshot(prompts))
        again = read_prompts(Snapshot(path=str(tmp_path / "prompts.jsonl")))
        assert [(p.text, p.loras, p.lora_weights) for p in again] == [
            (p.text, p.loras, p.lora_weights) for p in prompts
        ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": "a", "loras": 3}', "loras=3 is neither a text nor a list: write style.safetensors:0.8"),
        ('{"text": "a", "loras": [3]}', "loras: 3 names no adapter: write style.safetensors:0.8"),
        ('{"text": "a", "loras": [{"path": "x", "wieght": 1}]}', "names no adapter"),
        ('{"text": "a", "loras": [{"path": "x", "weight": true}]}', "names no adapter"),
        ('{"text": "a", "loras": "x,,y"}', "loras='' names no adapter file"),
        ('{"text": "a", "lora_weights": "strong"}', "lora_weights=strong: give a weight for each of the run's loras"),
        ('{"text": "a", "lora_weights": [true]}', "give a weight for each"),
        ('{"text": "a", "lora_weights": [1e999]}', "give a weight for each"),
    ],
)
def test_cells_that_are_refused(row: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(row + "\n")
    with pytest.raises(UserError) as error:
        read_prompts(Jsonl(path=str(tmp_path / "p.jsonl")))
    assert "p.jsonl:1: " in str(error.value)
    assert message in str(error.value)


def words(value: str, multirun: bool = False) -> Any:
    """What Hydra makes of ``loras=value``: the list, or in a multirun the lists."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (override,) = OverridesParser.create().parse_overrides(quote_free_text([f"loras={value}"], multirun))
    return list(override.sweep_iterator()) if multirun and override.is_sweep_override() else override.value()


@pytest.mark.parametrize(
    ("value", "entries"),
    [
        ("[style.safetensors:0.8]", [("style.safetensors", 0.8)]),
        ("style.safetensors:0.8", [("style.safetensors", 0.8)]),
        ("[a:0.8, b:-0.3,c]", [("a", 0.8), ("b", -0.3), ("c", 1.0)]),
        ('["my style (v2), new.safetensors:0.5"]', [("my style (v2), new.safetensors", 0.5)]),
        ('["my style":0.5]', [("my style", 0.5)]),
        ("[~/loras/a.safetensors:1e-1]", [("~/loras/a.safetensors", 0.1)]),
        ("[水墨.safetensors:0.8]", [("水墨.safetensors", 0.8)]),
        ("[C:/loras/a:0.8]", [("C:/loras/a", 0.8)]),
        ("[{path: my style.safetensors, weight: 0.8}]", [("my style.safetensors", "0.8")]),
        ("[]", []),
    ],
)
def test_the_command_lines_short_form(value: str, entries: list[tuple[str, Any]]) -> None:
    assert words(value) == [{"path": path, "weight": weight} for path, weight in entries]


def test_a_sweep_over_sets() -> None:
    swept = words("[a:0.8],[b:0.5,c:1],[]", multirun=True)
    assert [[(str(entry["path"].text), entry["weight"]) for entry in entries] for entries in swept] == [
        [("a", 0.8)], [("b", 0.5), ("c", 1.0)], [],
    ]  # fmt: skip


@pytest.mark.parametrize("value", ["a:1,b:1", "[a:1", "['a':1", "[,a]"])
def test_short_forms_that_are_refused(value: str) -> None:
    with pytest.raises(UserError, match=r"^loras=.*: write 'loras=\[style\.safetensors:0\.8"):
        words(value)


@given(name=st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1), weight=st.floats(-100, 100))
def test_what_is_written_is_read(name: str, weight: float) -> None:
    assert parse_lora(f"{name}:{weight!r}", "x") == (name, weight)
