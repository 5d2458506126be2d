"""report.html as text: what a report tells, and the page that tells it. No script, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from typing import Any
from urllib.parse import quote

from zimage_runner.view.axes import Axes
from zimage_runner.view.plots import plot
from zimage_runner.view.stored import Stored


@dataclass(kw_only=True, slots=True)
class Picture:
    """A finished picture, as the page needs it."""

    number: int
    stored: Stored
    """Where it is below the directory that the report is of."""
    seed: int
    prompt: str
    where: int
    """Number of run and prompt."""
    written: int | None
    seconds: float | None
    thumbnail: str = ""
    """data: address; empty where there was no time for it, or the file cannot be read."""
    missing: bool = False
    """The file cannot be read."""


@dataclass(kw_only=True, slots=True)
class Content:
    """All that the page tells."""

    title: str
    runs: list[dict[str, Any]] = field(default_factory=list)
    sweep: dict[str, Any] | None = None
    pictures: list[Picture] = field(default_factory=list)
    failures: list[tuple[str, int, str, int | None]] = field(default_factory=list)
    """Prompt, seed, reason and time of each."""
    more: int = 0
    """Pictures that are left out."""
    settings: list[tuple[str, str]] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    memory: list[tuple[int, float]] = field(default_factory=list)
    """Time in ms, and GB."""


def table(title: str, axes: Axes, pictures: dict[int, Picture]) -> str:
    head = "".join(f"<th scope=col>{escape(text)}</th>" for text in axes.columns)
    body = ""
    for r, label in enumerate(axes.rows):
        cells = "".join(
            f"<td>{_tile(pictures[axes.cells[r, c]]) if (r, c) in axes.cells else ''}</td>"
            for c in range(len(axes.columns))
        )
        body += f"<tr><th scope=row dir=auto>{escape(label)}</th>{cells}</tr>"
    return f"<h3 dir=auto>{escape(title)}</h3><div class=scroll><table><tr><td></td>{head}</tr>{body}</table></div>"


def _tile(picture: Picture) -> str:
    label = escape(f"{picture.prompt[:200]}, seed {picture.seed}", quote=True)
    if picture.missing:
        return f'<span class=gone title="{label}">the file is missing</span>'
    if picture.stored.place is not None:  # no file that a browser could open
        shown = f'<img loading=lazy alt="{label}" src="{picture.thumbnail}">' if picture.thumbnail else "in a shard"
        return f'<span class=plain title="{label}">{shown}</span>'
    link = escape(quote(picture.stored.name), quote=True)
    if not picture.thumbnail:
        return f'<a class=plain href="{link}" title="{label}">open the picture</a>'
    return f'<a href="{link}" title="{label}"><img loading=lazy alt="{label}" src="{picture.thumbnail}"></a>'


def page(content: Content) -> str:
    """The whole page. Every text of the run is escaped; scripts are forbidden in it."""
    parts = [
        f"<header><h1>{escape(content.title)}</h1>{_facts(content)}</header>",
        _section("What was run", _definitions(content.settings)),
        _section("How it went", _plots(content)),
        _section("Jobs", _jobs(content)) if content.sweep else "",
        _section("Grid", "".join(content.tables)) if content.tables else "",
        _section("Failed", _failures(content)) if content.failures else "",
        _section("Pictures", _pictures(content)) if not _all_in_tables(content) else "",
    ]
    return HTML.replace("{title}", escape(content.title)).replace("{style}", STYLE).replace("{body}", "".join(parts))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _all_in_tables(content: Content) -> bool:
    return bool(content.tables) and sum(text.count("<a ") for text in content.tables) >= len(content.pictures)


def _facts(content: Content) -> str:
    whole = content.sweep or (content.runs[0] if content.runs else {})
    done = whole.get("done", 0)
    planned = whole.get("planned")
    facts = [
        (
            "state",
            {"failures": "finished, with failures"}.get(str(whole.get("state")), str(whole.get("state", "empty"))),
        ),
        ("pictures", f"{done:,}" + (f" of {planned:,}" if planned and planned != done else "")),
        ("failed", f"{whole.get('failed') or '':,}" if whole.get("failed") else ""),
        ("starred", f"{whole['starred']:,}" if whole.get("starred") else ""),
        ("images/s", f"{whole['speed']:.2f}" if whole.get("speed") else ""),
        ("took", _seconds(whole["seconds"]) if whole.get("seconds") else ""),
        *((f"{'GPU' if k == 'gpu' else k} memory", f"{v:.1f} GB") for k, v in (whole.get("memory") or {}).items()),
    ]
    return _definitions([fact for fact in facts if fact[1]], "facts")


def _seconds(seconds: float) -> str:
    return (
        f"{seconds:.1f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _definitions(rows: Iterable[tuple[str, str]], kind: str = "rows") -> str:
    body = "".join(f"<div><dt>{escape(name)}</dt><dd dir=auto>{escape(value)}</dd></div>" for name, value in rows)
    return f"<dl class={kind}>{body}</dl>" if body else ""


def _plots(content: Content) -> str:
    stamps = [p.written for p in content.pictures if p.written] + [f[3] for f in content.failures if f[3]]
    if not stamps:
        return ""
    start = min(stamps)
    timed = sorted((p.written, p.seconds) for p in content.pictures if p.written and p.seconds is not None)
    failed = [(f[3] - start) / 1000 for f in content.failures if f[3]]
    seconds = plot("Seconds a picture", [((t - start) / 1000, s) for t, s in timed], "s", failed)
    memory = plot("GPU memory", [((t - start) / 1000, gb) for t, gb in content.memory], "GB")
    note = "<p class=note><span class=key></span> a picture that failed</p>" if failed and seconds else ""
    return f"<div class=plots>{seconds}{memory}</div>{note}" if seconds or memory else ""


def _jobs(content: Content) -> str:
    assert content.sweep is not None
    names = content.sweep["varying"]
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in ("job", *names, "state", "done", "failed"))
    body = ""
    for run in content.runs:
        cells = [
            run["job"],
            *(run["parameters"].get(n, "") for n in names),
            run["state"],
            run["done"],
            run["failed"] or "",
        ]
        body += "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>"
    return f"<div class=scroll><table class=lines><tr>{head}</tr>{body}</table></div>"


def _failures(content: Content) -> str:
    rows = "".join(
        f"<li><b dir=auto>{escape((prompt or '')[:300])}</b>, seed {seed}: {escape((error or '')[:500])}</li>"
        for prompt, seed, error, _ in content.failures
    )
    return f"<ul class=failures>{rows}</ul>"


def _pictures(content: Content) -> str:
    out, last = [], None
    for picture in content.pictures:
        if picture.where != last:
            out.append(
                ("</div>" if last is not None else "")
                + f"<h3 dir=auto>{escape(picture.prompt[:600])}</h3><div class=tiles>"
            )
            last = picture.where
        out.append(f"<figure>{_tile(picture)}<figcaption>seed {picture.seed}</figcaption></figure>")
    more = f"<p class=note>{content.more:,} more are in the run's folder.</p>" if content.more else ""
    return "".join(out) + ("</div>" if out else "") + more


HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="content-security-policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>{style}</style></head>
<body><main>{body}</main></body></html>
"""
STYLE = """
:root{color-scheme:light dark;--bg:#f7f7f5;--panel:#fff;--line:#dcdcd6;--text:#1c1d1f;--muted:#5c6066;--accent:#0f766e;
--bad:#b91c1c;font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Noto Sans CJK SC",sans-serif}
@media(prefers-color-scheme:dark){:root{--bg:#131416;--panel:#1c1e21;--line:#34373c;--text:#ecedee;--muted:#a3a8af;
--accent:#5eead4;--bad:#fca5a5}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--text)}main{max-width:1200px;margin:auto;
padding:28px 20px 60px}h1{font-size:24px;margin:0 0 8px;overflow-wrap:anywhere}h2{font-size:17px;margin:34px 0 10px}
h3{font-size:14px;margin:20px 0 8px;overflow-wrap:anywhere;unicode-bidi:isolate}dl,figure{margin:0}
.facts{display:flex;flex-wrap:wrap;gap:2px 22px}.facts div{display:flex;gap:7px}dt{color:var(--muted)}dd{margin:0;
font-weight:550;overflow-wrap:anywhere}.rows{columns:300px 3;column-gap:32px}.rows div{display:grid;
grid-template-columns:160px 1fr;gap:10px;break-inside:avoid}.tiles{display:flex;flex-wrap:wrap;gap:10px;
align-items:end}
.tiles figure{min-width:100px;max-width:160px}.tiles .plain,.tiles .gone{display:flex;align-items:end;height:60px}
img{display:block;max-width:100%;border-radius:6px}a:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
figcaption{color:var(--muted);font-size:12px;font-variant-numeric:tabular-nums}.gone{color:var(--bad);font-size:12px}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),572px));gap:16px}.plot{background:
var(--panel);border:1px solid var(--line);border-radius:10px;padding:12px}.plot figcaption{color:var(--text);
font-weight:600}.plot figcaption span{color:var(--muted);font-weight:400}svg{width:100%;height:auto;display:block}
svg text{font-size:11px;fill:var(--muted)}circle{fill:var(--accent);opacity:.35}polyline{fill:none;stroke:var(--accent);
stroke-width:2}.axis{stroke:var(--line)}.mark{stroke:var(--bad);stroke-width:2}.note{color:var(--muted)}.key{display:
inline-block;width:2px;height:11px;background:var(--bad);margin-right:4px}.scroll{overflow-x:auto}table{border-spacing:6px}
th{color:var(--muted);font-size:12px;font-weight:600;text-align:left;max-width:180px;overflow-wrap:anywhere}
td{min-width:60px;font-variant-numeric:tabular-nums}.lines{background:var(--panel);border:1px solid var(--line);
border-radius:10px;border-spacing:0}.lines th,.lines td{padding:5px 14px}.failures{padding-left:18px}
.failures li{overflow-wrap:anywhere;margin:3px 0}
"""
