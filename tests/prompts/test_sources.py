"""Every source of prompts on good input."""

from __future__ import annotations

import io
import json
import sys

import pytest

from tests.support.prompt_inputs import save_dataset
from zimage_runner.errors import UserError
from zimage_runner.prompts import read_prompts
from zimage_runner.prompts.csv_file import Csv
from zimage_runner.prompts.files import FileGlob
from zimage_runner.prompts.hf_dataset import HfDataset
from zimage_runner.prompts.inline import Inline
from zimage_runner.prompts.jsonl import Jsonl
from zimage_runner.prompts.parquet import Parquet
from zimage_runner.prompts.snapshot import snapshot
from zimage_runner.prompts.stdin import LineFormat, Stdin, _stdin_bytes
from zimage_runner.prompts.text_file import TextFile


def texts(source) -> list[str]:
    return [p.text for p in read_prompts(source)]


def test_inline():
    prompts = read_prompts(Inline(texts=[" a cat ", "一只猫", "a cat, neon (8k) --v"]))
    assert [p.text for p in prompts] == ["a cat", "一只猫", "a cat, neon (8k) --v"]
    assert prompts[1].source == "prompts.texts[1]"


def test_text_file_skips_comments_and_blank_lines(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeff# comment\r\na cat\r\n\r\n  一只猫  \r\n\\#1 fan\n#\nlast".encode())
    prompts = read_prompts(TextFile(path=str(file)))
    assert [p.text for p in prompts] == ["a cat", "一只猫", "#1 fan", "last"]
    assert [p.source for p in prompts] == [f"{file}:{n}" for n in (2, 4, 5, 7)]


def test_jsonl_fields_and_metadata(tmp_path):
    file = tmp_path / "p.jsonl"
    rows = [
        {"text": "a cat", "id": "c", "width": 768, "height": 512.0, "seeds": [3, 1], "guidance_scale": 2},
        {"prompt": "一只猫", "seed": "0-2", "metadata": {"k": [1, None]}, "negative_prompt": " blurry "},
        {"text": "plain", "id": 7, "num_inference_steps": None},
    ]
    file.write_text("\n\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    first, second, third = read_prompts(Jsonl(path=str(file)))
    assert (first.id, first.seeds) == ("c", (3, 1))
    assert first.overrides == {"width": 768, "height": 512, "guidance_scale": 2.0}
    assert isinstance(first.overrides["height"], int)
    assert isinstance(first.overrides["guidance_scale"], float)
    assert (second.text, second.seeds, second.metadata) == ("一只猫", (0, 1, 2), {"k": [1, None]})
    assert second.overrides == {"negative_prompt": "blurry"}
    assert (third.id, third.overrides, third.source) == ("7", {}, f"{file}:5")


def test_columns_are_mapped_and_carried(tmp_path):
    file = tmp_path / "p.csv"
    file.write_text('caption,text,author,w\n"a cat, red",x,Ann,512\nb,y,,\n', encoding="utf-8")
    source = Csv(path=str(file), columns={"text": "caption", "width": "w"}, metadata=["*"])
    first, second = read_prompts(source)
    assert (first.text, first.overrides, first.metadata) == (
        "a cat, red",
        {"width": 512},
        {"text": "x", "author": "Ann"},
    )
    assert (second.overrides, second.metadata) == ({}, {"text": "y", "author": None})


def test_csv_multiline_cells_keep_line_numbers(tmp_path):
    file = tmp_path / "p.csv"
    file.write_bytes(b'\xef\xbb\xbftext\r\n"two\r\nlines"\r\n\r\nlast\r\n')
    first, second = read_prompts(Csv(path=str(file)))
    assert first.text.split() == ["two", "lines"]
    assert first.source == f"{file}:2"
    assert (second.text, second.source) == ("last", f"{file}:5")


def test_tsv_and_semicolons(tmp_path):
    (tmp_path / "p.tsv").write_text("text\tseed\na, b\t5\n", encoding="utf-8")
    assert read_prompts(Csv(path=str(tmp_path / "p.tsv")))[0].seeds == (5,)
    (tmp_path / "q.tsv").write_text('text\n"Stop" says "x"\n', encoding="utf-8")
    assert texts(Csv(path=str(tmp_path / "q.tsv"))) == ['"Stop" says "x"']
    (tmp_path / "q.tsv").write_text('text\tid\n"a\tb"\t1\n', encoding="utf-8")
    assert texts(Csv(path=str(tmp_path / "q.tsv"), quotes=True)) == ["a\tb"]
    (tmp_path / "p.csv").write_text("text;seed\na, b;5\n", encoding="utf-8")
    assert read_prompts(Csv(path=str(tmp_path / "p.csv"), delimiter=";"))[0].text == "a, b"


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    file = tmp_path / "p.parquet"
    table = {"caption": ["a", "b"], "width": [512, None], "score": [0.5, float("nan")], "seeds": [[1, 2], None]}
    pq.write_table(pyarrow.table(table), file)
    first, second = read_prompts(Parquet(path=str(file), columns={"text": "caption"}, metadata=["score"]))
    assert (first.text, first.overrides, first.seeds, first.metadata) == ("a", {"width": 512}, (1, 2), {"score": 0.5})
    assert (second.overrides, second.seeds, second.metadata) == ({}, None, {"score": None})


def test_hf_dataset(tmp_path):
    save_dataset(tmp_path / "one", {"text": ["c", "a"], "seeds": [[1, 2], None]}, {"text": ["b"], "seeds": [[3]]})
    prompts = read_prompts(HfDataset(path=str(tmp_path / "one")))
    assert [(p.text, p.seeds) for p in prompts] == [("c", (1, 2)), ("a", None), ("b", (3,))]
    assert prompts[2].source == f"{tmp_path}/one:3"


def test_hf_dataset_splits(tmp_path):
    save_dataset(tmp_path / "train", {"text": ["a"]})
    save_dataset(tmp_path / "test", {"text": ["b"]})
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}', encoding="utf-8")
    assert texts(HfDataset(path=str(tmp_path), split="test")) == ["b"]
    with pytest.raises(UserError, match=r"prompts\.split=None: the dataset's splits are train, test: name one"):
        texts(HfDataset(path=str(tmp_path)))


def test_hf_dataset_reads_only_its_own_folder(tmp_path):
    save_dataset(tmp_path / "one", {"text": ["a"]})
    (tmp_path / "one" / "state.json").write_text(
        '{"_data_files": [{"filename": "../../etc/passwd"}]}', encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"state\.json: not as datasets >= 2 writes it"):
        texts(HfDataset(path=str(tmp_path / "one")))


def test_files_by_extension(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("b1\nb2\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "a1"}\n', encoding="utf-8")
    (tmp_path / "c.tab").write_text("text\twidth\nc\t128\n", encoding="utf-8")
    (tmp_path / "d.json").write_text('{"text": "d"}\n', encoding="utf-8")
    (tmp_path / "sub" / "c.csv").write_text("text\nc1\n", encoding="utf-8")
    assert texts(FileGlob(glob=f"{tmp_path}/**/*.*")) == ["a1", "b1", "b2", "c", "d", "c1"]


def test_whole_files_are_prompts_with_ids(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "one.txt").write_text("# not a comment\nsecond line\n", encoding="utf-8")
    (tmp_path / "x" / "one.txt").write_text("other", encoding="utf-8")
    first, second = read_prompts(FileGlob(glob=f"{tmp_path}/**/*.txt", whole=True))
    assert (first.text, first.id) == ("# not a comment\nsecond line", "one")
    assert second.id == "x/one"


@pytest.mark.parametrize(
    ("form", "data"),
    [(LineFormat.text, "a\n# no\nb --d 4\n"), (LineFormat.jsonl, '{"text":"a"}\n{"text":"b","seed":4}')],
)
def test_stdin_is_read_once(monkeypatch, form, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data.encode()), encoding="utf-8"))
    _stdin_bytes.cache_clear()
    try:
        for _job in range(2):
            prompts = read_prompts(Stdin(format=form))
            assert [p.text for p in prompts] == ["a", "b"]
            assert (prompts[1].source, prompts[1].seeds) == (f"stdin:{3 if form is LineFormat.text else 2}", (4,))
    finally:
        _stdin_bytes.cache_clear()


def numbered(**selection) -> list[tuple[str, int | None]]:
    return [(p.text, p.index) for p in read_prompts(Inline(texts=[f"p{i}" for i in range(10)], **selection))]


def test_selection_keeps_the_numbers_of_the_whole_set():
    assert numbered(limit=2) == [("p0", None), ("p1", None)]
    assert numbered(offset=3, limit=2) == [("p3", 3), ("p4", 4)]
    assert numbered(offset=8, limit=9) == [("p8", 8), ("p9", 9)]
    shards = [numbered(shard=f"{i}/3") for i in (1, 2, 3)]
    assert sorted(p for part in shards for p in part) == [(f"p{i}", i) for i in range(10)]
    sample = numbered(sample=4, sample_seed=1)
    assert len(sample) == 4
    assert sample == sorted(sample) == numbered(sample=4, sample_seed=1)
    assert sample != numbered(sample=4, sample_seed=2)
    assert numbered(sample=99) == [(f"p{i}", i) for i in range(10)]


def test_limit_reads_no_further_than_it_must(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"text": "a"}\nbroken\n', encoding="utf-8")
    assert texts(Jsonl(path=str(file), limit=1)) == ["a"]


def test_snapshot_gives_the_same_prompts(tmp_path):
    from dataclasses import replace

    file = tmp_path / "p.jsonl"
    file.write_text(
        '{"text": "a {x} 猫", "id": "i", "width": 512, "guidance_scale": 2, "seeds": [2, 1], "metadata": {"l": 1}}\n'
        '{"text": "b\\u2028c\\nd", "negative_prompt": "n"}\n{"text": "z"}\n',
        encoding="utf-8",
    )
    prompts = read_prompts(Jsonl(path=str(file), offset=1)) + read_prompts(Jsonl(path=str(file), limit=1))
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(snapshot([replace(p, index=n + 5) for n, p in enumerate(prompts)]))
    again = read_prompts(Jsonl(path=str(copy)))
    assert again == [replace(p, index=n + 5) for n, p in enumerate(prompts)]
    assert [p.index for p in read_prompts(Jsonl(path=str(copy), offset=1, limit=1))] == [6]
