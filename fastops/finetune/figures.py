"""Pictures of runs: curves, test images with what is made of them, confusion matrices."""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from matplotlib import font_manager, rc_context, rcParams
from matplotlib.figure import Figure

from .data import Collection, InMemory, OnDisk
from .run import Run
from .summary import group_runs, name_arm

COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#666666")


def draw_curves(runs: Sequence[Run], evaluated: str = "part of the test images") -> Figure:
    """Training loss and accuracy by step: the mean of the seeds, and all of them between."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    arms = group_runs(runs)
    modes = list(dict.fromkeys(mode for mode, _ in arms))
    both = len(arms) > len(modes)
    for arm, repeats in arms.items():
        # The two back ends lie on each other: torch's line is drawn dashed and dark above.
        style: dict = {"color": COLORS[modes.index(arm[0]) % len(COLORS)]}
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
    accuracies.set(xlabel="step", ylabel=f"accuracy on {evaluated}", ylim=(None, 1.01))
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


@contextlib.contextmanager
def quiet_fonts() -> Iterator[None]:
    """Keep matplotlib from saying that a font has no regular weight, where any weight will do."""
    logger = logging.getLogger(font_manager.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@quiet_fonts()
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
    test = collection.test
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    right = (run.predictions == test.labels)[order]
    shown = torch.cat([order[~right][:8], order[right]])[:24]
    shown = shown[torch.randperm(len(shown), generator=torch.Generator().manual_seed(1))]
    mistakes = int((~right).sum())
    title = (
        f"{run.mode}, seed {run.seed}: {mistakes} of {len(right):,} test images wrong; "
        f"{int((run.predictions != test.labels)[shown].sum())} of them among these {len(shown)}"
    )
    answers = run.predictions[shown], run.confidence[shown]
    return draw_pictures(test, shown.tolist(), *answers, collection.classes, title)


def draw_pictures(
    images: InMemory | OnDisk,
    shown: Sequence[int],
    predictions: torch.Tensor,
    confidence: torch.Tensor,
    classes: Sequence[str],
    title: str,
) -> Figure:
    """Some of the images, each with its predicted class and, where that is wrong, the true one."""
    names = [shorten(name, 15) for name in classes]
    pictures, labels = images.__getitems__(list(shown))
    across = min(8, max(4, len(shown)))
    rows = max(1, -(-len(shown) // across))
    figure = Figure(figsize=(1.5 * across, 0.5 + 1.75 * rows), layout="constrained")
    plots = figure.subplots(rows, across, squeeze=False).ravel()
    for plot in plots:
        plot.axis("off")
    answers = zip(predictions.tolist(), confidence.tolist(), labels.tolist(), strict=True)
    for plot, picture, (predicted, share, label) in zip(plots, pictures, answers, strict=False):
        caption = f"{names[predicted]} {share:.0%}"
        wrong = predicted != label
        if wrong:
            caption += f"\nis {names[label]}"
        plot.imshow(picture.permute(1, 2, 0).squeeze(2).numpy(), cmap="gray", vmin=0, vmax=255)
        plot.set_title(caption, fontsize=9, color="#c00000" if wrong else "#007030")
    figure.suptitle(title, fontsize=10)
    return figure


def count_confusions(runs: Sequence[Run], collection: Collection) -> torch.Tensor:
    """Test images by true class (rows) and predicted class (columns), summed over the runs."""
    classes = len(collection.classes)
    true = collection.test.labels.repeat(len(runs))
    predicted = torch.cat([run.predictions for run in runs])
    return torch.bincount(true * classes + predicted, minlength=classes**2).view(classes, classes)


def draw_confusions(counts: torch.Tensor, classes: Sequence[str], title: str) -> Figure:
    """A confusion matrix (rows: true classes), each row as shares of its true class."""
    share = counts.double()
    share /= share.sum(1, keepdim=True).clamp(min=1)
    number = len(classes)
    side = min(12.0, 2.5 + 0.6 * number)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    names = [shorten(name, 24) for name in classes]
    size = min(10.0, 600 / number)
    axes.set_xticks(range(number), names, rotation=45, ha="right", fontsize=size)
    axes.set_yticks(range(number), names, fontsize=size)
    if number <= 15:
        for row in range(number):
            for column in range(number):
                value = share[row, column].item()
                color = "white" if value > 0.5 else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
    return figure


def render(
    figures: Mapping[str, Callable[[], Figure]], families: Sequence[str]
) -> dict[str, bytes]:
    """PNG files by name, drawn with these font families."""
    pictures = {}
    for name, draw in figures.items():
        buffer = io.BytesIO()
        # A class may be called "$": that begins no formula.
        with quiet_fonts(), rc_context({"font.family": list(families), "text.parse_math": False}):
            draw().savefig(buffer, format="png", dpi=110)
        pictures[name] = buffer.getvalue()
    return pictures
