"""A fine-tuned network as a file, and what it says about pictures."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from .checkpoints import load_weights, read_checkpoint
from .config import FineTuneConfig
from .data import count_cores
from .errors import ConfigError, DataError, WeightsError
from .networks import build, evaluating
from .pictures import InputFormat, read_picture
from .run import Run
from .storage import complete_file
from .surroundings import usual_state

BATCH = 32
"""Pictures that are decoded and classified at once."""


@dataclass
class Answer:
    """What a picture file shows.

    Attributes:
        path: as given.
        classes: names and probabilities, the likeliest first; empty where it cannot be read.
        error: why it cannot be read, else None.
    """

    path: Path
    classes: list[tuple[str, float]]
    error: DataError | None = None


@dataclass
class Classifier:
    """A fine-tuned network in eval, the names of its classes and the images that it takes."""

    model: nn.Module
    classes: list[str]
    format: InputFormat
    arch: str

    @usual_state()
    def probabilities(self, pixels: torch.Tensor) -> torch.Tensor:
        """Softmax over the classes, float32 (N, classes), for uint8 images (N, C, size, size)."""
        device = next(self.model.parameters()).device
        with evaluating(self.model):
            inputs = self.format.normalize(self.format.center(pixels.to(device)))
            inputs = inputs.contiguous(memory_format=torch.channels_last)
            return self.model(inputs).softmax(1).cpu()

    def classify(self, paths: Sequence[str | PathLike]) -> list[tuple[str, float]]:
        """The likeliest class of each picture file and its probability.

        Raises:
            DataError: a file cannot be read.
        """
        answers = []
        for answer in self.rank(paths):
            if answer.error is not None:
                raise answer.error
            answers += answer.classes
        return answers

    def rank(self, paths: Sequence[str | PathLike], top_k: int = 1) -> Iterator[Answer]:
        """The `top_k` likeliest classes of each picture file, one after another as they are known.

        A file that cannot be read gets an answer that says why.
        """
        files = [Path(path) for path in paths]
        with ThreadPoolExecutor(count_cores()) as pool:
            for start in range(0, len(files), BATCH):
                some = files[start : start + BATCH]
                read = list(pool.map(self.try_to_read, some))
                pixels = [picture for picture in read if isinstance(picture, torch.Tensor)]
                likeliest = iter(
                    zip(
                        *self.probabilities(torch.stack(pixels)).topk(self.count(top_k)),
                        strict=True,
                    )
                    if pixels
                    else ()
                )
                for path, picture in zip(some, read, strict=True):
                    if isinstance(picture, DataError):
                        yield Answer(path, [], picture)
                        continue
                    shares, indices = (values.tolist() for values in next(likeliest))
                    names = [self.classes[i] for i in indices]
                    yield Answer(path, list(zip(names, shares, strict=True)))

    def count(self, top_k: int) -> int:
        """How many classes an answer has.

        Raises:
            ConfigError: fewer than one.
        """
        if top_k < 1:
            raise ConfigError(f"top_k must be 1 or more, got {top_k}")
        return min(top_k, len(self.classes))

    def try_to_read(self, path: Path) -> torch.Tensor | DataError:
        """The pixels of a picture file, or why there are none."""
        try:
            return read_picture(path, self.format)
        except DataError as error:
            return error


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
        "arch": config.chosen_arch,
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


@usual_state()
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
    return Classifier(model, content["classes"], format, content["arch"])
