"""What predictions are worth: counts and shares over test images, of which a paper has the definitions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

BINS = 15
"""Of the calibration error (Guo et al. 2017)."""

PAIRS = 10
"""The most confused pairs that are listed."""


@dataclass
class Metrics:
    """Figures of a classifier on labeled images.

    Attributes:
        images: their number.
        accuracy: share that is predicted rightly.
        balanced_accuracy: mean of the recalls of the classes that there are images of.
        top: share whose class is among the k likeliest, by k.
        calibration_error: mean distance of confidence and accuracy over 15 equal bins of confidence.
        loss: mean negative log-likelihood.
        per_class: for each class its name, images, precision, recall and F1 (None where 0 / 0).
        confusion: images by true class (rows) and predicted class (columns).
        confused: (true class, predicted class, images), the most frequent first.
    """

    images: int
    accuracy: float
    balanced_accuracy: float
    top: dict[int, float]
    calibration_error: float
    loss: float
    per_class: list[dict[str, Any]]
    confusion: list[list[int]]
    confused: list[tuple[str, str, int]]


def compute_metrics(
    probabilities: torch.Tensor,
    labels: torch.Tensor,
    classes: Sequence[str],
    top: Sequence[int] = (1, 5),
) -> Metrics:
    """The metrics of predicted probabilities, float (N, classes), for labels int64 (N,)."""
    number = len(classes)
    confidence, predictions = probabilities.double().max(1)
    right = predictions == labels
    counts = torch.bincount(labels * number + predictions, minlength=number**2)
    counts = counts.view(number, number)
    per_class: list[dict[str, Any]] = []
    for index, name in enumerate(classes):
        hits, true = int(counts[index, index]), int(counts[index].sum())
        predicted = int(counts[:, index].sum())
        per_class.append(
            {
                "class": name,
                "images": true,
                "precision": hits / predicted if predicted else None,
                "recall": hits / true if true else None,
                "f1": 2 * hits / (true + predicted) if true + predicted else None,
            }
        )
    recalls = [row["recall"] for row in per_class if row["recall"] is not None]
    order = probabilities.argsort(dim=1, descending=True, stable=True)
    ranks = (order == labels.unsqueeze(1)).double().argmax(1)
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    apart = torch.zeros(BINS, dtype=torch.float64)
    apart.index_add_(0, bins, confidence - right.double())
    own = probabilities.double().gather(1, labels.unsqueeze(1)).clamp(min=1e-12)
    wrong = counts.clone().fill_diagonal_(0).flatten()
    frequent = wrong.argsort(stable=True, descending=True)[:PAIRS].tolist()
    return Metrics(
        len(labels),
        right.double().mean().item(),
        sum(recalls) / len(recalls),
        {k: (ranks < k).double().mean().item() for k in top if k < number},
        (apart.abs().sum() / len(labels)).item(),
        -own.log().mean().item(),
        per_class,
        counts.tolist(),
        [(classes[i // number], classes[i % number], int(wrong[i])) for i in frequent if wrong[i]],
    )


def most_wrong(probabilities: torch.Tensor, labels: torch.Tensor, count: int) -> list[int]:
    """The images whose own class was thought the least likely, of those that are predicted wrongly."""
    own = probabilities.gather(1, labels.unsqueeze(1))[:, 0]
    wrong = (probabilities.argmax(1) != labels).nonzero()[:, 0]
    return wrong[own[wrong].argsort()][:count].tolist()
