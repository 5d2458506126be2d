"""From what a person asks for to the numbers of pictures, in order."""

from __future__ import annotations

import json
import re
import sqlite3
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from zimage_runner.errors import UserError
from zimage_runner.view.index import Index
from zimage_runner.view.rows import FAILED, OK

KEPT_VIEWS = 8
SORTS = {
    "newest": "p.written DESC, p.id DESC",
    "oldest": "p.written, p.id",
    "prompt": "p.prompt, p.seed",
    "seed": "p.seed, p.prompt",
    "slowest": "p.seconds DESC, p.id",
    "largest": "p.bytes DESC, p.id",
}
STATUSES = {"done": f"p.status={OK}", "failed": f"p.status={FAILED}"}
STARS = {"starred": "p.star=1", "rejected": "p.star=-1", "unmarked": "p.star=0", "kept": "p.star>=0"}
ALIASES = {"steps": "num_inference_steps", "guidance": "guidance_scale", "cfg": "guidance_scale"}
_WORD = re.compile(r'"([^"]*)"?|(\S+)')
_CONDITION = re.compile(r'([A-Za-z_][\w.]*)(<=|>=|!=|=|<|>)"?([^"]+)"?')
_SEEDS = re.compile(r"(\d{1,19})(?:-(\d{1,19}))?")
MAX_SEED = (1 << 63) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is to be shown."""

    runs: tuple[int, ...] | None = None
    """Numbers of runs; None for all."""
    text: str = ""
    """Words that the prompt must have, and conditions such as seed=1-9, size=512x512, steps>4."""
    status: str = ""
    star: str = ""
    sort: str = "newest"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Numbers of the pictures that were asked for, in order."""

    ids: array[int]
    version: int


class Views:
    """Answers, the last of which are kept: a page of one is a slice of it."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._kept: OrderedDict[tuple[Question, int], Answer] = OrderedDict()
        self._lock = Lock()

    def __call__(self, question: Question, version: int, wanted: int | None = None) -> Answer:
        """The answer as of ``version`` of the index, or of the earlier one that is ``wanted`` if it is still kept.

        Pages of one version fit together while pictures are added. Raises UserError for a question that cannot be
        understood.
        """
        with self._lock:
            for number in (version,) if wanted is None else (wanted, version):
                if (question, number) in self._kept:
                    self._kept.move_to_end((question, number))
                    return self._kept[question, number]
        with self._index.reading() as db:
            where, values = conditions(db, question)
            rows = db.execute(f"SELECT p.id FROM pictures p {where} ORDER BY {_sort(question.sort)}", values)
            answer = Answer(ids=array("q", (row[0] for row in rows)), version=version)
        with self._lock:
            self._kept[question, version] = answer
            while len(self._kept) > KEPT_VIEWS:
                self._kept.popitem(last=False)
        return answer


def _sort(name: str) -> str:
    if name not in SORTS:
        raise UserError(f"sort={name}: choose {', '.join(SORTS)}")
    return SORTS[name]


def conditions(db: sqlite3.Connection, question: Question) -> tuple[str, list[Any]]:
    """JOIN and WHERE of SQL over ``pictures p``, and its values. Raises UserError."""
    clauses: list[str] = []
    values: list[Any] = []
    if question.runs is not None:
        clause, values = in_runs(question.runs)
        clauses.append(clause)
    for name, table, asked in (("status", STATUSES, question.status), ("star", STARS, question.star)):
        if asked:
            clauses.append(_choice(name, asked, table))
    words, tests = parse(question.text, known_parameters(db))
    for word in words:
        clauses.append("instr(coalesce(t.folded, t.text), ?)")
        values.append(word.casefold())
    for name, sign, value in tests:
        clause, more = _test(db, name, sign, value)
        clauses.append(clause)
        values += more
    needs_prompt = any("t." in clause for clause in clauses)
    join = "JOIN prompts t ON t.id = p.prompt " if needs_prompt else ""
    return join + (f"WHERE {' AND '.join(clauses)}" if clauses else ""), values


def in_runs(runs: Iterable[int]) -> tuple[str, list[Any]]:
    """Condition for pictures of these runs; neighbouring numbers become one range."""
    ranges: list[list[int]] = []
    for run in sorted(set(runs)):
        if ranges and ranges[-1][1] == run - 1:
            ranges[-1][1] = run
        else:
            ranges.append([run, run])
    values = [bound for first, last in ranges for bound in (first << 32, (last + 1 << 32) - 1)]
    return f"({' OR '.join(['p.prompt BETWEEN ? AND ?'] * len(ranges)) or '0'})", values


def parse(text: str, known: Iterable[str]) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Words to look for, and conditions (field, sign, value); what looks like one of an unknown field is a word."""
    fields = {"seed", "size", "status", "star", *known}
    words, tests = [], []
    for match in _WORD.finditer(text):
        condition = _CONDITION.fullmatch(match[2] or "")
        name = ALIASES.get(condition[1], condition[1]) if condition else ""
        if condition and name in fields:
            tests.append((name, condition[2], condition[3]))
        elif word := match[1] if match[1] is not None else match[2]:
            words.append(word)
    return words, tests


def known_parameters(db: sqlite3.Connection) -> set[str]:
    """Names of all parameters that any picture has."""
    return {row[0] for row in db.execute("SELECT DISTINCT key FROM params, json_each(params.json)")}


def _test(db: sqlite3.Connection, name: str, sign: str, value: str) -> tuple[str, list[Any]]:
    if name == "seed":
        return _seed_test(sign, value)
    if name in ("status", "star"):
        if sign != "=":
            raise UserError(f"{name}{sign}{value}: write {name}={value}")
        return _choice(name, value, STATUSES if name == "status" else STARS), []
    numbers = [number for number, text in db.execute("SELECT id, json FROM params") if _fits(text, name, sign, value)]
    return "t.params IN (SELECT value FROM json_each(?))", [json.dumps(numbers)]


def _choice(name: str, value: str, table: dict[str, str]) -> str:
    if value not in table:
        raise UserError(f"{name}={value}: choose {', '.join(table)}")
    return table[value]


def _seed_test(sign: str, value: str) -> tuple[str, list[Any]]:
    parts = [_SEEDS.fullmatch(part) for part in value.split(",")]
    if not all(parts) or (sign not in ("=", "!=") and (len(parts) > 1 or (parts[0] and parts[0][2]))):
        raise UserError(f"seed{sign}{value}: write seed=7, seed=1-9,42 or seed>7")
    bounds = [min(int(b), MAX_SEED) for part in parts if part for b in (part[1], part[2] or part[1])]
    if sign in ("=", "!="):
        clause = f"({' OR '.join(['p.seed BETWEEN ? AND ?'] * len(parts))})"
        return (f"NOT {clause}" if sign == "!=" else clause), bounds
    return f"p.seed {sign} ?", bounds[:1]


def _fits(params: str, name: str, sign: str, value: str) -> bool:
    found = json.loads(params)
    if name == "size":
        have = f"{found.get('width')}x{found.get('height')}"
        wanted = value.lower().replace("*", "x").replace("×", "x")
        if sign not in ("=", "!="):
            raise UserError(f"size{sign}{value}: write size={value}, or width{sign}...")
        return (have == wanted) == (sign == "=")
    if name not in found:
        return False
    return compares(found[name], sign, value)


def compares(have: Any, sign: str, value: str) -> bool:
    """Whether ``have sign value`` is true: as numbers where both are, else as text."""
    try:
        left, right = float(have), float(value)
    except (TypeError, ValueError):
        left, right = str(have).casefold(), value.casefold()
        if sign in ("=", "!="):
            return (left == right) == (sign == "=")
        return {"<": left < right, ">": left > right, "<=": left <= right, ">=": left >= right}[sign]
    if sign in ("=", "!="):
        return (left == right) == (sign == "=")
    return {"<": left < right, ">": left > right, "<=": left <= right, ">=": left >= right}[sign]


LONGEST_TEXT = 400
"""Characters of a prompt in a list; the picture's own view has it whole."""


def rows_of(db: sqlite3.Connection, ids: Sequence[int]) -> list[dict[str, Any]]:
    """What a list shows of these pictures, in their order. Seeds are text: JavaScript's numbers end at 2**53."""
    found = {
        row[0]: row
        for row in db.execute(
            "SELECT p.id, p.prompt, p.seed, p.status, p.error, p.star, p.written, p.seconds, t.text, s.json, p.bytes "
            "FROM pictures p LEFT JOIN prompts t ON t.id=p.prompt LEFT JOIN params s ON s.id=t.params "
            "WHERE p.id IN (SELECT value FROM json_each(?))",
            (json.dumps(list(ids)),),
        )
    }
    return [_row(found[number]) for number in ids if number in found]


def _row(row: tuple[Any, ...]) -> dict[str, Any]:
    number, prompt, seed, status, error, star, written, seconds, text, params, size = row
    values = json.loads(params) if params else {}
    return {
        "id": number,
        "run": prompt >> 32,
        "index": prompt & 0xFFFFFFFF,
        "seed": str(seed),
        "status": "done" if status == OK else "failed",
        "error": error[:LONGEST_TEXT] if error else None,
        "star": star,
        "written": written,
        "seconds": seconds,
        "prompt": (text or "")[:LONGEST_TEXT],
        "width": values.get("width"),
        "height": values.get("height"),
        "v": f"{written or 0:x}{size or 0:x}",
    }


def facets(db: sqlite3.Connection, runs: tuple[int, ...] | None) -> dict[str, Any]:
    """What can be asked for in these runs: parameters with more than one value, sizes, and how many of each kind."""
    clause, values = in_runs(runs) if runs is not None else ("1", [])
    kinds = db.execute(f"SELECT p.status, p.star, count(*) FROM pictures p WHERE {clause} GROUP BY 1, 2", values)
    counts = dict.fromkeys((*STATUSES, *STARS), 0)
    for status, star, count in kinds:
        counts["done" if status == OK else "failed"] += count
        counts["starred" if star > 0 else "rejected" if star < 0 else "unmarked"] += count
    counts["kept"] = counts["starred"] + counts["unmarked"]
    inner = clause.replace("p.prompt", "t.id")
    texts = db.execute(
        f"SELECT json FROM params WHERE id IN (SELECT DISTINCT t.params FROM prompts t WHERE {inner})", values
    )
    found: dict[str, set[Any]] = {}
    sizes: set[str] = set()
    for (text,) in texts:
        params = json.loads(text)
        for name, value in params.items():
            found.setdefault(name, set()).add(value if isinstance(value, int | float | bool) else str(value))
        if "width" in params and "height" in params:
            sizes.add(f"{params['width']}x{params['height']}")
    varying = {name: _ordered(values) for name, values in found.items() if len(values) > 1}
    return {"counts": counts, "sizes": sorted(sizes), "parameters": varying}


MOST_VALUES = 200


def _ordered(values: set[Any]) -> list[Any]:
    return sorted(values, key=lambda v: (isinstance(v, str), v if not isinstance(v, str) else 0, str(v)))[:MOST_VALUES]
