"""A fine-tuned network as a file, and what it says about pictures."""

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from .config import FineTuneConfig
from .data import InputFormat, read_picture
from .errors import ConfigError, WeightsError
from .model import build, evaluating, load_weights, read_checkpoint
from .storage import complete_file
from .train import Run


@dataclass
class Classifier:
    """A fine-tuned network in eval, the names of its classes and the images that it takes."""

    model: nn.Module
    classes: list[str]
    format: InputFormat

    def probabilities(self, pixels: torch.Tensor) -> torch.Tensor:
        """Softmax over the classes, float32 (N, classes), for uint8 images (N, C, size, size)."""
        with evaluating(self.model):
            inputs = self.format.normalise(pixels).contiguous(memory_format=torch.channels_last)
            return self.model(inputs).softmax(1)

    def classify(self, paths: Sequence[str | PathLike]) -> list[tuple[str, float]]:
        """The likeliest class of each picture file and its probability.

        Raises:
            DataError: a file cannot be read.
        """
        answers = []
        for path in paths:
            pixels = read_picture(Path(path), self.format).unsqueeze(0)
            confidence, index = self.probabilities(pixels)[0].max(0)
            answers.append((self.classes[int(index)], confidence.item()))
        return answers


def save_classifier(
    path: Path,
    model: nn.Module,
    config: FineTuneConfig,
    classes: Sequence[str],
    format: InputFormat,
    run: Run,
) -> None:
    """Write a network with all that is needed to use it again; tensors and plain values only.

    Raises:
        OutputError: the file cannot be written.
    """
    content = {
        "arch": config.arch,
        "classes": list(classes),
        "dropout": config.dropout,
        "format": asdict(format),
        "mode": run.mode,
        "seed": run.seed,
        "accuracy": run.accuracy,
        "model": {name: value.cpu() for name, value in model.state_dict().items()},
    }
    with complete_file(path) as unfinished, open(unfinished, "wb") as file:
        torch.save(content, file)


class Program(nn.Module):
    """From pixels to probabilities: what `export_program` exports."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.model, format = classifier.model, classifier.format
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.tensor(format.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(format.std).view(1, -1, 1, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model((pixels.float() / 255 - self.mean) / self.std).softmax(1)


def export_program(classifier: Classifier, path: str | PathLike) -> None:
    """Write a classifier as a torch.export program, which needs torch and nothing of fastops.

    It takes uint8 images (N, C, size, size), any N, and gives probabilities, float32 (N, classes);
    the file holds the classes' names as "classes.json".

    >>> files = {"classes.json": ""}
    >>> program = torch.export.load("out.pt2", extra_files=files).module()
    >>> program(images).argmax(1)

    Raises:
        OutputError: the file cannot be written.
    """
    format = classifier.format
    example = torch.zeros(2, format.channels, format.size, format.size, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1)
    model = Program(classifier).eval()
    # What is saved is each weight's memory as a whole, in torch's own order.
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    names = {"classes.json": json.dumps(classifier.classes)}
    with complete_file(Path(path)) as unfinished, open(unfinished, "wb") as file:
        torch.export.save(program, file, extra_files=names)


def load_classifier(path: str | PathLike) -> Classifier:
    """Read a network that `finetune` saved. It runs on torch's own ops; fastops.patch it at will.

    Args:
        path: a checkpoint, or a run's folder for the best one in it.

    Raises:
        WeightsError: the file is missing, damaged or was not written by `finetune`.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "checkpoints" / "best.pt").exists():
            raise WeightsError(f"{path} is not the folder of a run that has finished a mode")
        path = path / "checkpoints" / "best.pt"
    content = read_checkpoint(path)
    try:
        format = InputFormat(**content["format"])
        model = build(content["arch"], len(content["classes"]), content["dropout"])
        load_weights(model, content["model"], head=True)
    except (AttributeError, KeyError, TypeError, ConfigError) as error:
        raise WeightsError(f"{path} was not written by finetune: {error!r}") from error
    model.to(memory_format=torch.channels_last).eval()
    return Classifier(model, content["classes"], format)
