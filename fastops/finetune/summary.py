"""Runs in figures: the closing table, and sentences on back ends and cached stages."""

from collections.abc import Sequence

import torch

from .measure import spread
from .run import Run

Arm = tuple[str, str]
"""A row of the table: (mode, back end)."""

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


def summarize(runs: Sequence[Run]) -> list[dict]:
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
    rows = {(row["mode"], row["backend"]): row for row in summarize(runs)}
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
