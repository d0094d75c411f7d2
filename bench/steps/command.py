"""The command: python -m bench steps [--models ...] [--dtypes ...] [--peers ...] [--steps N] [--json FILE] ..."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from fastops.doctor import processor

from .models import MODELS
from .run import EPS, PEERS, Row, compare_losses, measure, region_counter, tcmalloc

LEGEND = """\
ms       the median step: forward, loss, backward, clipping, AdamW
ratio    torch's time over the peer's, each pair from one round: the median
rest     seconds of a step outside products of matrices and convolutions
regions  parallel regions of OpenMP in a step
peak     the most memory (resident) that the process ever had"""


def positive(text: str) -> int:
    """A number of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return number


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench steps",
        description="Time whole training steps on the CPU: fastops beside torch, tcmalloc and torch.compile.",
        epilog="exit code: 0 all right, 1 a row is wrong or failed, 2 bad arguments",
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--dtypes", nargs="+", choices=EPS, default=[*EPS])
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, default=[*PEERS], help="torch is always one"
    )
    parser.add_argument("--steps", type=positive, default=20, help="timed for each peer (20)")
    parser.add_argument("--warmup", type=positive, default=3, help="steps before (3)")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, one a line")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the ratios as a PNG file")
    return parser


def rows_of(model: str, dtype: str, peers: Sequence[str]) -> list[Row]:
    """A model's rows, torch first; those that cannot run here say why."""
    rows = [Row(model, MODELS[model].size, dtype, p) for p in PEERS if p == "torch" or p in peers]
    for row in rows:
        if package := MODELS[model].missing():
            row.status, row.note = (
                "skipped",
                f"{package} is not installed (`make bench-steps` does)",
            )
        elif row.peer == "torch + tcmalloc" and tcmalloc() is None:
            row.status, row.note = "skipped", "no tcmalloc library (Debian: libtcmalloc-minimal4)"
    return rows


def line_of(row: Row) -> str:
    """The row of the table."""
    name = f"{row.model} {row.size}"
    start = f"{name:<24} {row.dtype:<9} {row.peer:<17}"
    if row.status != "ok":
        return f"{start} {row.status}: {row.note}"
    m = row.measured
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    regions = "" if m["regions"] is None else f"{m['regions']}"
    return (
        f"{start} {1e3 * median(row.seconds):8.1f} {ratio:>6} {m['rest']:7.3f} {regions:>8}"
        f" {m['peak_rss'] >> 20:7d}"
    )


def op_lines(rows: Sequence[Row]) -> list[str]:
    """What the rest of a step is made of, fastops beside torch."""
    found = []
    for row in rows:
        if row.status == "ok" and row.peer in ("torch", "fastops"):
            found.append(f"  {row.peer}:")
            found += [f"    {1e3 * s:9.2f} ms {n:6d} x {name[:80]}" for name, s, n in row.measured["ops"]]  # fmt: skip
    return found


def draw(rows: Sequence[Row]) -> bytes:
    """Bars of the ratios to torch, by model and dtype."""
    import matplotlib
    from matplotlib.figure import Figure

    from ..charts import BLUE, GREY, INK, STYLE, png

    peers = [p for p in PEERS if p != "torch" and any(r.peer == p and r.ratio for r in rows)]
    groups = list(dict.fromkeys((r.model, r.dtype) for r in rows if r.ratio))
    colors = {"torch + tcmalloc": GREY, "torch.compile": INK, "fastops": BLUE}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 0.8 + 0.28 * len(peers) * max(1, len(groups))))
        axes = figure.subplots()
        height = 0.8 / max(1, len(peers))
        for k, peer in enumerate(peers):
            ratios = {(r.model, r.dtype): r.ratio for r in rows if r.peer == peer and r.ratio}
            at = [g + k * height for g, group in enumerate(groups) if group in ratios]
            axes.barh(
                at,
                [ratios[g] for g in groups if g in ratios],
                height,
                color=colors[peer],
                label=peer,
            )
        axes.axvline(1, color=INK, linewidth=0.8)
        axes.set_yticks([g + 0.4 - height / 2 for g in range(len(groups))])
        axes.set_yticklabels([f"{m}  {d}" for m, d in groups])
        axes.invert_yaxis()
        axes.set_xlabel("training steps a second, torch = 1")
        if peers:
            axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
        return png(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares losses, times, and prints a table; 1 where a row is wrong or failed."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    for file in filter(None, (options.json, options.chart)):
        if not file.resolve().parent.is_dir():
            parser.error(f"{file}: no such folder")
    print(
        f"{processor()}, {options.threads} threads, torch {torch.__version__}, {platform.platform()}"
    )
    if region_counter() is None:
        print("parallel regions are not counted: no C compiler")
    print(LEGEND)
    print(f"\n{'':52}{'ms':>8} {'ratio':>6} {'rest s':>7} {'regions':>8} {'peak MiB':>7}")
    rows: list[Row] = []
    for model in options.models:
        for dtype in options.dtypes:
            now = rows_of(model, dtype, options.peers)
            if now[0].status == "ok":
                compare_losses(now, options.threads)
                measure(now, options.steps, options.warmup, options.threads)
            for row in now:
                print(line_of(row), flush=True)
            print(*op_lines(now), sep="\n", flush=True)
            rows += now
            if options.json:  # after each model: a run takes an hour
                text = "".join(json.dumps(row.as_json()) + "\n" for row in rows)
                options.json.write_text(text)
    if options.chart:
        options.chart.write_bytes(draw(rows))
    return int(any(row.status in ("WRONG", "ERROR") for row in rows))
