"""A run as one HTML page that needs no other file: what was measured on, the charts, the table. Measures nothing."""

from __future__ import annotations

import base64
import html
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .charts import PASSES, draw, label
from .report import LEGEND, duration, short, write_whole

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 62rem; margin: 2.5rem auto; padding: 0 1rem }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { margin-top: 2.4rem; font-size: 1.2rem }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .82rem; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .22rem .5rem; border-bottom: 1px solid #e4e7eb; white-space: nowrap }
th { border-bottom: 2px solid #9aa5b1; position: sticky; top: 0; background: #fff }
td.name, th.name, td.note { text-align: left } td.note { white-space: normal; color: #616e7c }
.slow { color: #c0392b; font-weight: 600 } .facts td { text-align: left; white-space: normal; border: 0; padding: .1rem .8rem .1rem 0 }
pre { background: #f5f7fa; padding: .8rem 1rem; overflow-x: auto; font-size: .8rem }
"""


def cell(text: str, kind: str = "") -> str:
    """One cell of a table."""
    return f"<td{f' class={kind!r}' if kind else ''}>{html.escape(text)}</td>"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of one pass, with a column for every contender that ran in it."""
    others = list(dict.fromkeys(n for r in rows for k in ("torch", "peers") for n in r.get(k, {})))
    head = ["op", *others, "fastops", "ratio", "quartiles", "GB/s", "of copy", "note"]
    lines = [
        "<tr>"
        + "".join(f"<th class='{'name' if h in ('op', 'note') else ''}'>{h}</th>" for h in head)
        + "</tr>"
    ]
    for row in rows:
        cells = [cell(label(row), "name")]
        if row["status"] == "ok":
            times = row["torch"] | row["peers"]
            low, middle, high = row["ratios"][row["best"]]
            cells += [cell(duration(times[n][1]) if n in times else "") for n in others]
            cells += [
                cell(duration(row["fastops"][1])),
                cell(short(middle), "slow" if middle < 1 else ""),
                cell(f"{short(low)}-{short(high)}"),
                cell(short(row["bytes_per_second"] / 1e9)),
                cell(f"{row['of_copy']:.0%}"),
                cell("; ".join(row["notes"]), "note"),
            ]
        else:
            cells += [cell("")] * (len(head) - 2)
            cells.append(cell(f"{row['status']}: {'; '.join(row['notes'])}", "note"))
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "<table>" + "\n".join(lines) + "</table>"


def make_page(
    header: dict[str, str], rows: Sequence[dict[str, Any]], charts: dict[str, bytes]
) -> str:
    """The page's HTML."""
    facts = "".join(f"<tr>{cell(k)}{cell(v)}</tr>" for k, v in header.items())
    counts = {s: sum(r["status"] == s for r in rows) for s in ("ok", "WRONG", "ERROR", "skipped")}
    said = ", ".join(f"{n} {'timed' if s == 'ok' else s}" for s, n in counts.items() if n)
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>fastops benchmark</title>",
        f"<style>{STYLE}</style></head><body><h1>fastops benchmark</h1>",
        f"<p>{len(rows)} rows, each verified against float64 before it was timed: {said}.</p>",
        f"<table class='facts'>{facts}</table>",
    ]
    for mode, words in PASSES.items():
        some = [row for row in rows if row["mode"] == mode]
        if not some:
            continue
        parts.append(f"<h2>{words.capitalize()}</h2>")
        for name, content in charts.items():
            if name.removesuffix(".png").partition("-")[2] == mode.replace("+", "-"):
                data = base64.b64encode(content).decode()
                parts.append(f"<img alt='{html.escape(name)}' src='data:image/png;base64,{data}'>")
        parts.append(table(some))
    parts.append(f"<h2>How to read it</h2><pre>{html.escape(LEGEND)}</pre></body></html>\n")
    return "\n".join(parts)


def write_page(folder: Path, header: dict[str, str], rows: Sequence[dict[str, Any]]) -> Path:
    """Writes the charts and index.html into `folder`, each whole or not at all; returns the page's path."""
    charts = draw(rows)
    for name, content in charts.items():
        write_whole(folder / name, content)
    write_whole(folder / "index.html", make_page(header, rows, charts))
    return folder / "index.html"


def main(arguments: Sequence[str]) -> int:
    """python -m bench.page FILE FOLDER: the page of a run that --json or --report wrote."""
    if len(arguments) != 2:
        print("usage: python -m bench.page FILE.jsonl FOLDER", file=sys.stderr)
        return 2
    lines = [json.loads(line) for line in Path(arguments[0]).read_text().splitlines()]
    folder = Path(arguments[1])
    folder.mkdir(parents=True, exist_ok=True)
    print(write_page(folder, lines[0]["environment"], lines[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
