"""Seeds of a run: a list, a range, a count from a base, or derived from each prompt's own text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from zimage_runner.errors import UserError

MAX_SEED = 2**63 - 1
"""The largest seed that torch and every tool that reads our metadata accept as a signed integer."""
MAX_SEEDS = 1_000_000
DERIVED_BITS = 32
"""Derived seeds stay this short so that file names stay readable and other tools accept them."""
RANDOM = "seeds=$RANDOM (the shell draws it)"
_LISTS = "write a list [1,2,3] or [0-9,42], or a range 0-9"
_FORMS = "write a list [1,2,3] or [0-9,42], a range 0-9, {count: 4, base: 0} or {count: 4, derive: prompt}"


class TooManySeeds(UserError):
    """More than any run may have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seeds:
    """Which seeds a prompt is drawn with."""

    values: tuple[int, ...] = ()
    """The same seeds for every prompt; empty when they are derived."""
    derived_count: int = 0
    """This many seeds from each prompt's text."""
    base: int = 0
    """Changes all derived seeds at once."""

    def for_text(self, text: str) -> tuple[int, ...]:
        """Seeds of one prompt. Derived ones depend on its text and ``base`` alone."""
        return self.values or _derive(text, self.derived_count, self.base)

    def __len__(self) -> int:
        return len(self.values) or self.derived_count


def parse_seeds(value: Any, field: str = "seeds") -> Seeds:
    """The config field ``seeds`` in any of its forms. Raises UserError naming ``field``."""
    if isinstance(value, str) and value.strip().startswith("{"):
        value = _mapping_of(value, field)
    if isinstance(value, Mapping):
        return _parse_mapping(value, field)
    return Seeds(values=parse_seed_list(value, field, _FORMS))


def _mapping_of(text: str, field: str) -> Any:
    """{count: 4, base: 0} as it is typed on a command line."""
    pairs = [pair.partition(":") for pair in text.strip().strip("{}").split(",")]
    values = {key.strip(): value.strip() for key, _, value in pairs}
    if not text.strip().endswith("}") or not all(values) or not all(values.values()):
        raise UserError(f"{field}={_short(text)} is not a mapping: {_FORMS}")
    return {key: int(value) if re.fullmatch(r"-?[0-9]{1,30}", value) else value for key, value in values.items()}


def parse_seed_list(value: Any, field: str = "seeds", forms: str = _LISTS) -> tuple[int, ...]:
    """Explicit seeds: an integer, "0-9,42", or a list of those. Unique, 0 to 2**63-1, in the order given.

    ``forms``: what may be written there, for messages.
    """
    if isinstance(value, int | str):
        value = [value]
    if not isinstance(value, list | tuple):
        raise UserError(f"{field}={_short(value)} is not a seed list: {forms}")
    ranges = [r for entry in value for r in _parse_entry(entry, field, forms)]
    if not ranges:
        raise UserError(f"{field}={_short(value)} is empty: {forms}")
    _check_count(sum(r.stop - r.start for r in ranges), field)
    seeds = tuple(seed for r in ranges for seed in r)
    _check_unique(seeds, field)
    return seeds


def _check_count(count: int, field: str) -> None:
    if count > MAX_SEEDS:
        raise TooManySeeds(f"{field} names {count:,} seeds: use at most {MAX_SEEDS:,}")


def _parse_entry(entry: Any, field: str, forms: str) -> Iterable[range]:
    if isinstance(entry, int) and not isinstance(entry, bool):
        return [_range(entry, entry, field)]
    if isinstance(entry, str):
        listed = re.fullmatch(r"\s*\[(.*)\]\s*", entry)  # how pandas writes a list into a CSV file
        parts = (listed[1] if listed else entry).split(",")
        return [_parse_range(part.strip(), entry, field, forms) for part in parts]
    raise UserError(f"{field}: {_short(entry)} is not an integer: {forms}")


def _parse_range(part: str, whole: str, field: str, forms: str) -> range:
    match = re.fullmatch(r"(-?[0-9]{1,30})(?:\s*-\s*([0-9]{1,30}))?", part)
    if not match and part.lower() == "random":
        raise UserError(f"{field}={_short(whole)}: a run's seeds are known before it starts: write {RANDOM}")
    if not match:
        raise UserError(f"{field}={_short(whole)}: {_short(part)} is neither a seed nor a range: {forms}")
    first = int(match[1])
    return _range(first, first if match[2] is None else int(match[2]), field)


def _range(first: int, last: int, field: str) -> range:
    for seed in (first, last):
        if not 0 <= seed <= MAX_SEED:
            at_random = f"; for another picture each time {RANDOM}" if seed == -1 else ""
            raise UserError(f"{field}: {seed} is out of range: use 0 to {MAX_SEED}{at_random}")
    if last < first:
        raise UserError(f"{field}: the range {first}-{last} runs backwards: write {last}-{first}")
    return range(first, last + 1)


def _check_unique(seeds: tuple[int, ...], field: str) -> None:
    seen: set[int] = set()
    for seed in seeds:
        if seed in seen:
            raise UserError(f"{field}: {seed} is given twice: the same picture would be drawn twice, remove one")
        seen.add(seed)


def _parse_mapping(value: Mapping[str, Any], field: str) -> Seeds:
    unknown = set(value) - {"count", "base", "derive"}
    if unknown:
        raise UserError(f"{field}.{min(map(str, unknown))} is unknown: {_FORMS}")
    if isinstance(value.get("count"), int):
        _check_count(value["count"], field)
    count = _whole(value.get("count"), f"{field}.count", 1, MAX_SEEDS)
    base = _whole(value.get("base", 0), f"{field}.base", 0, MAX_SEED)
    derive = value.get("derive")
    if derive is None:
        return Seeds(values=tuple(_range(base, base + count - 1, field)))
    if derive != "prompt":
        raise UserError(f"{field}.derive={_short(derive)} is unknown: write derive: prompt, or leave it out")
    return Seeds(derived_count=count, base=base)


def _whole(value: Any, field: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UserError(f"{field}={_short(value)} is not an integer from {low} to {high}")
    return value


def _derive(text: str, count: int, base: int) -> tuple[int, ...]:
    """Distinct seeds from SHA-256 of base and text; the first n stay the same when count grows."""
    prefix = hashlib.sha256(f"zimage_runner seed {base}\n{text}".encode())
    seeds: dict[int, None] = {}
    attempt = 0
    while len(seeds) < count:
        digest = prefix.copy()
        digest.update(b"\n%d" % attempt)
        seeds[int.from_bytes(digest.digest()[: DERIVED_BITS // 8], "big")] = None
        attempt += 1
    return tuple(seeds)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
