"""Charts of a run, drawn from its rows as `Row.as_json` has them. Nothing is measured or computed here but what is drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.use("Agg")

BLUE, RED, GREY, INK = "#2563a8", "#c0392b", "#9aa5b1", "#1f2933"
PASSES = {"forward": "forward", "forward+backward": "forward and backward", "step": "step"}
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#cbd2d9",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.dpi": 130,
}

Row = dict[str, Any]


def label(row: Row) -> str:
    """The row's op, size and dtype."""
    dtype = "" if row["dtype"] == "float32" else f" {row['dtype']}"
    return f"{row['op']} {row['variant']}".rstrip() + f"  {row['size']}{dtype}"


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", facecolor="white")
    return buffer.getvalue()


def draw_ratios(rows: Sequence[Row], title: str) -> bytes:
    """Bars of torch's time over ours against torch's fastest, on a logarithmic axis, with the quartiles of the pairs;
    those below 1 in red. Rows in the order given, from the top."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 0.6 + 0.19 * len(rows)))
        axes: Axes = figure.subplots()
        low, middle, high = zip(*(row["ratios"][row["best"]] for row in rows), strict=True)
        at = range(len(rows))
        colours = [BLUE if m >= 1 else RED for m in middle]
        axes.barh(at, [m - 1 for m in middle], left=1, color=colours, height=0.72, zorder=2)
        spread = [
            [m - q for m, q in zip(middle, low, strict=True)],
            [q - m for m, q in zip(middle, high, strict=True)],
        ]
        axes.errorbar(middle, at, xerr=spread, fmt="none", ecolor=INK, elinewidth=0.8, zorder=3)
        for y, m, q in zip(at, middle, high, strict=True):
            axes.annotate(
                f"{m:.{1 if m >= 10 else 2}f}", (max(m, q, 1), y), (4, 0),
                textcoords="offset points", va="center", fontsize=7.5,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        left, right = min(0.8, *low), max(2.0, *high)
        axes.set_xlim(left, right * 1.35)
        ticks = [t for t in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if left <= t <= right * 1.2]
        axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
        axes.minorticks_off()
        axes.axvline(1, color=INK, linewidth=1, zorder=4)
        axes.grid(axis="x", color="#e4e7eb", zorder=0)
        axes.set_yticks(at, [label(row) for row in rows], fontsize=7.5)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel(
            "torch's time / ours, against the fastest torch; line: quartiles of the pairs"
        )
        return png(figure)


def draw_speed(rows: Sequence[Row], title: str) -> bytes:
    """Bytes that must move over our time, for each row by its bytes, beside the speed of a copy of as many."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 3.9))
        axes: Axes = figure.subplots()
        sizes = [row["bytes"] for row in rows]
        speed = [row["bytes_per_second"] / 1e9 for row in rows]
        copies: dict[int, list[float]] = {}
        for row, s in zip(rows, speed, strict=True):
            copies.setdefault(row["bytes"], []).append(s / row["of_copy"])
        line = sorted((size, sum(c) / len(c)) for size, c in copies.items())
        axes.plot(
            *zip(*line, strict=True),
            color=GREY,
            linewidth=2,
            marker="o",
            markersize=3,
            label="copy_ of as many bytes",
        )
        axes.scatter(
            sizes, speed, s=16, color=BLUE, alpha=0.75, linewidths=0, label="fastops", zorder=3
        )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        units = {
            2**k: f"{2 ** (k % 10)} {'B KiB MiB GiB'.split()[k // 10]}" for k in range(4, 34, 4)
        }
        ticks = [t for t in units if min(sizes) / 2 <= t <= max(sizes) * 2]
        axes.set_xticks(ticks, [units[t] for t in ticks])
        axes.minorticks_off()
        values = [
            v
            for v in (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)
            if min(speed) / 3 <= v <= 3 * max(speed)
        ]
        axes.set_yticks(values, [f"{v:g}" for v in values])
        axes.grid(color="#e4e7eb", zorder=0)
        axes.set_xlabel("bytes that must move")
        axes.set_ylabel("GB/s")
        axes.set_title(title, loc="left", fontweight="bold")
        axes.legend(frameon=False, loc="upper left")
        return png(figure)


def draw(rows: Sequence[Row]) -> dict[str, bytes]:
    """Every chart that the timed rows of a run give, by file name."""
    timed = [row for row in rows if row["status"] == "ok"]
    made = {}
    for mode, words in PASSES.items():
        some = [row for row in timed if row["mode"] == mode]
        if some:
            name = mode.replace("+", "-")
            made[f"ratios-{name}.png"] = draw_ratios(some, f"fastops over torch: {words}")
            made[f"speed-{name}.png"] = draw_speed(some, f"Memory speed: {words}")
    return made
