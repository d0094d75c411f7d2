"""What a run leaves for a reader: the closing table, pictures, metrics and one HTML page."""

import base64
import contextlib
import html
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib import font_manager, rc_context, rcParams
from matplotlib.figure import Figure

from .config import FineTuneConfig, plain
from .data import Collection
from .measure import spread
from .run import Run
from .storage import complete_file

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#666666")

Arm = tuple[str, str]
"""A row of the table: (mode, back end)."""


def group_runs(runs: Sequence[Run]) -> dict[Arm, list[Run]]:
    """Runs by arm, in the order they were made."""
    arms: dict[Arm, list[Run]] = {}
    for run in runs:
        arms.setdefault((run.mode, run.backend), []).append(run)
    return arms


def name_arm(arm: Arm, arms: Sequence[Arm]) -> str:
    """The mode, with its back end where there is more than one."""
    mode, backend = arm
    return mode if len({b for _, b in arms}) == 1 else f"{mode} ({backend})"


def summarise(runs: Sequence[Run]) -> list[dict]:
    """One row of figures for each arm: accuracy over its seeds, means of the rest."""
    rows = []
    arms = group_runs(runs)
    for arm, repeats in arms.items():
        mean, deviation = spread(run.accuracy for run in repeats)
        peaks = [run.peak_memory for run in repeats if run.peak_memory is not None]
        speedups = [run.epoch_speedup for run in repeats if run.epoch_speedup is not None]
        rows.append(
            {
                "name": name_arm(arm, list(arms)),
                "mode": arm[0],
                "backend": arm[1],
                "seeds": len(repeats),
                "parameters": repeats[0].parameters,
                "accuracy": mean,
                "accuracy_sd": deviation,
                "accuracy_min": min(run.accuracy for run in repeats),
                "accuracy_max": max(run.accuracy for run in repeats),
                "first_loss": spread(run.losses[0] for run in repeats)[0],
                "last_loss": spread(run.losses[-1] for run in repeats)[0],
                "seconds": spread(run.seconds for run in repeats)[0],
                "seconds_per_step": spread(run.seconds_per_step for run in repeats)[0],
                "peak_memory": max(peaks) if peaks else None,
                "images_per_second": spread(run.images_per_second for run in repeats)[0],
                "epoch_speedup": spread(speedups)[0] if speedups else None,
            }
        )
    return rows


HEADINGS = (
    "mode",
    "trained values",
    "accuracy",
    "lowest-highest",
    "first loss",
    "last loss",
    "s/run",
    "ms/step",
    "images/s",
    "peak MB",
)


def table_cells(rows: Sequence[dict]) -> list[tuple[str, ...]]:
    """The table's cells as text, one tuple a row, in the order of HEADINGS."""
    return [
        (
            row["name"],
            f"{row['parameters']:,}",
            f"{row['accuracy']:.3f} ± {row['accuracy_sd']:.3f}",
            f"{row['accuracy_min']:.3f}-{row['accuracy_max']:.3f}",
            f"{row['first_loss']:.4f}",
            f"{row['last_loss']:.4f}",
            f"{row['seconds']:.2f}",
            f"{1e3 * row['seconds_per_step']:.2f}",
            f"{row['images_per_second']:,.0f}",
            "-" if row["peak_memory"] is None else f"{row['peak_memory'] / 1e6:,.0f}",
        )
        for row in rows
    ]


def format_table(rows: Sequence[dict]) -> str:
    """The closing table as aligned text."""
    return align([HEADINGS, *table_cells(rows)])


def align(lines: Sequence[tuple[str, ...]]) -> str:
    """Cells in columns, the first line ruled off."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    text.insert(1, "-" * len(text[0]))
    return "\n".join(text)


def describe_keeping(rows: Sequence[dict]) -> str:
    """A sentence on what running the frozen stages only once saved; empty if they were not."""
    parts = [
        f"{row['epoch_speedup']:.1f}x in {row['name']}" for row in rows if row["epoch_speedup"]
    ]
    return f"Frozen stages ran once; that makes an epoch faster: {', '.join(parts)}." * bool(parts)


def compare_backends(runs: Sequence[Run]) -> list[str]:
    """For each mode that ran on both back ends, a sentence: losses, accuracy and time."""
    sentences = []
    rows = {(row["mode"], row["backend"]): row for row in summarise(runs)}
    arms = group_runs(runs)
    for mode in dict.fromkeys(run.mode for run in runs):
        if (mode, "torch") not in arms or (mode, "fastops") not in arms:
            continue
        torchs, ours = rows[mode, "torch"], rows[mode, "fastops"]
        apart = abs(ours["first_loss"] / torchs["first_loss"] - 1)
        between, noise = curve_distances(arms[mode, "torch"], arms[mode, "fastops"])
        ratio = torchs["seconds_per_step"] / ours["seconds_per_step"]
        seeds = "" if noise is None else f"; those of two seeds on torch {noise:.2g}"
        sentences.append(
            f"{mode}: first losses {apart:.0e} apart (relative), loss curves {between:.2g} (mean of "
            f"the steps{seeds}), accuracy {ours['accuracy'] - torchs['accuracy']:+.3f}, torch's "
            f"time for a step over fastops' {ratio:.2f}."
        )
    return sentences


def curve_distances(torchs: Sequence[Run], ours: Sequence[Run]) -> tuple[float, float | None]:
    """How far apart the losses of a step are in the mean: on two back ends with one seed, and on torch with two seeds
    (None where there is one)."""

    def distance(a: Run, b: Run) -> float:
        length = min(len(a.losses), len(b.losses))
        both = torch.tensor([a.losses[:length], b.losses[:length]], dtype=torch.float64)
        return (both[0] - both[1]).abs().mean().item()

    between = [distance(a, b) for a, b in zip(torchs, ours, strict=False)]
    noise = [distance(a, b) for i, a in enumerate(torchs) for b in torchs[:i]]
    return spread(between)[0], spread(noise)[0] if noise else None


def best_arm(runs: Sequence[Run]) -> list[Run]:
    """The runs of the arm with the highest mean accuracy, the last of several."""
    return max(
        reversed(group_runs(runs).values()), key=lambda runs: spread(r.accuracy for r in runs)[0]
    )


def draw_curves(runs: Sequence[Run]) -> Figure:
    """Training loss and test accuracy by step: the mean of the seeds, and all of them between."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    arms = group_runs(runs)
    modes = list(dict.fromkeys(mode for mode, _ in arms))
    both = len(arms) > len(modes)
    for arm, repeats in arms.items():
        # The two back ends lie on each other: torch's line is drawn dashed and dark above.
        style: dict = {"color": COLOURS[modes.index(arm[0]) % len(COLOURS)]}
        name = name_arm(arm, list(arms))
        if both and arm[1] == "torch":
            style = {"color": "#222222", "linestyle": (0, (1, 3)), "zorder": 3}
            name = "each of them (torch)" if arm[0] == modes[-1] else "_"  # once in the legend
        # Runs that stopped early are shorter.
        length = min(len(run.losses) for run in repeats)
        loss = torch.tensor([run.losses[:length] for run in repeats])
        # Averaging a few neighbours shows the course; single batches are noise.
        window = max(1, min(5, length // 8))
        loss = loss.unfold(1, window, 1).mean(2).mean(0)
        losses.plot(range(window, window + len(loss)), loss.tolist(), label=name, **style)
        points = min(len(run.curve) for run in repeats)
        steps = [step for step, _ in repeats[0].curve[:points]]
        values = torch.tensor([[a for _, a in run.curve[:points]] for run in repeats])
        mean, low, high = (v.tolist() for v in (values.mean(0), values.amin(0), values.amax(0)))
        accuracies.plot(steps, mean, marker="o", markersize=3, label=name, **style)
        accuracies.fill_between(steps, low, high, alpha=0.15, linewidth=0, **style)
    for axes in (losses, accuracies):
        axes.xaxis.get_major_locator().set_params(integer=True)
    losses.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    accuracies.set(xlabel="step", ylabel="accuracy on part of the test images", ylim=(None, 1))
    for axes in (losses, accuracies):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    accuracies.legend(frameon=False, loc="lower right")
    return figure


def letters(path: str) -> set[str]:
    """The characters that a font file can draw; none if it cannot be read."""
    with contextlib.suppress(OSError, RuntimeError):
        return set(map(chr, font_manager.get_font(path).get_charmap()))
    return set()


def find_fonts(text: str) -> tuple[list[str], set[str]]:
    """Families of installed fonts that can draw `text` between them, matplotlib's own first; and the characters that
    none can."""
    families = list(rcParams["font.family"])
    missing = set(text) - letters(font_manager.findfont(font_manager.FontProperties()))
    fonts = {}
    if missing:
        names = {entry.name for entry in font_manager.fontManager.ttflist}
        regular = {name: font_manager.FontProperties(family=[name]) for name in sorted(names)}
        fonts = {
            name: missing & letters(font_manager.findfont(properties))
            for name, properties in regular.items()
            if not name.startswith("Last Resort")  # which has a box for each
        }
    while missing and fonts:
        best = max(fonts, key=lambda name: len(fonts[name] & missing))
        if not fonts[best] & missing:
            break
        families.append(best)
        missing -= fonts[best]
    return families, missing


def drawable_names(classes: Sequence[str], undrawable: set[str]) -> list[str]:
    """The classes' names, or their numbers where no font has the letters."""
    return [f"class {i}" if set(c) & undrawable else c for i, c in enumerate(classes, 1)]


def shorten(name: str, length: int) -> str:
    """The name, cut off where it is longer."""
    return name if len(name) <= length else name[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"


def draw_predictions(run: Run, collection: Collection) -> Figure:
    """Test images with their predicted class and, where that is wrong, the true one.

    A third of them are mistakes (as far as there are any), the rest are drawn at random.
    """
    names = [shorten(name, 15) for name in collection.classes]
    order = torch.randperm(len(collection.test), generator=torch.Generator().manual_seed(0))
    right = (run.predictions == collection.test.labels)[order]
    shown = torch.cat([order[~right][:8], order[right]])[:24]
    shown = shown[torch.randperm(len(shown), generator=torch.Generator().manual_seed(1))]
    pictures, labels = collection.test.__getitems__(shown.tolist())
    rows = -(-len(shown) // 8)
    figure = Figure(figsize=(12, 0.5 + 1.7 * rows), layout="constrained")
    plots = figure.subplots(rows, 8).ravel()
    for plot in plots:
        plot.axis("off")
    for plot, index, picture, label in zip(plots, shown.tolist(), pictures, labels, strict=False):
        predicted = int(run.predictions[index])
        title = f"{names[predicted]} {run.confidence[index]:.0%}"
        wrong = predicted != int(label)
        if wrong:
            title += f"\nis {names[int(label)]}"
        plot.imshow(picture.permute(1, 2, 0).squeeze(2).numpy(), cmap="gray", vmin=0, vmax=255)
        plot.set_title(title, fontsize=9, color="#c00000" if wrong else "#007030")
    mistakes = int((~right).sum())
    figure.suptitle(
        f"{run.mode}, seed {run.seed}: {mistakes} of {len(right):,} test images wrong; "
        f"{int((run.predictions[shown] != labels).sum())} of them among these {len(shown)}",
        fontsize=10,
    )
    return figure


def count_confusions(runs: Sequence[Run], collection: Collection) -> torch.Tensor:
    """Test images by true class (rows) and predicted class (columns), summed over the runs."""
    classes = len(collection.classes)
    true = collection.test.labels.repeat(len(runs))
    predicted = torch.cat([run.predictions for run in runs])
    return torch.bincount(true * classes + predicted, minlength=classes**2).view(classes, classes)


def draw_confusions(runs: Sequence[Run], collection: Collection) -> Figure:
    """The confusion matrix of one arm over its seeds, each row as shares of its true class."""
    share = count_confusions(runs, collection).double()
    share /= share.sum(1, keepdim=True)
    classes = len(collection.classes)
    side = min(12.0, 2.5 + 0.6 * classes)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    seeds = "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"
    axes.set(xlabel="predicted", ylabel="true", title=f"{runs[0].mode}, {seeds}")
    names = [shorten(name, 24) for name in collection.classes]
    size = min(10.0, 600 / classes)
    axes.set_xticks(range(classes), names, rotation=45, ha="right", fontsize=size)
    axes.set_yticks(range(classes), names, fontsize=size)
    if classes <= 15:
        for row in range(classes):
            for column in range(classes):
                value = share[row, column].item()
                colour = "white" if value > 0.5 else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
    return figure


def describe_run(run: Run) -> dict:
    """A run as plain values for JSON; its predictions are a list of class indices."""
    values = asdict(run)
    del values["confidence"]
    values["predictions"] = run.predictions.tolist()
    return values


def write_report(
    folder: Path,
    config: FineTuneConfig,
    collection: Collection,
    runs: Sequence[Run],
    summary: Sequence[dict],
    description: Sequence[str],
) -> None:
    """Write metrics.json, curves.png, predictions.png, confusion.png and report.html.

    Raises:
        OutputError: a file cannot be written; the others are whole.
    """
    best = best_arm(runs)
    metrics: dict[str, Any] = {
        "config": {name: plain(value) for name, value in asdict(config).items()},
        "versions": {"torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "data": {
            "name": collection.name,
            "classes": collection.classes,
            "test_labels": collection.test.labels.tolist(),
            "skipped": collection.skipped,
        },
        "summary": list(summary),
        "confusion": {
            "mode": best[0].mode,
            "backend": best[0].backend,
            "counts": count_confusions(best, collection).tolist(),
        },
        "runs": [describe_run(run) for run in runs],
    }
    write_text(folder / "metrics.json", json.dumps(metrics) + "\n")
    families, undrawable = find_fonts("".join(collection.classes))
    drawn = replace(collection, classes=drawable_names(collection.classes, undrawable))
    figures: dict[str, Callable[[], Figure]] = {
        "curves": lambda: draw_curves(runs),
        "predictions": lambda: draw_predictions(best[0], drawn),
        "confusion": lambda: draw_confusions(best, drawn),
    }
    pictures = {}
    for name, draw in figures.items():
        buffer = io.BytesIO()
        # A class may be called "$": that begins no formula.
        with rc_context({"font.family": families, "text.parse_math": False}):
            draw().savefig(buffer, format="png", dpi=110)
        pictures[name] = buffer.getvalue()
        with complete_file(folder / f"{name}.png") as path:
            path.write_bytes(pictures[name])
    numbered = (
        undrawable
        and "Classes that no installed font can write have the numbers of the list above."
    )
    comments = [*compare_backends(runs), *([numbered] if numbered else [])]
    page = make_page(summary, description, pictures, metrics["config"], comments)
    write_text(folder / "report.html", page)


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 file or nothing."""
    with complete_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Fine-tuning report</title>
<meta name="viewport" content="width=device-width">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 0 auto; padding: 2rem 1.5rem;
  color: #1c2430; background: #f4f6f8 }}
h1 {{ font-size: 1.9rem; margin: 0 0 .5rem }}
h2 {{ font-size: 1.15rem; margin: 0 0 .8rem }}
header p {{ margin: .1rem 0; color: #4a5563 }}
section, .cards div {{ background: #fff; border: 1px solid #e1e5ea; border-radius: 10px }}
section {{ padding: 1.2rem 1.4rem; margin-top: 1.2rem; overflow-x: auto }}
.cards {{ display: flex; flex-wrap: wrap; gap: 1rem; margin-top: 1.4rem }}
.cards div {{ flex: 1 1 11rem; padding: .8rem 1.2rem; color: #4a5563; font-size: .9rem }}
.cards b {{ display: block; font-size: 1.7rem; color: #0b5cad; font-variant-numeric: tabular-nums }}
table {{ border-collapse: collapse; width: 100%; font-size: .9rem; white-space: nowrap }}
th, td {{ padding: .4rem .45rem; text-align: right; border-bottom: 1px solid #e6e9ed }}
th {{ color: #4a5563; font-weight: 600 }}
th:first-child, td:first-child {{ text-align: left }}
td {{ font-variant-numeric: tabular-nums }}
tr.best td {{ background: #eaf3fc; font-weight: 600 }}
img {{ display: block; max-width: 100%; height: auto; margin: 0 auto }}
p.small {{ color: #4a5563; font-size: .85rem; margin: .9rem 0 0; white-space: normal }}
pre {{ font-size: .8rem; overflow-x: auto }}
summary {{ cursor: pointer; font-weight: 600 }}
</style>
<header><h1>Fine-tuning report</h1>
{paragraphs}</header>
<div class="cards">{cards}</div>
<section><table><thead><tr>{headings}</tr></thead><tbody>
{rows}
</tbody></table>
<p class="small">Accuracy: mean ± standard deviation over the seeds, lowest and highest; all test
images, after the last step. s/run: training one network, without evaluation. ms/step: median. Peak MB:
how far the memory in use rose.</p>
{comments}</section>
<section><h2>Training</h2>
<img alt="Loss and accuracy by step" src="data:image/png;base64,{curves}"></section>
<section><h2>Test images and what the best mode makes of them</h2>
<img alt="Test images with predictions" src="data:image/png;base64,{predictions}"></section>
<section><h2>Which classes are mistaken for which</h2>
<img alt="Confusion matrix" src="data:image/png;base64,{confusion}"></section>
<section><details><summary>Options</summary><pre>{options}</pre></details></section>
</html>
"""


def make_page(
    summary: Sequence[dict],
    description: Sequence[str],
    pictures: dict[str, bytes],
    options: dict,
    comments: Sequence[str] = (),
) -> str:
    """The report as one page of HTML that needs no other file; the comments stand below its table."""
    best = max(reversed(summary), key=lambda row: row["accuracy"])
    figures = [
        (f"{best['accuracy']:.1%}", f"accuracy of {best['name']}, the best mode"),
        (f"{1e3 * best['seconds_per_step']:.1f} ms", "for a step of it"),
        (f"{best['images_per_second']:,.0f}", "images a second"),
    ]
    speedups = [row["epoch_speedup"] for row in summary if row["epoch_speedup"]]
    if speedups:
        figures.append((f"{max(speedups):.0f} times", "faster epochs on kept outputs"))
    cells = [
        f"<tr{' class=best' * (row is best)}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row_cells)
        + "</tr>"
        for row, row_cells in zip(summary, table_cells(summary), strict=True)
    ]
    return PAGE.format(
        paragraphs="\n".join(f"<p>{html.escape(line)}</p>" for line in description),
        headings="".join(f"<th>{heading}</th>" for heading in HEADINGS),
        rows="\n".join(cells),
        cards="".join(
            f"<div><b>{html.escape(figure)}</b>{html.escape(what)}</div>"
            for figure, what in figures
        ),
        comments="\n".join(
            f'<p class="small">{html.escape(line)}</p>'
            for line in (describe_keeping(summary), *comments)
            if line
        ),
        options=html.escape(json.dumps(options, indent=2)),
        **{name: base64.b64encode(content).decode() for name, content in pictures.items()},
    )
