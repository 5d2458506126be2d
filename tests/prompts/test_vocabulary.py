"""Words of other programs: as columns, in mappings, as flags, on the command line and in experiments."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from tests.support.prompt_inputs import save_dataset
from zimage_runner.config.registry import SCHEMAS
from zimage_runner.errors import UserError
from zimage_runner.prompts import read_prompts
from zimage_runner.prompts.base import RowSource, Wins
from zimage_runner.prompts.csv_file import Csv
from zimage_runner.prompts.files import FileGlob
from zimage_runner.prompts.flags import FLAGS
from zimage_runner.prompts.folder import Folder
from zimage_runner.prompts.hf_dataset import HfDataset
from zimage_runner.prompts.images import Images
from zimage_runner.prompts.jsonl import Jsonl
from zimage_runner.prompts.parquet import Parquet
from zimage_runner.prompts.rows import PROMPT_FIELDS
from zimage_runner.prompts.stdin import Stdin
from zimage_runner.prompts.text_file import TextFile
from zimage_runner.prompts.vocabulary import CFG_NAMES, FIELD_OF, LETTERS, guidance_of_cfg, in_our_words, meant
from zimage_runner.sampling import SAMPLING_FIELDS

SAMPLES = {"width": 128, "height": 64, "num_inference_steps": 3, "negative_prompt": "red", "guidance_scale": 2.0}


def csv(tmp_path, content: str, **options) -> Csv:
    (tmp_path / "p.csv").write_text(content, encoding="utf-8")
    return Csv(path=str(tmp_path / "p.csv"), **options)


def message(source) -> str:
    with pytest.raises(UserError) as caught:
        read_prompts(source)
    return str(caught.value)


def test_every_word_means_a_field():
    assert {*FIELD_OF.values(), *LETTERS.values()} <= set(PROMPT_FIELDS)
    assert not set(FIELD_OF) & {*PROMPT_FIELDS, *LETTERS}
    assert set(FIELD_OF) <= set(FLAGS)
    assert set(SAMPLING_FIELDS) <= set(FLAGS)
    assert set(FIELD_OF) >= CFG_NAMES


@pytest.mark.parametrize("word", sorted(w for w, f in FIELD_OF.items() if f in SAMPLES))
def test_a_word_means_the_same_as_column_mapping_and_flag(tmp_path, word):
    name = FIELD_OF[word]
    given = SAMPLES[name] + 1 if word in CFG_NAMES else SAMPLES[name]
    (column,) = read_prompts(csv(tmp_path, f"prompt,{word}\na,{given}\n"))
    (mapped,) = read_prompts(csv(tmp_path, f"prompt,my own\na,{given}\n", columns={word: "my own"}))
    (tmp_path / "p.txt").write_text(f"a --{word.replace('_', '-')} {given}\n", encoding="utf-8")
    (flag,) = read_prompts(TextFile(path=str(tmp_path / "p.txt")))
    assert column.overrides == mapped.overrides == flag.overrides == {name: SAMPLES[name]}


def test_what_columns_are_read_as_is_told_once(tmp_path, caplog):
    rows = 'prompt,steps,cfg,negative,seed,W,h\na,2,3,"b, c",1,128,64\nd,,1,,,,\n'
    source = csv(tmp_path, rows)
    first, second = read_prompts(source)
    assert first.overrides == {
        "num_inference_steps": 2, "guidance_scale": 2.0, "negative_prompt": "b, c", "width": 128, "height": 64,
    }  # fmt: skip
    assert second.overrides == {"guidance_scale": 0.0}
    assert [r.getMessage() for r in caplog.records] == [
        f"{source.path}:1: column steps is read as num_inference_steps, negative is read as negative_prompt",
        f"{source.path}:1: cfg is other tools' CFG scale, where 1 is no guidance: guidance_scale = cfg - 1",
    ]


@pytest.mark.parametrize(
    ("column", "field"),
    [
        ("n", "negative_prompt"), ("s", "num_inference_steps"), ("d", "seeds"), ("l", "guidance_scale"),
        ("Steps", "num_inference_steps"), ("CFG Scale", "guidance_scale"), ("Negative prompt", "negative_prompt"),
        ("Seed", "seeds"), ("Prompt", "text"), ("stepz", "steps"),
    ],
)  # fmt: skip
def test_columns_that_may_mean_something_else_are_asked_about(tmp_path, column, field):
    told = message(csv(tmp_path, f"text,{column}\na,1\n"))
    assert (
        f"p.csv:1: unknown column {column!r} (did you mean {field!r}?); map it with prompts.columns, or carry" in told
    )
    assert read_prompts(csv(tmp_path, f"text,{column}\na,1\n", metadata=["*"]))[0].metadata == {column: "1"}


def test_a_carried_column_stays_one(tmp_path):
    (prompt,) = read_prompts(csv(tmp_path, "text,width,w,steps\na,16,9,4\n", metadata=["*"]))
    assert (prompt.overrides, prompt.metadata) == ({"width": 16, "num_inference_steps": 4}, {"w": "9"})
    (prompt,) = read_prompts(csv(tmp_path, "text,steps\na,4\n", metadata=["steps"]))
    assert (prompt.overrides, prompt.metadata) == ({}, {"steps": "4"})
    assert "columns width and w both give width: keep one" in message(csv(tmp_path, "text,width,w\na,16,9\n"))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"caption": "text"}, "prompts.columns.caption=text is the wrong way round: write prompts.columns="
         "'{text: caption}', the field first"),
        ({"prompt": "text"}, "p.csv:1: prompts.columns.text=text: no such column; the columns are prompt, x (the field "
         "stands first: prompts.columns='{text: prompt}')"),
        ({"steps": "x", "num_inference_steps": "y"}, "prompts.columns gives num_inference_steps twice: keep one"),
        ({"text": "x", "id": "x"}, "prompts.columns names the column 'x' twice: give it to one field"),
        ({"n": "x"}, "prompts.columns.n is not a prompt field (did you mean 'negative_prompt'?)"),
    ],
)  # fmt: skip
def test_mappings_that_cannot_be(tmp_path, columns, expected):
    assert expected in message(csv(tmp_path, "prompt,x\na,1\n", columns=columns))


@pytest.mark.parametrize(("cfg", "guidance"), [(0, 0), (0.5, 0), (1, 0), (1.5, 0.5), (7, 6), (101, 100)])
def test_other_tools_cfg_scale(cfg, guidance):
    assert guidance_of_cfg(cfg) == guidance
    assert in_our_words("cfg", str(cfg)) == f"{guidance:g}"
    assert in_our_words("guidance", str(cfg)) == str(cfg)


def test_a_negative_cfg_scale_stays_out_of_range(tmp_path):
    assert read_prompts(csv(tmp_path, "text,cfg\na,-3\n"))[0].overrides == {"guidance_scale": -3.0}


def test_spellings():
    assert meant("CFG-Scale") == meant(" cfg scale ") == "guidance_scale"
    assert meant("cat") is None


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["steps=4"], "steps: no such field; did you mean sampling.num_inference_steps?\n"),
        (["W=128"], "W: no such field; did you mean sampling.width?\n"),
        (["negative=x"], "negative: no such field; did you mean sampling.negative_prompt?\n"),
        (["sampling.steps=4"], "sampling.steps: no such field; did you mean num_inference_steps?\n"),
        (["cfg=4"], "did you mean sampling.guidance_scale? (one less: other tools' CFG scale 1 is guidance_scale 0)\n"),
        (["sampling.cfg=4"], "did you mean guidance_scale? (one less: other tools' CFG scale 1 is guidance_scale 0)\n"),
        (["--cfg_scale", "4"], "without dashes: sampling.guidance_scale=3\n"),
        (["--steps", "4"], "without dashes: sampling.num_inference_steps=4\n"),
        (["--negative-prompt", "blurry"], "without dashes: sampling.negative_prompt=blurry\n"),
    ],
)
def test_the_command_line_knows_the_same_words(cli, argv, expected):
    code, _, err = cli("prompt=cat", *argv, "dry_run=true")
    assert code == 2
    assert err.endswith(expected)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("steps: 4", "experiment/m.yaml: steps: no such field; did you mean sampling.num_inference_steps?"),
        ("sampling: {steps: 4}", "experiment/m.yaml: sampling.steps: no such field; did you mean num_inference_steps?"),
        ("sampling: {cfg: 4}", "did you mean guidance_scale? (one less: other tools' CFG scale 1 is guidance_scale 0)"),
    ],
)
def test_experiments_know_the_same_words(cli, tmp_path, lines, expected):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "m.yaml").write_text(
        f"# @package _global_\nprompt: a cat\n{lines}\n", encoding="utf-8"
    )
    code, _, err = cli("--config-dir", str(tmp_path / "mine"), "+experiment=m", "dry_run=true")
    assert (code, expected in err) == (2, True), err


@pytest.mark.parametrize(
    ("argv", "steps", "told"),
    [
        ([], 8, None),
        (["sampling.num_inference_steps=4"], 8, "this wins over the command line; prompts.wins=command_line if not"),
        (["sampling.num_inference_steps=4", "prompts.wins=command_line"], 4, "the command line wins"),
        (["prompts.wins=command_line"], 8, None),
        (["prompts.wins=row", "sampling.width=128"], 8, None),
    ],
)
@pytest.mark.parametrize("source", ["jsonl", "files"])
def test_whose_word_holds(cli, tmp_path, source, argv, steps, told):
    (tmp_path / "p.jsonl").write_text('{"text": "a", "steps": 8}\n{"text": "b", "steps": 8}\n', encoding="utf-8")
    (tmp_path / "p.txt").write_text("a --s 8\nb --s 8\n", encoding="utf-8")
    (tmp_path / "p.csv").write_text("text,num_inference_steps\na,8\nb,8\n", encoding="utf-8")
    name = {"jsonl": "p.jsonl", "csv": "p.csv"}.get(source, "p.txt")
    path = f"prompts.{'glob' if source == 'files' else 'path'}={name}"
    code, out, err = cli(f"prompts={source}", path, *argv, "dry_run=true")
    assert code == 0, err
    assert f", {steps} steps" in out
    lines = [line for line in err.splitlines() if "wins" in line]
    first = 2 if source == "csv" else 1
    assert lines == ([f"zimage_runner: {name}:{first} and 1 more set num_inference_steps: {told}"] if told else [])


def test_seeds_of_the_command_line(cli, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": "a", "seeds": [1, 2, 3]}\n', encoding="utf-8")
    argv = ["prompts=jsonl", "prompts.path=p.jsonl", "seeds=7", "dry_run=true"]
    code, out, err = cli(*argv)
    assert (code, "3 pictures" in out) == (0, True)
    assert "p.jsonl:1 sets seeds: this wins over the command line; prompts.wins=command_line if not" in err
    code, out, err = cli(*argv, "prompts.wins=command_line")
    assert (code, "1 picture of" in out) == (0, True)
    assert "p.jsonl:1 sets seeds: the command line wins" in err


def _every_table(folder):
    """Option and source of each kind, of two rows that set steps and seeds."""
    pyarrow = pytest.importorskip("pyarrow")
    columns = {"text": ["a", "b"], "num_inference_steps": [8, 8], "seeds": ["1", "1"]}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "p.csv").write_text("text,num_inference_steps,seeds\na,8,1\nb,8,1\n")
    (folder / "p.tsv").write_text("text\tnum_inference_steps\tseeds\na\t8\t1\nb\t8\t1\n")
    (folder / "p.txt").write_text("a --s 8 --d 1\nb --s 8 --d 1\n")
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "p.parquet")
    save_dataset(folder / "set", columns)
    yield from ((Jsonl, "p.jsonl"), (Csv, "p.csv"), (Csv, "p.tsv"), (TextFile, "p.txt"), (Parquet, "p.parquet"))
    yield from ((FileGlob, f"*.{kind}") for kind in ("jsonl", "csv", "txt", "parquet"))
    yield HfDataset, "set"
    yield Stdin, "p.txt"


@pytest.mark.parametrize("wins", list(Wins))
def test_whose_word_holds_for_every_table(tmp_path, monkeypatch, caplog, wins):
    pytest.importorskip("pyarrow.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("zimage_runner.prompts.stdin._stdin_bytes", lambda: (tmp_path / "p.txt").read_bytes())
    kinds = set()
    for kind, name in _every_table(tmp_path):
        caplog.clear()
        named: dict[str, Any] = {"glob": name} if kind is FileGlob else {} if kind is Stdin else {"path": name}
        prompts = read_prompts(kind(**named, wins=wins, typed=["num_inference_steps", "seeds", "width"]))
        kept = ({"num_inference_steps": 8}, (1,)) if wins is Wins.row else ({}, None)
        assert [(prompt.overrides, prompt.seeds) for prompt in prompts] == [kept] * 2, name
        (line,) = [record.getMessage() for record in caplog.records]
        said = "this wins over the command line; prompts.wins=command_line if not"
        said = said if wins is Wins.row else "the command line wins"
        assert line.endswith(f" and 1 more set num_inference_steps, seeds: {said}"), name
        kinds.add(kind)
    assert kinds | {Images, Folder} == {
        schema for schema in SCHEMAS["prompts"].values() if issubclass(schema, RowSource)
    }


def test_every_source_with_rows_has_the_option():
    have = {
        name for name, schema in SCHEMAS["prompts"].items() if "wins" in {f.name for f in dataclasses.fields(schema)}
    }
    assert have == set(SCHEMAS["prompts"]) - {"inline"}


def test_a_mapping_as_json_writes_it(cli, tmp_path):
    (tmp_path / "p.csv").write_text("caption,no 1\na,b\n", encoding="utf-8")
    for columns in ('{"text":"caption","id":"no 1"}', "{'text': 'caption', id: no 1}", "{text: caption, id: 'no 1'}"):
        code, out, err = cli("prompts=csv", "prompts.path=p.csv", f"prompts.columns={columns}", "dry_run=true")
        assert (code, "1 picture of" in out) == (0, True), err
    assert Jsonl(columns={"text": "x"}).columns == {"text": "x"}
