"""The options of a run: the one source of the command's help, of config files and of the documentation's table."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any

from .errors import ConfigError

OPTIMIZERS = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD", "rmsprop": "RMSprop"}

MODES = ("features", "last", "full", "scratch")
"""What --compare compares."""


def option(
    default: Any,
    help: str,
    group: str,
    metavar: str | None = None,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A field with all that is said about it and asked of it."""
    limits = {"least": least, "most": most, "above": above, "below": below}
    about = {"help": help, "group": group, "metavar": metavar, "choices": choices, "limits": limits}
    return field(default=default, metadata=about)


DATA, NETWORK, RECIPE, MACHINE, OUTPUT = (
    "what to train on",
    "the network",
    "the recipe",
    "how to run it",
    "what to leave",
)


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig:
    """One fine-tuning experiment: every mode, with every seed, on every back end.

    None stands for what suits the data; the plan of a run fills it in and says why. The command's
    --help and the guide have a line for each field.
    """

    data: str | PathLike = option(
        "shipped",
        "pictures in one sub-folder a class, or train/, val/ and test/ of such; or shipped (five "
        "Fashion-MNIST classes that the shipped network has not seen), or fashion-mnist (all "
        "images of these, from Debian's package or the network)",
        DATA,
        "FOLDER",
    )
    shots: int | None = option(
        None,
        "training images a class, 0 for all (by default 10 of the shipped data, else all)",
        DATA,
        "N",
        least=0,
    )
    test_fraction: float = option(
        0.2,
        "share of each class kept for testing if FOLDER has no test/",
        DATA,
        "X",
        above=0,
        below=1,
    )
    validation_fraction: float = option(
        0.15,
        "share of each class of the rest kept to choose the best weights by, if FOLDER has no val/ "
        "beside test/",
        DATA,
        "X",
        above=0,
        below=1,
    )
    image_size: int | None = option(
        None, "side in pixels (by default that of the network's weights)", DATA, "N", least=8
    )
    balance: str = option(
        "none",
        "classes of different sizes: none, sample (draw them equally often) or loss (weigh the loss)",
        DATA,
        "NAME",
        choices=("none", "sample", "loss"),
    )
    workers: int | None = option(
        None,
        "processes that decode and augment (by default one a core for pictures that are read from "
        "disk or augmented, else none)",
        DATA,
        "N",
        least=0,
    )
    strict: bool = option(False, "refuse pictures that cannot be read, do not skip them", DATA)

    arch: str | None = option(
        None,
        "small (ResNet-14 for 28 x 28 gray images), any of torchvision's classification models, "
        "or timm/NAME (by default that of the weights; small for the shipped data, else resnet18)",
        NETWORK,
        "NAME",
    )
    weights: str | None = option(
        None,
        "a checkpoint (.pt, .pth, .safetensors), none, or DEFAULT: the shipped one for small, "
        "torchvision's or timm's download for the others (by default DEFAULT, or none where it "
        "cannot be downloaded)",
        NETWORK,
        "FILE",
    )
    dropout: float = option(0.0, "before the last layer", NETWORK, "P", least=0, below=1)

    modes: tuple[str, ...] | None = option(
        None,
        "of features (backbone frozen), last or last:N (last N stages too), full (backbone at a "
        "low rate), scratch (by default what the number of pictures asks for)",
        RECIPE,
        "LIST",
    )
    compare: bool | None = option(
        None, "compare features, last, full and scratch, three seeds of each", RECIPE
    )
    seeds: int | None = option(
        None,
        "repetitions of each mode; a seed draws the images, the batches and the head (by default 3 "
        "of a comparison, else 1)",
        RECIPE,
        "N",
        least=1,
    )
    steps: int | None = option(None, "optimizer steps of each run", RECIPE, "N", least=1)
    epochs: int | None = option(
        None,
        "the same as passes over the training images (by default 5, but 120 steps of fewer than "
        "1000 images)",
        RECIPE,
        "N",
        least=1,
    )
    batch_size: int | None = option(
        None,
        "images a step, in each process (by default 50 of small, else 32)",
        RECIPE,
        "N",
        least=2,
    )
    lr: float | None = option(
        None,
        "learning rate of the head (by default 0.01 of small, else 0.001; ten times that with sgd, "
        "a third with rmsprop)",
        RECIPE,
        "X",
        above=0,
    )
    backbone_rate: float = option(
        0.1, "the pretrained stages' learning rate over --lr", RECIPE, "X", least=0
    )
    layer_decay: float = option(
        1.0, "each stage at this times the rate of the one after it", RECIPE, "X", above=0, most=1
    )
    schedule: str | None = option(
        None,
        "together, head-first (the head alone for the first fifth of the steps) or gradual (the "
        "head, then one more stage after another; by default head-first for a folder, else together)",
        RECIPE,
        "NAME",
        choices=("together", "head-first", "gradual"),
    )
    freeze_norm: bool = option(False, "pretrained BatchNorm keeps its statistics", RECIPE)
    warmup: float = option(
        0.1, "share of the steps in which the rate rises, before it falls along a cosine", RECIPE, "X",
        least=0, most=1,
    )  # fmt: skip
    optimizer: str = option(
        "adamw", "adamw, adam, sgd (momentum 0.9) or rmsprop", RECIPE, "NAME",
        choices=tuple(OPTIMIZERS),
    )  # fmt: skip
    weight_decay: float = option(0.05, "not on biases and norms", RECIPE, "X", least=0)
    l1: float = option(0.0, "strength of an L1 penalty on weights", RECIPE, "X", least=0)
    label_smoothing: float = option(0.1, "of the cross-entropy", RECIPE, "P", least=0, most=1)
    max_grad_norm: float | None = option(
        None, "clip the gradient's norm (by default no clipping)", RECIPE, "X", above=0
    )
    augment: str | bool | None = option(
        None,
        "none, light (random resized crops and flips) or strong (RandAugment and RandomErasing "
        "too; by default light for a folder, else none)",
        RECIPE,
        "NAME",
    )
    mixup: float = option(
        0.0, "mix images by shares of Beta(A, A); 0 for none", RECIPE, "A", least=0
    )
    cutmix: float = option(
        0.0,
        "paste a box of another image, of an area by Beta(A, A); 0 for none",
        RECIPE,
        "A",
        least=0,
    )
    ema: float | None = option(
        None, "test and save averaged weights, of this decay", RECIPE, "D", above=0, below=1
    )
    accumulate: int = option(1, "compute a batch in N parts, for less memory", RECIPE, "N", least=1)
    keep: str | None = option(
        None,
        "which weights are tested and saved: best (on the validation images) or last (by default "
        "best for a folder, else last)",
        RECIPE,
        "NAME",
        choices=("best", "last"),
    )
    early_stop: int | None = option(
        None, "end after N of 8 evaluations without gain, and keep the best", RECIPE, "N", least=1
    )

    backend: str = option(
        "fastops", "fastops, torch (the same recipe on native ops) or both", MACHINE, "NAME",
        choices=("fastops", "torch", "both"),
    )  # fmt: skip
    amp: str | None = option(
        None,
        "off, bf16 (autocast) or auto: bf16 where the processor or the GPU computes with it (by "
        "default auto for a folder, else off)",
        MACHINE,
        "TYPE",
        choices=("off", "bf16", "auto"),
    )
    device: str = option("auto", "auto, cpu, cuda, ...", MACHINE, "NAME")
    threads: int | str | None = option(
        None,
        "CPU threads, or auto: what the control group grants, and of these the number with which a "
        "convolution takes the shortest time (by default auto for a folder, else torch's own number)",
        MACHINE,
        "N",
    )

    out: str | PathLike | None = option(
        None, "new folder (by default runs/finetune-<date>-<time>)", OUTPUT, "FOLDER"
    )
    save_every: int | None = option(
        None, "steps between saves (by default half a minute)", OUTPUT, "N", least=1
    )
    logdir: str | PathLike | None = option(
        None, "write TensorBoard's files below FOLDER", OUTPUT, "FOLDER"
    )
    export: str | PathLike | None = option(
        None, "the best network for torch.export.load, needs torch only", OUTPUT, "FILE"
    )

    def check(self) -> None:
        """Raise ConfigError, naming the option, when a value cannot be used."""
        for entry in fields(self):
            check_option(entry.name, getattr(self, entry.name), entry.metadata)
        if self.arch is not None:
            from .networks import check_arch

            check_arch(self.arch)
        if isinstance(self.modes, str) or (self.modes is not None and not self.modes):
            raise ConfigError(f"modes must be a tuple of at least one mode, got {self.modes!r}")
        if self.modes is not None and len(set(self.modes)) < len(self.modes):
            raise ConfigError(f"a mode is named twice in {', '.join(self.modes)}")
        for mode in self.modes or ():
            parse_mode(mode)
        if self.modes is not None and self.compare:
            raise ConfigError("compare names the modes itself: leave out modes, or compare")
        if self.augment not in (None, True, False, "none", "light", "strong"):
            raise ConfigError(f"unknown augment {self.augment!r}: choose from none, light, strong")
        if self.threads not in (None, "auto"):
            if not isinstance(self.threads, int) or self.threads < 1:
                raise ConfigError(f"threads must be 1 or more, or auto, got {self.threads}")
        if self.chosen_batch_size < 2 * self.accumulate:
            raise ConfigError(
                f"a batch of {self.chosen_batch_size} cannot be cut into {self.accumulate} parts of "
                "two images or more: raise batch_size or lower accumulate"
            )

    @property
    def is_folder(self) -> bool:
        """Whether the data are the user's own pictures."""
        return self.data not in ("shipped", "fashion-mnist")

    @property
    def chosen_arch(self) -> str:
        """The architecture, default filled in."""
        return self.arch or ("resnet18" if self.is_folder else "small")

    @property
    def chosen_modes(self) -> tuple[str, ...]:
        """The modes to run, default filled in as far as the options alone tell it."""
        if self.modes is not None:
            return self.modes
        if self.weights == "none":
            return ("scratch",)
        return MODES if self.compares else ("full",)

    @property
    def compares(self) -> bool:
        """Whether modes are compared: so it is with the shipped data, where nothing is said."""
        if self.compare is not None:
            return self.compare
        return not self.is_folder and self.modes is None

    @property
    def chosen_seeds(self) -> int:
        """Repetitions of each mode."""
        return self.seeds or (3 if self.compares or not self.is_folder else 1)

    @property
    def chosen_shots(self) -> int:
        """Training images a class, 0 for all."""
        if self.shots is not None:
            return self.shots
        return 10 if self.data == "shipped" else 0

    @property
    def chosen_batch_size(self) -> int:
        """Images a step in each process."""
        return self.batch_size or (50 if self.chosen_arch == "small" else 32)

    @property
    def chosen_lr(self) -> float:
        """The learning rate of the head, default filled in."""
        if self.lr is not None:
            return self.lr
        base = 1e-2 if self.chosen_arch == "small" else 1e-3
        return base * {"sgd": 10.0, "rmsprop": 1 / 3}.get(self.optimizer, 1.0)

    @property
    def chosen_schedule(self) -> str:
        """When each stage begins to learn."""
        return self.schedule or ("head-first" if self.is_folder else "together")

    @property
    def chosen_augment(self) -> str:
        """How training images are varied."""
        if self.augment is None:
            return "light" if self.is_folder else "none"
        return {True: "light", False: "none"}.get(self.augment, self.augment)  # type: ignore

    @property
    def keeps_best(self) -> bool:
        """Whether the weights that are tested are those of the best evaluation."""
        if self.keep is None:
            return self.early_stop is not None or self.is_folder
        return self.keep == "best"

    @property
    def chosen_amp(self) -> str:
        """Autocast, as far as the options alone tell it: "off", "bf16" or "auto"."""
        return self.amp or ("auto" if self.is_folder else "off")

    @property
    def chosen_threads(self) -> int | str | None:
        """CPU threads: a number, "auto", or None for torch's own number."""
        return self.threads or ("auto" if self.is_folder else None)

    @property
    def backends(self) -> tuple[str, ...]:
        """The back ends to run."""
        return ("torch", "fastops") if self.backend == "both" else (self.backend,)

    def to_json(self) -> str:
        """The options as JSON; paths are made absolute, so that any folder will do to resume in."""
        values = {name: plain(value) for name, value in asdict(self).items()}
        if self.is_folder:
            values["data"] = os.path.abspath(values["data"])
        if values["weights"] not in (None, "DEFAULT", "none"):
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
            config = cls(**known_options(json.loads(path.read_text(encoding="utf-8")), path))
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
        return max(
            1, (self.epochs or 5) * images // min(self.chosen_batch_size * processes, images)
        )


def read_options(path: Path) -> dict[str, Any]:
    """The options in a config file, JSON or YAML (where PyYAML is installed).

    Raises:
        ConfigError: the file is missing or damaged, or names options that are none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    try:
        if path.suffix in (".yaml", ".yml"):
            try:
                import yaml
            except ImportError as error:
                raise ConfigError(f"{path}: reading it needs `pip install pyyaml`") from error
            values = yaml.safe_load(text) or {}
        else:
            values = json.loads(text)
    except ConfigError:
        raise
    except Exception as error:  # yaml's errors have no common base with json's
        raise ConfigError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    return known_options(values, path)


def known_options(values: Any, path: Path) -> dict[str, Any]:
    """Options by their field's name.

    Raises:
        ConfigError: they are no mapping, or one of them is none of FineTuneConfig's.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} is damaged: expected options by name")
    found = {str(name).replace("-", "_"): value for name, value in values.items()}
    unknown = set(found) - {entry.name for entry in fields(FineTuneConfig)}
    if unknown:
        raise ConfigError(f"{path} has unknown options: {', '.join(sorted(unknown))}")
    if isinstance(found.get("modes"), str):
        found["modes"] = split_list(found["modes"])
    elif found.get("modes") is not None:
        found["modes"] = tuple(found["modes"])
    return found


def split_list(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def parse_mode(mode: str) -> tuple[str, int]:
    """Split a mode into its name and the number of stages it trains beside the head.

    "features" trains none, "last" one, "last:N" N; -1 stands for the whole network ("full" and
    "scratch").

    Raises:
        ConfigError: not a mode.
    """
    name, _, number = mode.partition(":")
    if mode in ("full", "scratch"):
        return mode, -1
    if mode == "features":
        return mode, 0
    if name == "last" and (mode == name or (number.isascii() and number.isdigit())):
        count = int(number or 1)
        if count:
            return name, count
    raise ConfigError(
        f"unknown mode {mode!r}: choose from features, last, last:N (N >= 1), full, scratch"
    )


def plain(value: Any) -> Any:
    """A configuration value that JSON takes."""
    return value if value is None or isinstance(value, int | float | str | tuple) else str(value)


def check_option(name: str, value: Any, about: Mapping[str, Any]) -> None:
    """Raise ConfigError unless a value is of its option's choices or within its limits."""
    if value is None:
        return
    if about["choices"] and value not in about["choices"]:
        raise ConfigError(f"unknown {name} {value!r}: choose from {', '.join(about['choices'])}")
    least, most, above, below = (about["limits"][k] for k in ("least", "most", "above", "below"))
    if least is above is None:
        return
    wanted_type = FineTuneConfig.__annotations__[name]
    if wanted_type in (int, int | None):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name} must be an integer of {least} or more, got {value!r}")
        return
    good = isinstance(value, int | float) and math.isfinite(value)
    good = good and (least is None or value >= least) and (above is None or value > above)
    good = good and (most is None or value <= most) and (below is None or value < below)
    if good:
        return
    low, high = (above if least is None else least), (below if most is None else most)
    if high is None:
        wanted = f"above {low}" if least is None else f"{low} or more"
    else:
        without = [str(v) for v in (above, below) if v is not None]
        wanted = f"between {low} and {high}" + (
            f" ({' and '.join(without)} excluded)" * bool(without)
        )
    raise ConfigError(f"{name} must be {wanted}, got {value!r}")
