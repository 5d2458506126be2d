from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zimage_runner.outputs.atomic import DiskError
from zimage_runner.outputs.ledger import Entry, Ledger, with_checksum

ITEM = st.text(min_size=1, max_size=30)
RECORD = st.fixed_dictionaries(
    {
        "item": ITEM,
        "status": st.sampled_from(["ok", "failed"]),
        "index": st.integers(0, 10**6),
        "seed": st.integers(0, 2**32),
        "fingerprint": st.text("0123456789abcdef", min_size=4, max_size=16),
        "image": st.just("image.png"),
        "sha256": st.text("0123456789abcdef", min_size=64, max_size=64),
        "bytes": st.integers(0, 10**9),
    },
    optional={"error": st.text(), "timings": st.dictionaries(st.text(max_size=5), st.floats())},
)


def expected(records: list[dict]) -> dict[str, Entry]:
    """The model: a dictionary in which the last record of an item wins."""
    state = {}
    for r in records:
        ok = r["status"] == "ok"
        state[r["item"]] = Entry(ok, r["sha256"] if ok else "", r["bytes"] if ok else 0, r["fingerprint"])
    return state


def write(path: Path, records: list[dict]) -> Ledger:
    ledger = Ledger.load(path).open()
    for record in records:
        ledger.append(record)
    ledger.close()
    return ledger


@given(st.lists(RECORD, max_size=8))
def test_what_was_appended_is_loaded(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("ledger") / "records.jsonl"
    ledger = write(path, records)
    assert ledger.entries == Ledger.load(path).entries == expected(records)
    assert path.read_bytes().isascii()


@given(st.lists(RECORD, min_size=1, max_size=5), st.data())
def test_cut_anywhere_it_loads_the_whole_lines_and_appends_cleanly(tmp_path_factory, records, data):
    path = tmp_path_factory.mktemp("ledger") / "records.jsonl"
    write(path, records)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    kept = records[: whole[:cut].count(b"\n")]

    torn = Ledger.load(path)
    assert torn.entries == expected(kept)
    assert torn.damaged == 0
    write(path, records[-1:])
    again = Ledger.load(path)
    assert again.entries == expected([*kept, records[-1]])
    assert again.damaged == 0
    assert path.read_bytes().endswith(b"}\n")


@given(st.lists(RECORD, min_size=1, max_size=5), st.binary(min_size=1, max_size=80))
def test_damaged_lines_cost_only_themselves(tmp_path_factory, records, garbage):
    path = tmp_path_factory.mktemp("ledger") / "records.jsonl"
    path.write_bytes(b"\xff" + garbage.replace(b"\n", b"\0") + b"\n")
    write(path, records)
    loaded = Ledger.load(path)
    assert loaded.entries == expected(records)
    assert loaded.damaged == 1


@pytest.mark.parametrize(
    "line", ["[]", "{}", "3", '"x"', "null", '{"item": 1, "status": "ok"}', '{"item":"a","status":"ok","bytes":"3"}']
)
def test_json_that_is_no_record_is_damage(tmp_path, line):
    path = tmp_path / "records.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    loaded = Ledger.load(path)
    assert loaded.entries == {}
    assert loaded.damaged == 1


def record(item: str, **fields) -> dict:
    return {
        "item": item,
        "status": "ok",
        "index": 0,
        "seed": 1,
        "fingerprint": "aa",
        "image": "image.png",
        "sha256": "0" * 64,
        "bytes": 10,
        **fields,
    }


def test_the_last_result_of_an_item_counts(tmp_path):
    ledger = Ledger.load(tmp_path / "records.jsonl").open()
    ledger.append(record("a"))
    ledger.append(record("b", status="failed", error="no"))
    assert {item: (entry.ok, entry.fingerprint) for item, entry in ledger.entries.items()} == {
        "a": (True, "aa"),
        "b": (False, "aa"),
    }
    ledger.append(record("a", status="failed", error="later"))
    assert not ledger.entries["a"].ok


def test_appends_from_many_threads_do_not_mix(tmp_path):
    ledger = Ledger.load(tmp_path / "records.jsonl").open()

    def add(thread: int) -> None:
        for n in range(200):
            ledger.append(record(f"{thread}/{n}", error="x" * (n * 7)))

    threads = [threading.Thread(target=add, args=(t,)) for t in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    loaded = Ledger.load(ledger.path)
    assert len(loaded.entries) == 800
    assert loaded.damaged == 0


def test_deleted_while_open_is_a_disk_error(tmp_path):
    ledger = Ledger.load(tmp_path / "records.jsonl").open()
    ledger.append(record("a"))
    ledger.path.unlink()
    with pytest.raises(DiskError, match="vanished"):
        ledger.append(record("b"))


def test_a_line_that_does_not_fit_is_taken_back(tmp_path, monkeypatch):
    ledger = Ledger.load(tmp_path / "records.jsonl").open()
    ledger.append(record("a"))
    real = os.write
    calls = []

    def half(fd, data):
        calls.append(1)
        if len(calls) == 1:
            return real(fd, bytes(data)[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(DiskError, match="free some space"):
        ledger.append(record("b"))
    monkeypatch.undo()
    assert Ledger.load(ledger.path).entries.keys() == {"a"}
    assert ledger.path.read_bytes().endswith(b"\n")
    assert "b" not in ledger.entries


def test_the_fast_path_agrees_with_json(tmp_path):
    from zimage_runner.outputs import ledger as module

    fast = module.compact_json(record("items/0001_a-cat/seed_1", extra={"x": "}\\n"})).encode() + b"\n"
    assert module._FAST.fullmatch(fast)
    spaced = json.dumps(json.loads(fast)).encode() + b"\n"
    assert not module._FAST.fullmatch(spaced)
    assert module.parse_line(fast) == module.parse_line(spaced)


@pytest.mark.slow
def test_a_million_records_load(tmp_path):
    path = tmp_path / "records.jsonl"
    tail = (
        f'"fingerprint":"{"ab" * 32}","image":"image.png","sha256":"{"cd" * 32}","bytes":1779000,"pixels_sha256":'
        f'"{"ef" * 32}","seconds":0.612386,"timings":{{"denoise":0.58}},"written":"2026-01-01T00:00:00.000+00:00"}}'
    )
    with open(path, "wb") as file:
        for n in range(1_000_000):
            line = f'{{"item":"items/{n:06d}_a_cat/seed_1","status":"ok","index":{n},"seed":1,{tail}'
            file.write(with_checksum(line.encode()))
    ledger = Ledger.load(path)
    assert len(ledger.entries) == 1_000_000
    assert ledger.damaged == 0
