"""What a user reads for each kind of broken prompt input."""

from __future__ import annotations

import re

import pytest

from tests.support.prompt_inputs import message
from zimage_runner.prompts.csv_file import Csv
from zimage_runner.prompts.files import FileGlob
from zimage_runner.prompts.hf_dataset import HfDataset
from zimage_runner.prompts.inline import Inline
from zimage_runner.prompts.jsonl import Jsonl
from zimage_runner.prompts.parquet import Parquet
from zimage_runner.prompts.text import MAX_PROMPT_CHARACTERS
from zimage_runner.prompts.text_file import TextFile

BIG = "x" * 2**20


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (Inline(), "prompts.texts is empty: write prompt='a cat'"),
        (Inline(texts=["a", " "]), "prompts.texts[1]: the prompt is empty"),
        (Inline(texts=["a\0b"]), "prompts.texts[0]: the prompt holds a NUL character at position 2"),
        (Inline(texts=["a\ud800"]), "prompts.texts[0]: the prompt holds half of a surrogate pair (U+D800)"),
        (Inline(texts=[BIG]), f"the prompt has 1,048,576 characters: use at most {MAX_PROMPT_CHARACTERS:,}"),
        (Inline(texts=["a"], limit=0), "prompts.limit=0 is out of range: use 1 or more"),
        (Inline(texts=["a"], offset=-1), "prompts.offset=-1 is out of range: use 0 or more"),
        (Inline(texts=["a"], sample=0), "prompts.sample=0 is out of range: use 1 or more"),
        (Inline(texts=["a"], sample_seed=5), "prompts.sample_seed=5 has no effect without prompts.sample=COUNT"),
        (Inline(texts=["a"], offset=5), "prompts.offset=5 leaves none of the prompts"),
        (Inline(texts=["a"], shard="2/2"), "prompts.shard=2/2 leaves none of the prompts"),
        (Inline(texts=["a"], shard="0/4"), "prompts.shard='0/4' is not a shard: write 1/4"),
        (Inline(texts=["a"], shard="5/4"), "prompts.shard='5/4' is not a shard"),
        (Inline(texts=["a"], shard="x"), "prompts.shard='x' is not a shard"),
        (TextFile(), "prompts.path is not set: prompts=text_file needs prompts.path=FILE"),
        (TextFile(path="/nowhere/p.txt"), "prompts.path=/nowhere/p.txt does not exist"),
        (TextFile(path="/"), "prompts.path=/ is a directory: name a file in it"),
        (FileGlob(), "prompts.glob is not set"),
        (FileGlob(glob="/nowhere/*.txt"), "prompts.glob=/nowhere/*.txt matches no file"),
        (HfDataset(), "prompts.path is not set: prompts=hf_dataset needs prompts.path=DIRECTORY"),
        (HfDataset(path="/nowhere"), "prompts.path=/nowhere is not a directory"),
        (Parquet(path="/nowhere.parquet"), "prompts.path=/nowhere.parquet does not exist"),
    ],
)
def test_sources(source, expected):
    assert expected in message(source)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "prompts.path={f} is empty: put at least one prompt in it"),
        (b"# only\n\n", "{f}: there are no prompts in it"),
        (b"good\nbad \xff\xfe\n", "{f}:2: byte 9 (0xff) is not UTF-8: save the file as UTF-8"),
        (b"\xef\xbb\xbfbad \xff\n", "{f}:1: byte 7 (0xff) is not UTF-8"),
        ("a cat".encode("utf-16"), "{f}:1: byte 0 starts UTF-16 text: save the file as UTF-8"),
        (b"a cat\nnul\0\n", "{f}:2: the prompt holds a NUL character at position 4"),
        (BIG.encode(), "{f}:1: the prompt has 1,048,576 characters"),
        (BIG.encode() * 9, "{f}:1: the line is longer than 8,388,608 bytes"),
        (b"a cat --w 5x\n", "{f}:1: --w: width='5x' is not an integer"),
        (b"a cat --w\n", "{f}:1: --w has no value"),
        (b"a cat --sed 3\n", "{f}:1: unknown flag --sed: did you mean --seed?"),
        (b"a cat --zzz 3\n", "{f}:1: unknown flag --zzz: the flags are --w --h --s --d --n --g --lora and"),
        (b"a cat --w 16 --width 16\n", "{f}:1: --width sets width a second time"),
        (b"a cat --d -1\n", "{f}:1: --d: -1 is out of range"),
        (b"--w 512\n", "{f}:1: the prompt is empty"),
    ],
)
def test_text_files(tmp_path, content, expected):
    file = tmp_path / "p.txt"
    file.write_bytes(content)
    assert expected.format(f=file) in message(TextFile(path=str(file)))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "{f}:2: broken JSON at column 2"),
        ('{"text": NaN}', "{f}:2: broken JSON: NaN is not JSON"),
        ('{"text": "a", "text": "b"}', "{f}:2: broken JSON: 'text' is given twice"),
        ("[" * 200_000, "{f}:2: broken JSON"),
        ('{"text": "a", "width": 1' + "0" * 5000 + "}", "{f}:2: broken JSON"),
        ('"a cat"', '{f}:2: not an object: write {{"text": "a cat"}}'),
        ('{"text": ""}', "{f}:2: the prompt is empty"),
        ('{"text": 5}', "{f}:2: text=5 is not a string"),
        ('{"text": null}', "{f}:2: no text: give the prompt in column 'text'"),
        ('{"id": "x"}', "{f}:2: no text"),
        ('{"text": "a", "prompt": "b"}', "{f}:2: columns text and prompt both give text"),
        ('{"text": "a", "image_strength": 0.3}', "{f}:2: unknown column 'image_strength' (how much stays:"),
        ('{"text": "a", "widht": 512}', "{f}:2: unknown column 'widht' (did you mean 'width'?)"),
        ('{"text": "a", "zzz": 512}', "prompts.metadata='[zzz]'"),
        ('{"text": "a", "width": "wide"}', "{f}:2: width='wide' is not an integer"),
        ('{"text": "a", "width": 512.5}', "{f}:2: width=512.5 is not an integer"),
        ('{"text": "a", "width": true}', "{f}:2: width=True is not an integer"),
        ('{"text": "a", "guidance_scale": "inf"}', "{f}:2: guidance_scale='inf' is not a number"),
        ('{"text": "a", "negative_prompt": 3}', "{f}:2: negative_prompt=3 is not a string"),
        ('{"text": "a", "seeds": []}', "{f}:2: seeds=[] is empty"),
        ('{"text": "a", "seeds": [1, 1]}', "{f}:2: seeds: 1 is given twice"),
        ('{"text": "a", "seed": -4}', "{f}:2: seeds: -4 is out of range"),
        (
            '{"text": "a", "seeds": {"count": 4}}',
            "is not a seed list: write a list [1,2,3] or [0-9,42], or a range 0-9",
        ),
        ('{"text": "a", "metadata": 3}', "{f}:2: metadata=3 is not an object"),
        ('{"text": "a", "id": "first"}', "{f}:2: id='first' is already used at {f}:1"),
        ('{"text": "a", "id": {}}', "{f}:2: id={{}} is neither a string nor an integer"),
        ('{"text": "a", "id": ""}', "{f}:2: id='' has 0 characters"),
    ],
)
def test_jsonl_lines(tmp_path, line, expected):
    file = tmp_path / "p.jsonl"
    file.write_text('{"text": "first", "id": "first"}\n' + line + "\n", encoding="utf-8")
    assert expected.format(f=file) in message(Jsonl(path=str(file)))


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        ("caption\na\n", {}, "there is caption: name the one that holds the prompts, prompts.columns.text=caption"),
        ("text,WIDTH\na,128\n", {}, "{f}:1: unknown column 'WIDTH' (did you mean 'width'?); map it with"),
        ("text,caption\na,b\n", {}, "{f}:1: unknown column 'caption'"),
        (
            "text\na\n",
            {"columns": {"width": "w"}},
            "{f}:1: prompts.columns.width=w: no such column; the columns are text",
        ),
        (
            "text\na\n",
            {"columns": {"widht": "w"}},
            "prompts.columns.widht is not a prompt field (did you mean 'width'?)",
        ),
        ("text\na\n", {"metadata": ["x"]}, "{f}:1: prompts.metadata: x: no such column"),
        ("text,text\na,b\n", {}, "{f}:1: two columns are called 'text'"),
        ("text,\na,b\n", {}, "{f}:1: column 2 has no name"),
        ("text\na\nb, c\n", {}, "{f}:3: 2 cells, but the header names 1 columns"),
        ('text\n"a\n', {}, "{f}:2: broken CSV"),
        ("text,seed\n,1\n", {}, "{f}:2: no text"),
        ("text\n", {}, "{f}: there are no prompts in it"),
        ("prompt;seed\na;1\n", {}, "separated by ';'; set prompts.delimiter='\";\"'"),
        ("prompt,seed\na,1\n", {"delimiter": ";"}, "separated by ','; set prompts.delimiter='\",\"'"),
        ("prompt\tseed\na\t1\n", {}, "separated by '\\t'; give the file a name that ends in .tsv"),
        ("text\na\n", {"delimiter": ";;"}, "prompts.delimiter=';;' is not one character"),
    ],
)
def test_csv_files(tmp_path, content, options, expected):
    file = tmp_path / "p.csv"
    file.write_text(content, encoding="utf-8")
    assert expected.format(f=file) in message(Csv(path=str(file), **options))


def test_tables_are_not_read_as_text(tmp_path):
    for name, option in (
        ("p.csv", "csv"),
        ("p.TSV", "csv"),
        ("p.tab", "csv"),
        ("p.jsonl", "jsonl"),
        ("p.parquet", "parquet"),
    ):
        (tmp_path / name).write_text("text\na cat\n", encoding="utf-8")
        assert f"takes every line as a prompt: use prompts={option} (or" in message(TextFile(path=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"text": "a"}]', """p.jsonl:1: a JSON array, .*: jq -c '.\\[\\]' FILE.json > FILE.jsonl makes it so"""),
        ('\n[\n{"text": "a"}\n]', "p.jsonl:2: a JSON array"),
        ('{\n"text": "a"\n}', "p.jsonl:1: an object over several lines, .*: jq -c . FILE.json"),
        (
            '{"Caption": "a", "id": "x"}',
            "p.jsonl:1: no column is called text or prompt; there are Caption, id: name the one that holds the "
            "prompts, prompts.columns.text=Caption$",
        ),
        ('{"a b": "x"}', "there is a b: name the one that holds the prompts, prompts.columns.text=COLUMN$"),
        ("{}", "there are none: name"),
        ("{" + ", ".join(f'"c{n}": 1' for n in range(11)) + "}", r"there are c0, .*, c9, \.\.\.: name"),
    ],
)
def test_what_is_no_table_of_prompts(tmp_path, content, expected):
    (tmp_path / "p.jsonl").write_text(content, encoding="utf-8")
    assert re.search(expected, message(Jsonl(path=str(tmp_path / "p.jsonl"), metadata=["*"])))


def test_a_folder_where_a_pattern_is_needed(tmp_path):
    assert f"is a folder: say which files in it, '{tmp_path}/*.txt'" in message(FileGlob(glob=str(tmp_path)))


def test_not_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    file = tmp_path / "p.parquet"
    file.write_text("text\n", encoding="utf-8")
    assert "is not a Parquet file" in message(Parquet(path=str(file)))
