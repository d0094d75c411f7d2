"""What a run leaves for a reader: metrics.json, pictures, and one HTML page."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from .config import FineTuneConfig, plain
from .data import Collection
from .figures import (
    count_confusions,
    draw_confusions,
    draw_curves,
    draw_predictions,
    drawable_names,
    find_fonts,
    render,
)
from .run import Run
from .storage import complete_file
from .summary import HEADINGS, best_arm, compare_backends, describe_keeping, table_cells


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
    confusion = count_confusions(best, collection)
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
            "counts": confusion.tolist(),
        },
        "runs": [describe_run(run) for run in runs],
    }
    write_text(folder / "metrics.json", json.dumps(metrics) + "\n")
    families, undrawable = find_fonts("".join(collection.classes))
    drawn = replace(collection, classes=drawable_names(collection.classes, undrawable))
    seeds = "1 seed" if len(best) == 1 else f"{len(best)} seeds"
    evaluated = "part of the test images"
    if collection.validation is not None:
        evaluated = "the validation images"
    figures = {
        "curves": lambda: draw_curves(runs, evaluated),
        "predictions": lambda: draw_predictions(best[0], drawn),
        "confusion": lambda: draw_confusions(confusion, drawn.classes, f"{best[0].mode}, {seeds}"),
    }
    pictures = render(figures, families)
    for name, content in pictures.items():
        with complete_file(folder / f"{name}.png") as path:
            path.write_bytes(content)
    numbered = (
        undrawable
        and "Classes that no installed font can write have the numbers of the list above."
    )
    comments = [*compare_backends(runs), *([numbered] if numbered else [])]
    page = make_page(summary, description, pictures, metrics["config"], comments, best)
    write_text(folder / "report.html", page)


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 file or nothing."""
    with complete_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 0 auto; padding: 2rem 1.5rem;
  color: #1c2430; background: #f4f6f8 }}
h1 {{ font-size: 1.9rem; margin: 0 0 .5rem }}
h2 {{ font-size: 1.15rem; margin: 0 0 .8rem }}
h2.more {{ margin-top: 1.4rem }}
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
<header><h1>{title}</h1>
{paragraphs}</header>
<div class="cards">{cards}</div>
{sections}
</html>
"""

LEGEND = (
    "Accuracy: mean ± standard deviation over the seeds, lowest and highest; all test images, "
    "once. s/run: training one network, without evaluation. ms/step: median. Peak MB: how "
    "far the memory in use rose."
)


def fill_page(
    title: str,
    paragraphs: Sequence[str],
    cards: Sequence[tuple[str, str]],
    sections: Sequence[str],
) -> str:
    """A page of HTML that needs no other file.

    Args:
        cards: figures, each with what it is.
        sections: HTML.
    """
    return PAGE.format(
        title=html.escape(title),
        paragraphs="\n".join(f"<p>{html.escape(line)}</p>" for line in paragraphs),
        cards="".join(
            f"<div><b>{html.escape(figure)}</b>{html.escape(what)}</div>" for figure, what in cards
        ),
        sections="\n".join(f"<section>{section}</section>" for section in sections),
    )


def show_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[bool] = ()
) -> str:
    """A table in HTML; marked rows stand out."""
    cells = [
        f"<tr{' class=best' * (bool(marked) and marked[i])}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        + "</tr>"
        for i, row in enumerate(rows)
    ]
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(cells)}</tbody></table>"


def show_picture(title: str, alternative: str, content: bytes) -> str:
    """A picture in HTML, below its title."""
    data = base64.b64encode(content).decode()
    return (
        f"<h2>{html.escape(title)}</h2>"
        f'<img alt="{html.escape(alternative)}" src="data:image/png;base64,{data}">'
    )


def show_classes(metrics: Mapping[str, Any]) -> str:
    """Metrics by class, and the pairs that are confused, in HTML."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    names = ("precision", "recall", "f1")
    rows = [
        (row["class"], f"{row['images']:,}", *(share(row[name]) for name in names))
        for row in metrics["per_class"]
    ]
    text = "<h2>By class</h2>" + show_table(("class", "images", "precision", "recall", "F1"), rows)
    if metrics["confused"]:
        pairs = [(f"{true}", f"{said}", f"{count:,}") for true, said, count in metrics["confused"]]
        text += "<h2 class=more>Most confused</h2>" + show_table(
            ("is", "taken for", "images"), pairs
        )
    return text


def show_text(lines: Sequence[str]) -> str:
    """Small paragraphs in HTML."""
    return "".join(f'<p class="small">{html.escape(line)}</p>' for line in lines if line)


def make_page(
    summary: Sequence[dict],
    description: Sequence[str],
    pictures: Mapping[str, bytes],
    options: Mapping[str, Any],
    comments: Sequence[str],
    best_runs: Sequence[Run],
) -> str:
    """The report as one page of HTML that needs no other file; the comments stand below its table."""
    best = max(reversed(summary), key=lambda row: row["accuracy"])
    metrics = best_runs[0].metrics
    alone = len(summary) == 1
    cards = [
        (
            f"{best['accuracy']:.1%}",
            "test accuracy" if alone else f"test accuracy of {best['name']}, the best mode",
        )
    ]
    if metrics:
        cards += [
            (f"{metrics['balanced_accuracy']:.1%}", "balanced accuracy"),
            (f"{metrics['calibration_error']:.3f}", "calibration error"),
        ]
    cards += [
        (f"{1e3 * best['seconds_per_step']:.1f} ms", "for a step of training"),
        (f"{best['images_per_second']:,.0f}", "images a second"),
    ]
    speedups = [row["epoch_speedup"] for row in summary if row["epoch_speedup"]]
    if speedups:
        cards.append((f"{max(speedups):.0f} times", "faster epochs on kept outputs"))
    table = show_table(
        HEADINGS, table_cells(summary), [row is best and not alone for row in summary]
    )
    sections = [
        show_picture("Training", "Loss and accuracy by step", pictures["curves"]),
        show_picture(
            "Test images and what is made of them",
            "Test images with predictions",
            pictures["predictions"],
        ),
        show_picture(
            "Which classes are mistaken for which", "Confusion matrix", pictures["confusion"]
        ),
        *([show_classes(metrics)] if metrics else []),
        table + show_text([LEGEND, describe_keeping(summary), *comments]),
        "<details><summary>Options</summary><pre>"
        f"{html.escape(json.dumps(dict(options), indent=2))}</pre></details>",
    ]
    if not alone:
        sections.insert(0, sections.pop(-2))
    return fill_page("Fine-tuning report", description, cards, sections)
