"""An experiment before it starts: options resolved, data and weights read, all of it said and checked."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from . import processes
from .checkpoints import Weights, find_weights, load_weights
from .config import FineTuneConfig
from .data import Collection, sample_per_class
from .devices import choose_amp, choose_threads, find_device
from .errors import ConfigError, OutputError, WeightsError
from .fashion_mnist import load_raw, load_shipped
from .folders import load_folder
from .freezing import split
from .journal import find_writer
from .networks import build, count_parameters, input_format
from .pictures import InputFormat
from .recipe import HEAD_FIRST, find_optimizer, ops_for
from .run import Run
from .text import printable
from .trainer import fit

FEW = 8
"""A class of fewer training images than this cannot teach a backbone without being learned by heart."""


@dataclass
class Plan:
    """An experiment that has been checked: what can be found wrong before it starts was not."""

    config: FineTuneConfig
    format: InputFormat
    collection: Collection
    weights: Weights | None
    chosen: list[torch.Tensor]
    """Indices of the training images of each seed."""
    description: list[str]

    def fit(self, mode: str, backend: str, seed: int, **options) -> tuple[Run, torch.nn.Module]:
        """One run; see train.fit for the options."""
        parts = self.config, self.collection, self.format, self.weights
        chosen = self.chosen[seed]
        return fit(*parts, mode=mode, seed=seed, backend=backend, chosen=chosen, **options)


def default_size(config: FineTuneConfig) -> int | None:
    """28-pixel images are not blown up to ImageNet's 224: that costs 12 times 64's time."""
    small_images = config.data in ("shipped", "fashion-mnist")
    return 64 if small_images and config.chosen_arch != "small" else None


def load(config: FineTuneConfig, format: InputFormat, show: bool) -> Collection:
    """The images that `config.data` names."""
    if config.data == "shipped":
        return load_shipped(format)
    if config.data == "fashion-mnist":
        return load_raw(format)

    def progress(items: Iterable, title: str, total: int) -> Iterator:
        return tqdm(items, title, total, unit="picture", disable=None if show else True)

    return load_folder(
        Path(config.data),
        format,
        test_fraction=config.test_fraction,
        validation_fraction=config.validation_fraction,
        strict=config.strict,
        progress=progress,
    )


def choose(config: FineTuneConfig, labels: torch.Tensor, classes: int, seed: int) -> torch.Tensor:
    """Indices of the training images that the runs of a seed use: the same in every mode."""
    if config.chosen_shots == 0:
        return torch.arange(len(labels))
    return sample_per_class(labels, config.chosen_shots, classes, seed)


def probe_network(config: FineTuneConfig, collection: Collection, weights: Weights | None) -> None:
    """Meet what cannot work before anything is written: weights, modes, optimizer."""
    for backend in config.backends:
        find_optimizer(config, ops_for(backend))
    with torch.random.fork_rng():
        model = build(config.chosen_arch, len(collection.classes), config.dropout)
        if weights is not None:
            load_weights(model, weights.state, head=False)
        for mode in config.chosen_modes:
            split(model, mode)


def make_plan(config: FineTuneConfig, show: bool = False) -> Plan:
    """Check a configuration, read its images and weights, and fill in what depends on them.

    Raises:
        ConfigError, DataError, WeightsError: see finetune.
    """
    config.check()
    device = find_device(config.device)
    check_outputs(config)
    reasons: list[str] = []
    config, weights = resolve_network(config, reasons)
    format = input_format(config.chosen_arch, config.image_size or default_size(config))
    collection = load(config, format, show)
    labels, classes = collection.train.labels, len(collection.classes)
    seeds = range(config.chosen_seeds)
    chosen = [choose(config, labels, classes, seed) for seed in seeds]
    if len(chosen[0]) < 2 * processes.count():
        raise ConfigError(
            f"{len(chosen[0])} training images are too few for {processes.count()} "
            f"process{'es' * (processes.count() > 1)}: each needs two"
        )
    config = resolve_modes(config, labels[chosen[0]], reasons)
    amp, why = choose_amp(config.chosen_amp, device)
    threads, why_threads = choose_threads(config.chosen_threads)
    reasons += [text for text in (why, why_threads) if text]
    config = replace(config, amp=amp, threads=threads)
    probe_network(config, collection, weights)
    plan = Plan(config, format, collection, weights, chosen, [])
    plan.description = describe(plan, reasons)
    return plan


def check_outputs(config: FineTuneConfig) -> None:
    """Raise what would only be met after training."""
    if config.logdir is not None:
        find_writer()
    if config.export is not None and not Path(config.export).parent.is_dir():
        raise OutputError(f"cannot write {config.export}: there is no such folder")
    if config.export is not None and Path(config.export).is_dir():
        raise OutputError(f"cannot write {config.export}: it is a folder, name a file")


def resolve_network(
    config: FineTuneConfig, reasons: list[str]
) -> tuple[FineTuneConfig, Weights | None]:
    """Fill in the architecture and the weights.

    Raises:
        WeightsError: those that were asked for cannot be had.
    """
    if config.chosen_modes == ("scratch",):
        return replace(config, arch=config.chosen_arch, weights="none"), None
    wanted = config.weights or "DEFAULT"
    arch = config.arch if wanted not in ("DEFAULT", "none") else config.chosen_arch
    try:
        weights = find_weights(arch, wanted)
    except WeightsError as error:
        # A comparison has no meaning without them, and modes that were named need them.
        if config.weights is not None or config.modes is not None or config.compares:
            raise
        reasons.append(
            f"{str(error).partition(': pass --weights')[0]}: training {config.chosen_arch} from "
            "random weights instead, which takes more pictures and more --epochs; --weights FILE "
            "starts from a checkpoint"
        )
        weights, wanted = None, "none"
    return replace(
        config, arch=weights.arch if weights else config.chosen_arch, weights=wanted
    ), weights


def resolve_modes(
    config: FineTuneConfig, labels: torch.Tensor, reasons: list[str]
) -> FineTuneConfig:
    """Fill in the modes, by the number of training images where nothing is said."""
    seeds = config.chosen_seeds
    modes = config.chosen_modes
    if config.is_folder and config.modes is None and not config.compares:
        fewest = int(torch.bincount(labels).min())
        if modes == ("scratch",):
            reasons.append("mode scratch: there are no pretrained weights")
        elif fewest < FEW:
            modes = ("features",)
            reasons.append(
                f"mode features, the backbone stays as it is: {fewest} training images of the "
                f"smallest class are too few to move it (--modes full does; from {FEW} on by default)"
            )
        else:
            reasons.append(
                f"mode full, all stages learn: {fewest} training images of the smallest class are "
                "enough (--modes features trains the head alone, --compare compares)"
            )
    return replace(config, modes=modes, compare=None, seeds=seeds)


def describe(plan: Plan, reasons: list[str]) -> list[str]:
    """What will be done and why, in sentences for the terminal and the report."""
    config, collection, weights = plan.config, plan.collection, plan.weights
    images, classes = len(plan.chosen[0]), collection.classes
    with torch.random.fork_rng():
        parameters = count_parameters(build(config.chosen_arch, len(classes)))
    count = processes.count()
    steps = config.count_steps(images, count)
    each = f"{count} processes of {config.chosen_batch_size}, " if count > 1 else ""
    start = printable(config.weights or "none")
    if start == "none":
        start = "random weights"
    elif start == "DEFAULT":
        start = "the shipped weights" if config.arch == "small" else "torchvision's weights"
    if weights is not None and weights.found:
        start += f" ({printable(weights.found)})"
    most = "at most " if images < config.chosen_shots * len(classes) else ""
    shots = f" ({most}{config.chosen_shots} a class)" if config.chosen_shots else ""
    seeds = "1 seed" if config.chosen_seeds == 1 else f"{config.chosen_seeds} seeds"
    rates = f"{config.chosen_lr:.3g}"
    if config.chosen_modes != ("scratch",):
        which = "pretrained stages" if config.layer_decay == 1 else "last pretrained stage"
        rates += f" ({which} {config.chosen_lr * config.backbone_rate:.3g})"
    validation = collection.validation
    lines = [
        f"{collection.name}: {', '.join(classes[:12])}"
        + (f" and {len(classes) - 12} more" if len(classes) > 12 else ""),
        f"{images:,} training images{shots}, "
        + (f"{len(validation):,} validation images, " if validation is not None else "")
        + f"{len(collection.test):,} test images, "
        f"{plan.format.size} x {plan.format.size} pixels, {seeds}",
        f"{'ResNet-14' if config.arch == 'small' else config.arch} "
        f"({parameters:,} parameters) from {start}; "
        f"{steps:,} steps of {min(config.chosen_batch_size * count, images)} images, {each}"
        f"{config.optimizer} at a rate of {rates}, {' and '.join(config.backends)}",
        *reasons,
    ]
    if config.is_folder:
        lines.append(describe_recipe(config, steps, validation is not None))
    lines += collection.notes
    if collection.skipped:
        more = f" and {len(collection.skipped) - 5} more" if len(collection.skipped) > 5 else ""
        lines.append(f"skipped: {'; '.join(collection.skipped[:5])}{more}")
    return lines


def describe_recipe(config: FineTuneConfig, steps: int, validated: bool) -> str:
    """How the images are varied, when the stages begin to learn, and which weights are kept."""
    parts = [
        {
            "none": "images as they are",
            "light": "random crops and flips",
            "strong": "random crops and flips, RandAugment and RandomErasing",
        }[config.chosen_augment]
    ]
    if config.chosen_schedule == "head-first" and set(config.chosen_modes) - {
        "scratch",
        "features",
    }:
        parts.append(f"the head alone for the first {HEAD_FIRST * steps // 100} steps")
    if config.balance != "none":
        parts.append(
            "classes drawn equally often"
            if config.balance == "sample"
            else "classes weighted alike"
        )
    if validated and config.keeps_best:
        parts.append("the best weights on the validation images are tested, once")
    return "; ".join(parts)
