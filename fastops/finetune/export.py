"""A fine-tuned network for programs without fastops: each file is read again and compared."""

import copy
import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoints import State
from .errors import ConfigError, OutputError
from .networks import DropoutHead, build, head_of
from .predict import Classifier
from .storage import complete_file
from .surroundings import usual_state

FORMATS = {"pt2": ".pt2", "torch": ".pth", "safetensors": ".safetensors", "onnx": ".onnx"}
"""The formats and what their files' names end with."""

CLASSES = "classes.json"


class Program(nn.Module):
    """From pixels to probabilities: what is exported as a program."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.model, format = classifier.model, classifier.format
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.tensor(format.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(format.std).view(1, -1, 1, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model((pixels.float() / 255 - self.mean) / self.std).softmax(1)


def program_of(classifier: Classifier) -> Program:
    """The classifier's program, its weights in torch's own order: memory is saved as it lies."""
    model = copy.deepcopy(Program(classifier).eval()).cpu()
    return model.to(memory_format=torch.contiguous_format)


def example_of(classifier: Classifier, count: int = 2) -> torch.Tensor:
    """Random images, uint8 (N, C, size, size)."""
    format = classifier.format
    shape = count, format.channels, format.size, format.size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


def plain_state(model: nn.Module) -> State:
    """A network's weights by torchvision's or timm's own names, also of one with dropout."""
    head = head_of(model)
    inner = f"{head}.1." if isinstance(model.get_submodule(head), DropoutHead) else f"{head}."
    return {
        f"{head}.{k.removeprefix(inner)}" if k.startswith(inner) else k: v.cpu().contiguous()
        for k, v in model.state_dict().items()
    }


@usual_state()
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
    batch = torch.export.Dim("batch", min=1)
    model = program_of(classifier)
    program = torch.export.export(model, (example_of(classifier),), dynamic_shapes=({0: batch},))
    names = {CLASSES: json.dumps(classifier.classes)}
    with complete_file(Path(path)) as unfinished, open(unfinished, "wb") as file:
        torch.export.save(program, file, extra_files=names)


@usual_state()
def export_network(classifier: Classifier, path: str | PathLike, format: str) -> str:
    """Write a classifier in one of FORMATS, read it again, and compare what the two answer.

    "torch" and "safetensors" hold the weights by the names of torchvision's or timm's network, and
    the classes' names; "pt2" and "onnx" are programs from pixels to probabilities.

    Returns:
        A sentence on the comparison.

    Raises:
        ConfigError: an unknown format, or one whose package is not installed.
        OutputError: the file cannot be written, or does not answer as the classifier does.
    """
    path = Path(path)
    writers = {
        "pt2": export_program,
        "torch": export_weights,
        "safetensors": export_safetensors,
        "onnx": export_onnx,
    }
    if format not in writers:
        raise ConfigError(f"unknown format {format!r}: choose from {', '.join(FORMATS)}")
    writers[format](classifier, path)
    images = example_of(classifier, 5)
    expected = classifier.probabilities(images)
    answers = answer_of(path, format, classifier, images)
    if answers is None:
        return f"{path} is written; comparing it needs `pip install onnxruntime`"
    apart = (answers - expected).abs().max().item()
    if not apart < TOLERANCE:
        raise OutputError(f"{path} answers {apart:.2g} apart from the network: do not use it")
    return f"{path} read again: probabilities at most {apart:.1g} apart"


TOLERANCE = 1e-3
"""Probabilities of a file that is the network are nearer than this, whoever computes them."""


def export_weights(classifier: Classifier, path: Path) -> None:
    """Write {"arch", "classes", "state_dict"}: plain values and tensors."""
    state = plain_state(classifier.model)
    content = {"arch": classifier.arch, "classes": classifier.classes, "state_dict": state}
    with complete_file(path) as unfinished, open(unfinished, "wb") as file:
        torch.save(content, file)


def find_safetensors() -> Any:
    """The module safetensors.torch.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise ConfigError(
            f"this format needs safetensors ({error}): pip install safetensors"
        ) from error
    return safetensors.torch


def export_safetensors(classifier: Classifier, path: Path) -> None:
    """Write the weights, the architecture and the classes in the file's header."""
    about = {"arch": classifier.arch, "classes": json.dumps(classifier.classes), "format": "pt"}
    save = find_safetensors().save_file
    with complete_file(path) as unfinished:
        save(plain_state(classifier.model), unfinished, metadata=about)


def export_onnx(classifier: Classifier, path: Path) -> None:
    """Write an ONNX program with a free number of images.

    Raises:
        ConfigError: the exporter's packages are not installed.
    """
    batch = torch.export.Dim("batch", min=1)
    options: dict[str, Any] = {"input_names": ["pixels"], "output_names": ["probabilities"]}
    try:
        program = torch.onnx.export(
            program_of(classifier), (example_of(classifier),), dynamic_shapes=({0: batch},),
            dynamo=True, verbose=False, **options,
        )  # fmt: skip
    except (ImportError, torch.onnx.OnnxExporterError) as error:
        if isinstance(error.__cause__ or error, ImportError):
            raise ConfigError(
                f"ONNX needs two packages ({error.__cause__ or error}): pip install onnx onnxscript"
            ) from error
        raise
    assert program is not None
    with complete_file(path) as unfinished:
        program.save(unfinished)


def answer_of(
    path: Path, format: str, classifier: Classifier, images: torch.Tensor
) -> torch.Tensor | None:
    """Probabilities that a file's network gives; None where nothing here can run it."""
    if format == "pt2":
        return torch.export.load(path).module()(images)
    if format == "onnx":
        try:
            import onnxruntime
        except ImportError:
            return None
        session = onnxruntime.InferenceSession(path)
        return torch.from_numpy(session.run(None, {"pixels": images.numpy()})[0])
    if format == "torch":
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    else:
        state = find_safetensors().load_file(path)
    with torch.random.fork_rng():
        model = build(classifier.arch, len(classifier.classes))
    model.load_state_dict(state)
    plain = Classifier(model.eval(), classifier.classes, classifier.format, classifier.arch)
    return plain.probabilities(images)
