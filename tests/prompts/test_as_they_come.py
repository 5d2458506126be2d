"""Files as Excel, pandas, PowerShell, old Macs, cat and the shell leave them."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zimage_runner.errors import UserError
from zimage_runner.prompts import read_prompts
from zimage_runner.prompts.csv_file import Csv
from zimage_runner.prompts.files import FileGlob
from zimage_runner.prompts.hf_dataset import HfDataset
from zimage_runner.prompts.inline import Inline
from zimage_runner.prompts.jsonl import Jsonl
from zimage_runner.prompts.parquet import Parquet
from zimage_runner.prompts.snapshot import snapshot
from zimage_runner.prompts.text import bare, read_lines
from zimage_runner.prompts.text_file import TextFile


def texts(source) -> list[str]:
    return [p.text for p in read_prompts(source)]


def message(source) -> str:
    with pytest.raises(UserError) as caught:
        read_prompts(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(path: Path, data: bytes | str) -> str:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"a\rb\rc\r", [(1, "a"), (2, "b"), (3, "c")]),
        (b"a\r\nb\rc\nd", [(1, "a"), (2, "b"), (3, "c"), (4, "d")]),
        (b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n", [(1, "a"), (2, "b")]),
        (b"a\n\r\n\rb", [(1, "a"), (2, ""), (3, ""), (4, "b")]),
        ("a\u2028b\x0bc\n".encode(), [(1, "a\u2028b\x0bc")]),
    ],
)
def test_lines_end_as_any_program_ends_them(tmp_path, data, lines):
    with open(written(tmp_path / "p.txt", data), "rb") as stream:
        assert list(read_lines(stream, "p.txt")) == lines


@given(st.lists(st.text("ab 猫\u2028\x0b", max_size=5)), st.lists(st.sampled_from(["\n", "\r\n", "\r"]), min_size=1))
def test_lines_come_back_whatever_ends_them(lines, ends):
    import io
    from unittest.mock import patch

    data = "".join(line + ends[n % len(ends)] + ("x" if not line else "") for n, line in enumerate(lines)).encode()
    expected = data.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for size in (1, 3, 2**20):
        with patch("zimage_runner.prompts.text._READ_AT_ONCE", size):
            found = [line for _, line in read_lines(io.BytesIO(data), "f")]
        assert found == (expected[:-1] if expected[-1] == "" else expected)


def test_a_file_of_an_old_mac_is_three_prompts(tmp_path):
    assert texts(TextFile(path=written(tmp_path / "p.txt", b"a cat\ra dog\ra cow\r"))) == ["a cat", "a dog", "a cow"]
    table = written(tmp_path / "p.csv", b'prompt,seed\ra cat,1\r"two\rlines",2\r')
    assert texts(Csv(path=table)) == ["a cat", "two\nlines"]
    assert texts(Jsonl(path=written(tmp_path / "p.jsonl", b'{"text":"a"}\r{"text":"b"}\r'))) == ["a", "b"]


def test_invisible_marks_are_no_prompt(tmp_path):
    lines = "\ufeffa cat\n\u200b\n\ufeff  a\u200d dog\u200b \n\u2060\u200e\n\ufeff# comment\n"
    assert texts(TextFile(path=written(tmp_path / "p.txt", lines))) == ["a cat", "a\u200d dog"]
    assert "prompts.texts[0]: the prompt is empty" in message(Inline(texts=["\u200b\u200e"]))
    joined = written(tmp_path / "j.txt", "a\na cat\ufeffa dog\n")
    assert f"{joined}:2: a byte order mark (U+FEFF) is at position 6" in message(TextFile(path=joined))


@given(st.text("a \u200b\ufeff\u2060\t猫", max_size=8))
def test_bare_text_keeps_what_can_be_seen(text):
    kept = bare(text)
    assert kept == bare(kept)
    assert [c for c in kept if c in "a猫"] == [c for c in text if c in "a猫"]
    assert kept in text


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"bad \xff\n", "{f}:1: byte 4 (0xff) is not UTF-8: save the file as UTF-8"),
        (b"\xef\xbb\xbfbad \xff\n", "{f}:1: byte 7 (0xff) is not UTF-8"),
        (b"\xef\xbb\xbf\nbad \xff\n", "{f}:2: byte 8 (0xff) is not UTF-8"),
        (b"\x1f\x8b\x08\x00abc", "{f} is a gzip file: unpack it first, gunzip FILE"),
        (b"PK\x03\x04abc", "{f} is a zip file or an Excel workbook: unpack it, or save the sheet as CSV (UTF-8)"),
        (b"PAR1abc", "{f} is a Parquet table: use prompts=parquet"),
        ("a cat".encode("utf-16-le"), "{f}:1: byte 0 starts UTF-16 text: save the file as UTF-8"),
        ("a cat".encode("utf-16-be"), "{f}:1: byte 0 starts UTF-16 text"),
    ],
)
def test_files_that_are_not_utf_8(tmp_path, data, expected):
    for name, source in (("p.txt", TextFile), ("p.csv", Csv), ("p.jsonl", Jsonl)):
        file = written(tmp_path / name, data)
        assert message(source(path=file)).startswith(expected.format(f=file))


def test_separator_line_of_excel(tmp_path):
    file = written(tmp_path / "p.csv", "\ufeffsep=;\r\nprompt;seed\r\na, b;5\r\n;\r\n")
    assert message(Csv(path=file)) == f"{file}:4: no text: give the prompt in column 'text'"
    prompts = read_prompts(Csv(path=file, limit=1))
    assert [(p.text, p.seeds, p.source) for p in prompts] == [("a, b", (5,), f"{file}:3")]
    assert texts(Csv(path=written(tmp_path / "t.csv", "sep=\t\nprompt\tseed\na\t1\n"))) == ["a"]
    assert texts(Csv(path=written(tmp_path / "n.csv", "sep=x,prompt\n1,a\n"), metadata=["*"])) == ["a"]


@pytest.mark.parametrize("length", [1, 9000])
def test_a_quote_that_is_never_closed_names_its_row(tmp_path, length):
    rows = 'prompt,seed\n"a\nb",1\n"never,2\n' + f"{'x' * 1000},3\n" * length
    assert message(Csv(path=written(tmp_path / "p.csv", rows))).endswith(
        'p.csv:4: broken CSV: a quotation mark is opened in this row and not closed: close it, write "" for one within '
        "a cell, or set prompts.quotes=false if they are text"
    )


def test_an_empty_table_is_told(tmp_path):
    assert message(Csv(path=written(tmp_path / "p.csv", "\n\n"))).endswith(
        "p.csv holds no header: the first line names the columns"
    )


@pytest.mark.parametrize(
    ("field", "cell", "value"),
    [
        ("seeds", 42.0, (42,)), ("seeds", "42.0", (42,)), ("seeds", [1.0, 2], (1, 2)),
        ("seeds", "1.0,3-5", (1, 3, 4, 5)),
        ("seeds", float("nan"), None), ("seeds", "nan", None), ("seeds", "NaN", None), ("seeds", "<NA>", None),
        ("width", float("nan"), None), ("width", "nan", None), ("width", 128.0, 128), ("width", "128.0", 128),
        ("guidance_scale", "", None), ("negative_prompt", "nan", "nan"), ("num_inference_steps", 2**60, "out of range"),
        ("seeds", 1.5, "seeds=1.5 is not a seed list"), ("seeds", 1e18, "has lost its last digits on the way"),
        ("width", float("inf"), "width=inf is not an integer"), ("seeds", True, "True is not an integer"),
    ],
)  # fmt: skip
def test_numbers_of_pandas(tmp_path, field, cell, value):
    from zimage_runner.prompts.rows import RowReader

    reader = RowReader(Jsonl())
    if isinstance(value, str) and value != cell:
        with pytest.raises(UserError, match=value):
            reader.prompt({"text": "a", field: cell}, "t:1")
        return
    prompt = reader.prompt({"text": "a", field: cell}, "t:1")
    assert (prompt.seeds if field == "seeds" else prompt.overrides.get(field)) == value


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "a", "width": 1' + "0" * 400 + "}", ":1: width=1000"),
        ('{"text": "a", "guidance_scale": 1' + "0" * 400 + "}", ":1: guidance_scale=1000"),
        ('{"text": "a", "seed": 1' + "0" * 400 + "}", "is out of range: use 0 to 9223372036854775807"),
        ('{"text": "a", "id": 1' + "0" * 400 + "}", "has 401 characters: use 1 to 256"),
        ('{"text": "a", "metadata": {"x": ' + "[" * 900 + "]" * 900 + "}}", ":1: metadata x: nested more than 32 deep"),
        ('{"text": "a", "metadata": "' + "[" * 100_000 + '"}', ":1: metadata is not a JSON object"),
    ],
)
def test_numbers_and_nests_out_of_all_bounds(tmp_path, line, expected):
    told = message(Jsonl(path=written(tmp_path / "p.jsonl", line)))
    assert expected in told
    assert len(told) < 600 + len(str(tmp_path))


class TestArrow:
    @pytest.fixture(autouse=True)
    def _library(self):
        pytest.importorskip("pyarrow")

    def table(self, tmp_path: Path, **columns) -> str:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "p.parquet")
        return str(tmp_path / "p.parquet")

    def test_nanoseconds(self, tmp_path):
        import pyarrow

        when = 1_700_000_000_123_456_789
        kind = pyarrow.timestamp("ns")
        file = self.table(
            tmp_path,
            text=["a", "b"],
            when=pyarrow.array([when, None], kind),
            deep=pyarrow.array([{"t": [when]}, None], pyarrow.struct([("t", pyarrow.list_(kind))])),
            far=pyarrow.array([2**62, 0], pyarrow.timestamp("us")),
            day=pyarrow.array([datetime.date(2024, 1, 5), None]),
        )
        first, second = read_prompts(Parquet(path=file, metadata=["*"]))
        iso = "2023-11-14T22:13:20.123456789"
        assert first.metadata["when"] == iso
        assert first.metadata["deep"] == {"t": [iso]}
        assert first.metadata["day"] == "2024-01-05"
        assert isinstance(first.metadata["far"], str | int)
        assert second.metadata == {"when": None, "deep": None, "far": "1970-01-01T00:00:00", "day": None}

    def test_text_that_is_not_utf_8(self, tmp_path):
        import pyarrow

        bad = pyarrow.StringArray.from_buffers(
            2, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\5\0\0\0"), pyarrow.py_buffer(b"acaf\xe9")
        )
        told = message(Parquet(path=self.table(tmp_path, text=bad)))
        assert told.endswith("p.parquet:2: text: byte 3 (0xe9) is not UTF-8: store the column as text")

    def test_binary_cells_are_left_out(self, tmp_path, caplog):
        import pyarrow

        picture = os.urandom(2_500_000)
        image = pyarrow.array([{"bytes": picture, "path": "a.png"}] * 2)
        file = self.table(tmp_path, text=["a", "b"], blob=[picture] * 2, image=image, parts=[[b"x"], []], n=[1, 2])
        prompts = read_prompts(Parquet(path=file, metadata=["*"]))
        assert [p.metadata for p in prompts] == [{"image": {"path": "a.png"}, "n": n} for n in (1, 2)]
        assert [r.getMessage() for r in caplog.records] == [f"{file}: blob: binary data is left out of the records"]
        assert len(snapshot(prompts)) < 500

    def test_binary_cells_of_a_data_set(self, tmp_path, caplog):
        from tests.support.prompt_inputs import save_dataset

        save_dataset(tmp_path / "d", {"text": ["a"], "image": [{"bytes": b"x" * 99, "path": None}], "raw": [b"y"]})
        (prompt,) = read_prompts(HfDataset(path=str(tmp_path / "d"), metadata=["*"]))
        assert prompt.metadata == {"image": {"path": None}}
        assert [r.getMessage() for r in caplog.records] == [
            f"{tmp_path}/d: raw: binary data is left out of the records"
        ]

    @pytest.mark.parametrize("cut", [0, 4, 8, 100, -8, -1])
    def test_cut_files(self, tmp_path, cut):
        file = Path(self.table(tmp_path, text=["a"] * 100))
        file.write_bytes(file.read_bytes()[:cut])
        assert "is not a Parquet file: " in message(Parquet(path=str(file)))


def test_metadata_has_a_bound(tmp_path):
    file = written(tmp_path / "p.jsonl", json.dumps({"text": "a", "short": 1, "long": "x" * 70_000}))
    assert message(Jsonl(path=file, metadata=["*"])).startswith(
        f"{file}:1: the metadata has 70,024 bytes, most of them in long: at most 65,536 are written into every record"
    )
    fits = {"text": "a", "long": "x" * (65_536 - len('{"long": ""}'))}
    (prompt,) = read_prompts(Jsonl(path=written(tmp_path / "q.jsonl", json.dumps(fits)), metadata=["*"]))
    again = read_prompts(Jsonl(path=written(tmp_path / "prompts.jsonl", snapshot([prompt]))))
    assert again[0].metadata == prompt.metadata


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=9) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40)
@given(
    rows=st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30).filter(bare),
            st.dictionaries(st.text(max_size=5), VALUES, max_size=3),
            st.none() | st.lists(st.integers(0, 40) | st.integers(0, 2**63 - 1), min_size=1, unique=True),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_what_a_run_writes_it_can_read(tmp_path_factory, rows):
    from zimage_runner.prompts.carried import carry
    from zimage_runner.prompts.prompt import Prompt

    prompts = [
        Prompt(text=bare(text), source=f"s:{n}", index=n, metadata=carry(data, "s"), seeds=seeds and tuple(seeds))
        for n, (text, data, seeds) in enumerate(rows)
    ]
    copy = tmp_path_factory.mktemp("run") / "prompts.jsonl"
    copy.write_bytes(snapshot(prompts))
    assert read_prompts(Jsonl(path=str(copy))) == prompts


def test_many_seeds_of_a_prompt_are_one_short_line(tmp_path):
    file = written(
        tmp_path / "p.txt", "a --d 0-199999\nb --d 5,3,7-11\nc --d " + ",".join(map(str, range(0, 90_000, 2)))
    )
    prompts = read_prompts(TextFile(path=file))
    data = snapshot(prompts)
    assert b'"seeds":["0-199999"]' in data.splitlines()[0]
    assert b'"seeds":[5,3,"7-11"]' in data
    assert [p.seeds for p in read_prompts(Jsonl(path=written(tmp_path / "prompts.jsonl", data)))] == [
        p.seeds for p in prompts
    ]


def test_names_that_are_not_utf_8(tmp_path):
    folder = os.fsencode(tmp_path) + b"/lat"
    os.mkdir(folder)
    for name, data in ((b"caf\xe9.txt", b"a cat\n"), (b"d\xe9.csv", b"prompt\na dog\n"), (b"z\xe9.txt", b"")):
        with open(folder + b"/" + name, "wb") as stream:
            stream.write(data)
    prompts = read_prompts(FileGlob(glob=f"{tmp_path}/lat/[a-d]*"))
    assert [(p.text, p.source) for p in prompts] == [
        ("a cat", f"{tmp_path}/lat/caf\\xe9.txt:1"),
        ("a dog", f"{tmp_path}/lat/d\\xe9.csv:2"),
    ]
    snapshot(prompts).decode()
    assert read_prompts(FileGlob(glob=f"{tmp_path}/lat/c*", whole=True))[0].id == "caf\\xe9"
    assert message(FileGlob(glob=f"{tmp_path}/lat/z*")).startswith(f"prompts.path={tmp_path}/lat/z\\xe9.txt is empty")
    bad = os.fsdecode(folder + b"/caf\xe9.txt")
    assert message(TextFile(path=bad)) == (
        f"prompts.path={tmp_path}/lat/caf\\xe9.txt: the name is not UTF-8: rename the file, or read it with "
        "prompts=files prompts.glob='*.txt'"
    )


@pytest.mark.parametrize("word", [b"prompts.path=caf\xe9.txt", b"prompt=caf\xe9", b"output_file=\xff.png"])
@pytest.mark.parametrize("dry_run", ["true", "false"])
def test_words_that_are_not_utf_8_are_refused_first(cli, word, dry_run):
    code, out, err = cli("prompts=text_file", os.fsdecode(word), f"dry_run={dry_run}")
    assert (code, out) == (2, "")
    assert word.decode("utf-8", "backslashreplace") + ": not UTF-8: write it in UTF-8; a prompt file" in err
    assert err.count("\n") == 1


def test_the_home_of_nobody(cli):
    code, out, err = cli("prompts=text_file", "prompts.path=~no_such_user/p.txt", "dry_run=true")
    assert (code, out) == (2, "")
    assert "prompts.path=~no_such_user/p.txt: there is no such home directory: write the whole path" in err


@pytest.mark.parametrize("source", [TextFile, Csv, Jsonl, Parquet])
def test_named_pipes_are_not_waited_for(tmp_path, source):
    os.mkfifo(tmp_path / "p.txt")
    assert message(source(path=str(tmp_path / "p.txt"))) == (
        f"prompts.path={tmp_path}/p.txt is a named pipe: read it with prompts=stdin < {tmp_path}/p.txt"
    )
    fill = "prompts.template.fill.x="
    assert message(fill_from(f"{tmp_path}/p.txt")) == f"{fill}{tmp_path}/p.txt is a named pipe: name a file"
    assert message(fill_from(str(tmp_path))) == f"{fill}{tmp_path} is a directory: name a file in it"
    assert "is no file, but a device or socket: name a file" in message(source(path="/dev/zero"))


def fill_from(path: str) -> Inline:
    from zimage_runner.prompts.template import Template

    return Inline(texts=["{x}"], template=Template(fill={"x": path}))


def test_a_pipe_of_the_shell_is_read():
    """``prompts.path=<(command)``: a name below /dev/fd."""
    end, other = os.pipe()
    with os.fdopen(other, "wb") as stream:
        stream.write(b"a cat\na dog\n")
    try:
        assert texts(TextFile(path=f"/dev/fd/{end}")) == ["a cat", "a dog"]
    finally:
        os.close(end)


def test_process_substitution_through_bash(tmp_path):
    code = "import sys; from zimage_runner.prompts import read_prompts; from zimage_runner.prompts.text_file import *; "
    code += "print([p.text for p in read_prompts(TextFile(path=sys.argv[1]))])"
    script = f'{sys.executable} -c "$0" <(printf "a\\nb\\n")'
    done = subprocess.run(["bash", "-c", script, code], capture_output=True, text=True, timeout=60, encoding="utf-8")
    assert done.stdout == "['a', 'b']\n", done.stderr
