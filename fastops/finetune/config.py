"""The options of a run and what they may be."""

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path

from .errors import ConfigError
from .freezing import parse_mode
from .networks import check_arch

OPTIMIZERS = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD", "rmsprop": "RMSprop"}


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig:
    """One fine-tuning experiment: every mode, with every seed, on every back end.

    Attributes:
        data: "shipped" (five Fashion-MNIST classes the checkpoint has not seen), "fashion-mnist"
            (the same, all images, from Debian's files or a download), or a folder of pictures with one
            sub-folder a class, or train/ and val/ of such.
        arch: "small" (ResNet-14 for 28 x 28 gray images), one of torchvision's classification models, or
            "timm/NAME". None: that of the weights where they are a file, else small.
        weights: "DEFAULT", "none" or a checkpoint file (.pt, .pth, .safetensors).
        modes: any of "features" (backbone frozen), "last" or "last:N" (last N stages trained too),
            "full" (everything, the backbone at `backbone_rate`) and "scratch" (random weights).
            None: all four, or scratch alone when there are no weights.
        backend: "fastops", "torch" (the identical recipe on native ops), or "both".
        seeds: repetitions; a seed draws the images, the batches and the head.
        shots: training images a class; 0 takes all, None takes 10 of the shipped data and all of
            other data.
        image_size: side of the square images; None for the architecture's own.
        test_fraction: share kept for testing when the folder has no val/.
        strict: refuse pictures that cannot be read instead of skipping them.
        steps: optimizer steps of each run; wins over `epochs`.
        epochs: passes over the training images. None and no steps: 120 steps with few images
            (fewer than 1000), else 5 epochs.
        batch_size: images a step, at least 2; in each process where there are several.
        lr: learning rate of the head, and of everything from scratch. None: 0.01 for "small",
            0.001 for the others; ten times that with sgd, a third with rmsprop.
        backbone_rate: the pretrained stages learn at `lr` times this.
        layer_decay: and each stage at this times the rate of the one after it (discriminative
            rates); 1 for the same rate in all of them.
        schedule: "together", or "gradual": the head alone first, then one more stage after
            another, the last first, during the first half of the steps.
        freeze_norm: pretrained BatchNorm layers keep their statistics (eval) in every mode.
        warmup: share of the steps in which the rate rises, before it falls along a cosine.
        optimizer: "adamw", "adam", "sgd" (momentum 0.9) or "rmsprop".
        weight_decay: for weights; biases and norms have none.
        l1: strength of an L1 penalty (its subgradient), for weights as well.
        label_smoothing: of the cross-entropy, 0 to 1.
        mixup: images are mixed by shares from Beta(mixup, mixup); 0 for no mixing.
        dropout: probability before the last layer, 0 to 1 (1 excluded).
        ema: decay of an exponential moving average of the weights, which is then what is tested
            and saved; None for none.
        accumulate: parts that a batch is computed in, one after another, for less memory.
        early_stop: end a run after this many evaluations (of 8) without a higher accuracy, and take
            the weights of the best. The evaluations then use half of the test images at most, and
            the accuracy that is reported counts the others.
        max_grad_norm: clip the gradient's norm to this; None for no clipping.
        augment: random crops and flips; without it frozen stages run once instead of every epoch.
        amp: "off" or "bf16" (autocast).
        device: "auto", "cpu", "cuda", ...
        save_every: steps between checkpoints; None for one every half minute.
        logdir: TensorBoard's files go below this folder; None for none.
        export: the best network, as a torch.export program of plain torch ops, goes into this file
            (.pt2, see predict.export_program); None for no such file.
        out: the run's folder, new or empty; None for ./runs/finetune-<timestamp>.
    """

    data: str | PathLike = "shipped"
    arch: str | None = None
    weights: str = "DEFAULT"
    modes: tuple[str, ...] | None = None
    backend: str = "fastops"
    seeds: int = 3
    shots: int | None = None
    image_size: int | None = None
    test_fraction: float = 0.2
    strict: bool = False
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 50
    lr: float | None = None
    backbone_rate: float = 0.1
    layer_decay: float = 1.0
    schedule: str = "together"
    freeze_norm: bool = False
    warmup: float = 0.1
    optimizer: str = "adamw"
    weight_decay: float = 0.05
    l1: float = 0.0
    label_smoothing: float = 0.1
    mixup: float = 0.0
    dropout: float = 0.0
    ema: float | None = None
    accumulate: int = 1
    early_stop: int | None = None
    max_grad_norm: float | None = None
    augment: bool = False
    amp: str = "off"
    device: str = "auto"
    save_every: int | None = None
    logdir: str | PathLike | None = None
    export: str | PathLike | None = None
    out: str | PathLike | None = None

    def check(self) -> None:
        """Raise ConfigError, naming the option, when a value cannot be used."""
        if self.arch is not None:
            check_arch(self.arch)
        one_of("backend", self.backend, ("fastops", "torch", "both"))
        one_of("optimizer", self.optimizer, tuple(OPTIMIZERS))
        one_of("amp", self.amp, ("off", "bf16"))
        one_of("schedule", self.schedule, ("together", "gradual"))
        if isinstance(self.modes, str) or (self.modes is not None and not self.modes):
            raise ConfigError(f"modes must be a tuple of at least one mode, got {self.modes!r}")
        if self.modes is not None and len(set(self.modes)) < len(self.modes):
            raise ConfigError(f"a mode is named twice in {', '.join(self.modes)}")
        for mode in self.modes or ():
            parse_mode(mode)
        at_least("seeds", self.seeds, 1)
        at_least("batch_size", self.batch_size, 2)
        at_least("accumulate", self.accumulate, 1)
        limits = {"shots": 0, "steps": 1, "epochs": 1, "image_size": 8}
        for name, least in {**limits, "early_stop": 1, "save_every": 1}.items():
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), least)
        if self.batch_size < 2 * self.accumulate:
            raise ConfigError(
                f"a batch of {self.batch_size} cannot be cut into {self.accumulate} parts of two "
                "images or more: raise batch_size or lower accumulate"
            )
        for name in ("lr", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{name} must be above 0, got {value}")
        for name in ("weight_decay", "backbone_rate", "l1", "mixup"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"{name} must be 0 or more, got {value}")
        for name in ("label_smoothing", "warmup"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"{name} must be between 0 and 1, got {value}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be between 0 and 1 (1 excluded), got {self.dropout}")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"layer_decay must be above 0 and at most 1, got {self.layer_decay}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"ema must be between 0 and 1 (both excluded), got {self.ema}")
        if not 0 < self.test_fraction < 1:
            raise ConfigError(f"test_fraction must be between 0 and 1, got {self.test_fraction}")

    @property
    def chosen_arch(self) -> str:
        """The architecture, default filled in."""
        return self.arch or "small"

    @property
    def chosen_modes(self) -> tuple[str, ...]:
        """The modes to run, defaults filled in."""
        if self.modes is not None:
            return self.modes
        return ("scratch",) if self.weights == "none" else ("features", "last", "full", "scratch")

    @property
    def chosen_shots(self) -> int:
        """Training images a class, 0 for all."""
        if self.shots is not None:
            return self.shots
        return 10 if self.data == "shipped" else 0

    @property
    def chosen_lr(self) -> float:
        """The learning rate of the head, default filled in."""
        if self.lr is not None:
            return self.lr
        base = 1e-2 if self.chosen_arch == "small" else 1e-3
        return base * {"sgd": 10.0, "rmsprop": 1 / 3}.get(self.optimizer, 1.0)

    @property
    def backends(self) -> tuple[str, ...]:
        """The back ends to run."""
        return ("torch", "fastops") if self.backend == "both" else (self.backend,)

    def to_json(self) -> str:
        """The options as JSON; paths are made absolute, so that any folder will do to resume in."""
        values = {name: plain(value) for name, value in asdict(self).items()}
        if values["data"] not in ("shipped", "fashion-mnist"):
            values["data"] = os.path.abspath(values["data"])
        if values["weights"] not in ("DEFAULT", "none"):
            values["weights"] = os.path.abspath(values["weights"])
        for name in ("logdir", "export"):
            if values[name] is not None:
                values[name] = os.path.abspath(values[name])
        return json.dumps(values, indent=2) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> "FineTuneConfig":
        """The options that a run wrote down.

        Raises:
            ConfigError: the file is missing, damaged or of another version.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            unknown = set(values) - {field.name for field in fields(cls)}
            if unknown:
                raise ConfigError(f"{path} has unknown options: {', '.join(sorted(unknown))}")
            if values.get("modes") is not None:
                values["modes"] = tuple(values["modes"])
            config = cls(**values)
            config.check()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ConfigError(f"there is no {path}: name the folder of a run") from error
        except (OSError, ValueError, TypeError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path} is damaged: {error}") from error
        return config

    def count_steps(self, images: int, processes: int = 1) -> int:
        """Optimizer steps of a run on this many training images, by so many processes together."""
        if self.steps is not None:
            return self.steps
        if self.epochs is None and images < 1000:
            return 120
        return max(1, (self.epochs or 5) * images // min(self.batch_size * processes, images))


def plain(value):
    """A configuration value that JSON takes."""
    return value if value is None or isinstance(value, int | float | str | tuple) else str(value)


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is among `choices`."""
    if value not in choices:
        raise ConfigError(f"unknown {name} {value!r}: choose from {', '.join(choices)}")


def at_least(name: str, value: int, least: int) -> None:
    """Raise ConfigError unless `value` is an integer of `least` or more."""
    if not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be an integer of {least} or more, got {value!r}")
