"""A finished run on labeled pictures: its own test images, or another folder's."""

import json
import unicodedata
from collections.abc import Callable
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

import torch

from .config import FineTuneConfig
from .data import InMemory, OnDisk, iterate
from .errors import ConfigError, DataError
from .figures import draw_confusions, draw_pictures, drawable_names, find_fonts, render
from .folders import Progress, decode, list_pictures, without_progress
from .metrics import Metrics, compute_metrics, most_wrong
from .plan import load
from .predict import Classifier, load_classifier
from .report import fill_page, show_classes, show_picture, show_text, write_text
from .summary import align
from .surroundings import usual_state
from .text import printable

SHOWN = 16
"""The most wrong pictures that are shown."""

BATCH = 100


@dataclass
class Evaluation:
    """What a run's network makes of labeled images.

    Attributes:
        name: of the images.
        metrics: in figures.
        images: the images.
        probabilities: float32 (N, classes).
        skipped: files that cannot be read, each with its reason.
    """

    name: str
    classes: list[str]
    metrics: Metrics
    images: InMemory | OnDisk
    probabilities: torch.Tensor
    skipped: list[str]

    def __str__(self) -> str:
        m = self.metrics
        top = "".join(f", top-{k} {share:.3f}" for k, share in m.top.items() if k > 1)
        lines = [
            f"{self.name}: {m.images:,} images",
            f"accuracy {m.accuracy:.3f}, balanced {m.balanced_accuracy:.3f}{top}, calibration error "
            f"{m.calibration_error:.3f}, loss {m.loss:.3f}",
            "",
        ]
        rows = [("class", "images", "precision", "recall", "F1")]
        for row in m.per_class:
            shares = (row["precision"], row["recall"], row["f1"])
            figures = ("-" if share is None else f"{share:.3f}" for share in shares)
            rows.append((row["class"], f"{row['images']:,}", *figures))
        lines.append(align(rows))
        if m.confused:
            pairs = [f"{true} taken for {said} ({n})" for true, said, n in m.confused[:5]]
            lines += ["", "most confused: " + ", ".join(pairs)]
        return "\n".join(lines)


@usual_state()
def evaluate(
    run: str | PathLike,
    folder: str | PathLike | None = None,
    *,
    device: str | torch.device = "cpu",
    progress: Progress = without_progress,
) -> Evaluation:
    """Evaluate a run's best network.

    Args:
        run: the run's folder, or a checkpoint in it where `folder` is given.
        folder: pictures in one sub-folder a class, all of them classes of the run; None for the
            test images that the run kept apart.

    Raises:
        WeightsError, ConfigError, DataError: the run or the pictures cannot be used.
    """
    classifier = load_classifier(run)
    classifier.model.to(device)
    skipped: list[str] = []
    if folder is None:
        path = Path(run)
        if not path.is_dir():
            raise ConfigError(
                f"{path} is a file: name the run's folder, or a folder of pictures too"
            )
        config = FineTuneConfig.from_json(path / "config.json")
        collection = load(config, classifier.format, False)
        if collection.classes != classifier.classes:
            raise DataError(
                f"{collection.name} has other classes than when the run was made: "
                f"{', '.join(collection.classes)}"
            )
        name, images, skipped = (
            f"{collection.name}, test images",
            collection.test,
            collection.skipped,
        )
    else:
        name = printable(folder)
        images = read_labeled(Path(folder), classifier, skipped, progress)
    batches = torch.arange(len(images)).split(BATCH)
    parts = iterate(images, [batch.tolist() for batch in batches])
    probabilities = torch.cat([classifier.probabilities(pixels) for pixels, _ in parts])
    metrics = compute_metrics(probabilities, images.labels, classifier.classes)
    return Evaluation(name, classifier.classes, metrics, images, probabilities, skipped)


def read_labeled(
    folder: Path, classifier: Classifier, skipped: list[str], progress: Progress
) -> InMemory | OnDisk:
    """The pictures of a folder, labeled as the classifier's classes are.

    Raises:
        DataError: a sub-folder is none of the classes.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    listing = list_pictures(folder)
    known = {unicodedata.normalize("NFC", name): i for i, name in enumerate(classifier.classes)}
    if unknown := [name for name in listing.classes if name not in known]:
        raise DataError(
            f"{folder} has folders that are no classes of the run: {', '.join(unknown[:5])}; "
            f"its classes are {', '.join(classifier.classes[:12])}"
        )
    labels = [known[listing.classes[label]] for label in listing.labels]
    return decode(listing.paths, labels, classifier.format, skipped, progress)


def write_evaluation(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write evaluation.json and evaluation.html; the paths.

    Raises:
        OutputError: a file cannot be written.
    """
    values = {"name": evaluation.name, "classes": evaluation.classes, **asdict(evaluation.metrics)}
    values["skipped"] = evaluation.skipped
    write_text(folder / "evaluation.json", json.dumps(values, indent=1) + "\n")
    write_text(folder / "evaluation.html", make_evaluation_page(evaluation))
    return [folder / "evaluation.json", folder / "evaluation.html"]


def make_evaluation_page(evaluation: Evaluation) -> str:
    """The evaluation as one page of HTML that needs no other file."""
    metrics, images = evaluation.metrics, evaluation.images
    families, undrawable = find_fonts("".join(evaluation.classes))
    names = drawable_names(evaluation.classes, undrawable)
    wrong = most_wrong(evaluation.probabilities, images.labels, SHOWN)
    counts = torch.tensor(metrics.confusion)
    figures: dict[str, Callable] = {
        "confusion": lambda: draw_confusions(counts, names, "Share of each true class")
    }
    if wrong:
        confidence, predictions = evaluation.probabilities[wrong].max(1)
        title = f"the {len(wrong)} whose own class seemed the least likely"
        figures["wrong"] = lambda: draw_pictures(
            images, wrong, predictions, confidence, names, title
        )
    pictures = render(figures, families)
    cards = [
        (f"{metrics.accuracy:.1%}", "accuracy"),
        (f"{metrics.balanced_accuracy:.1%}", "balanced accuracy"),
        *((f"{share:.1%}", f"top-{k} accuracy") for k, share in metrics.top.items() if k > 1),
        (f"{metrics.calibration_error:.3f}", "calibration error"),
        (f"{metrics.loss:.3f}", "loss (mean negative log-likelihood)"),
    ]
    sections = [show_classes(asdict(metrics))]
    if wrong:
        sections.append(show_picture("Most wrong", "The most wrong pictures", pictures["wrong"]))
    sections.append(
        show_picture(
            "Which classes are mistaken for which", "Confusion matrix", pictures["confusion"]
        )
    )
    if evaluation.skipped:
        sections.append("<h2>Skipped</h2>" + show_text(evaluation.skipped[:20]))
    lines = [f"{evaluation.name}: {metrics.images:,} images of {len(evaluation.classes)} classes"]
    return fill_page("Evaluation", lines, cards, sections)
