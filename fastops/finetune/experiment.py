"""A whole experiment: every mode with every seed, then the report."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from tqdm import tqdm

from . import processes
from .checkpoints import Weights, find_weights, load_weights
from .config import FineTuneConfig
from .data import Collection, sample_per_class
from .devices import find_device
from .errors import ConfigError, OutputError
from .fashion_mnist import load_raw, load_shipped
from .folders import load_folder
from .freezing import split
from .interrupts import deferred_interrupt
from .journal import Journal, find_writer
from .networks import build, count_parameters, input_format
from .pictures import InputFormat
from .predict import export_program, load_classifier, save_classifier
from .recipe import find_optimizer, ops_for
from .report import (
    best_arm,
    compare_backends,
    describe_keeping,
    format_table,
    summarise,
    write_report,
    write_text,
)
from .run import Run
from .storage import check_run_folder, complete_file, make_run_folder, remove_unfinished
from .surroundings import usual_state
from .text import any_terminal, printable
from .trainer import fit


@dataclass
class Result:
    """What an experiment came to.

    Attributes:
        config: as given.
        folder: the run's folder, None for a dry run.
        classes: names of the classes.
        runs: one for each mode, back end and seed.
        summary: one row of figures for each mode and back end (see report.summarise).
        description: what was done, in sentences.
    """

    config: FineTuneConfig
    folder: Path | None
    classes: list[str]
    runs: list[Run] = field(default_factory=list)
    summary: list[dict] = field(default_factory=list)
    description: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [format_table(self.summary), describe_keeping(self.summary)]
        lines += compare_backends(self.runs)
        return "\n".join(line for line in lines if line)


PROGRESS = "progress.pt"
"""What an unfinished experiment goes on from: the finished runs, and the state of the one that is not."""


def save_progress(
    folder: Path,
    config: FineTuneConfig,
    collection: Collection,
    runs: list[Run],
    state: dict | None,
) -> None:
    """Write what the experiment in `folder` can go on from; the first process does."""
    with processes.together():
        if processes.rank() == 0:
            content = {
                "runs": [asdict(run) for run in runs],
                "state": state,
                "processes": processes.count(),
                "data": describe_data(collection),
                "options": config.to_json(),
            }
            with complete_file(folder / PROGRESS) as path:
                torch.save(content, path)


def describe_data(collection: Collection) -> str:
    """What tells apart images that another state of the data's folder would give."""
    sizes = f"{len(collection.train)} and {len(collection.test)} images"
    return f"{sizes} of the classes {', '.join(collection.classes)}"


FREE = ("out", "logdir", "export", "save_every")
"""The options that an unfinished experiment may go on with another value of: none of them changes what is computed."""


def load_progress(
    folder: Path, config: FineTuneConfig, collection: Collection
) -> tuple[list[Run], dict | None]:
    """The finished runs of an experiment, and the state of the unfinished one.

    Raises:
        ConfigError: there is nothing to go on from, it is damaged, of another number of
            processes, of other data or of other options.
    """
    path = folder / PROGRESS
    if not path.exists():
        done = (folder / "metrics.json").exists()
        raise ConfigError(
            f"{folder} is finished: there is nothing to resume"
            if done
            else f"there is no {path}: name the folder of an unfinished run"
        )
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        runs, state, count, data, begun = (
            [Run(**run) for run in saved["runs"]],
            saved["state"],
            saved["processes"],
            saved["data"],
            json.loads(saved["options"]),
        )
    except Exception as error:  # what a damaged file makes of torch.load is anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{path} is damaged: {reason}") from error
    if count != processes.count():
        raise ConfigError(
            f"{folder} was begun by {count} process{'es' * (count > 1)}, this is one of "
            f"{processes.count()}: resume it with torchrun --nproc-per-node={count}"
        )
    if data != describe_data(collection):
        raise ConfigError(
            f"{folder} was begun on {data}, now there are {describe_data(collection)}: "
            "put the pictures back, or start a new run"
        )
    now = json.loads(config.to_json())
    for name in sorted(now.keys() - set(FREE)):
        if begun.get(name) != now[name]:
            raise ConfigError(
                f"{folder} was begun with {name}={begun.get(name)!r}, its config.json now says "
                f"{now[name]!r}: put it back, or start a new run"
            )
    return runs, state


@usual_state()
def resume(folder: str | PathLike, *, show: bool = False) -> Result:
    """Go on with an experiment that was interrupted, by whatever: its results are those of one that was not, bit for bit
    (with the same number of threads and processes).

    Raises:
        ConfigError: `folder` is not that of an unfinished experiment, or damaged.
    """
    path = Path(folder)
    processes.join()
    with processes.together():
        config = FineTuneConfig.from_json(path / "config.json")
    return finetune(config, show=show, _resumed=path)


@usual_state()
def finetune(
    config: FineTuneConfig,
    *,
    show: bool = False,
    dry_run: bool = False,
    _resumed: Path | None = None,
) -> Result:
    """Fine-tune a pretrained network in several modes, and the same network from scratch.

    Writes into the run's folder: config.json, metrics.jsonl (a line for each step, while it runs), metrics.json,
    curves.png, predictions.png, confusion.png, report.html, checkpoints/<mode>.pt (of the first seed; see
    load_classifier) and checkpoints/best.pt, that of the mode with the highest accuracy.

    Started by torchrun, the processes train together (see Trainer), and the first one writes.

    Args:
        show: print progress: bars on a terminal, a line for each run anywhere.
        dry_run: check everything, say what would be done, train and write nothing.

    Raises:
        ConfigError: an option that cannot be used.
        DataError, WeightsError: images or weights that cannot be used.
        OutputError: the run's folder cannot be written.
        KeyboardInterrupt: after the finished runs have been reported; `resume` goes on.
    """
    processes.join()
    with processes.together():
        plan = make_plan(config, show and processes.rank() == 0)
    if dry_run:
        if config.out is not None:
            check_run_folder(Path(config.out))
        return Result(config, None, plan.collection.classes, description=plan.description)
    with any_terminal() if show else contextlib.nullcontext():
        return carry_out(plan, show, _resumed)


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


def make_plan(config: FineTuneConfig, show: bool = False) -> Plan:
    """Check a configuration, read its images and weights.

    Raises:
        ConfigError, DataError, WeightsError: see finetune.
    """
    config.check()
    find_device(config.device)
    if config.logdir is not None:
        find_writer()
    if config.export is not None and not Path(config.export).parent.is_dir():
        raise OutputError(f"cannot write {config.export}: there is no such folder")
    if config.export is not None and Path(config.export).is_dir():
        raise OutputError(f"cannot write {config.export}: it is a folder, name a file")
    weights = None
    if set(config.chosen_modes) != {"scratch"}:
        weights = find_weights(config.arch, config.weights)
    if config.arch is None:
        config = replace(config, arch=weights.arch if weights else "small")
    format = input_format(config.chosen_arch, config.image_size or default_size(config))
    collection = load(config, format, show)
    probe_network(config, collection, weights)
    labels, classes = collection.train.labels, len(collection.classes)
    chosen = [choose(config, labels, classes, seed) for seed in range(config.seeds)]
    if len(chosen[0]) < 2 * processes.count():
        raise ConfigError(
            f"{len(chosen[0])} training images are too few for {processes.count()} "
            f"process{'es' * (processes.count() > 1)}: each needs two"
        )
    description = describe(config, collection, format, len(chosen[0]), weights)
    return Plan(config, format, collection, weights, chosen, description)


def carry_out(plan: Plan, show: bool, resumed: Path | None) -> Result:
    """Run an experiment from its start, or from where the one in the folder `resumed` stands."""
    config, collection = plan.config, plan.collection
    modes, backends = config.chosen_modes, config.backends
    writes = processes.rank() == 0
    show = show and writes
    folder = resumed
    state = None
    result = Result(config, None, collection.classes, description=plan.description)
    with processes.together():
        if resumed:
            result.runs, state = load_progress(resumed, config, collection)
        elif writes:
            folder = make_run_folder(config.out)
            (folder / "checkpoints").mkdir()
            write_text(folder / "config.json", config.to_json())
    folder = result.folder = processes.gather(folder)[0]
    assert folder is not None
    save = partial(save_progress, folder, config, collection)
    with processes.together():
        if resumed and writes:
            remove_unfinished(folder)
    if not resumed:
        save([], None)
    if show:
        print("\n".join(result.description), flush=True)
    jobs = [(m, b, s) for m in modes for b in backends for s in range(config.seeds)]
    count = processes.count()
    steps = sum(config.count_steps(len(plan.chosen[seed]), count) for _, _, seed in jobs)
    failure = None
    journal: Journal | None = None
    with processes.together():
        if writes:
            known = [*result.runs, *([Run(**state["run"])] if state else [])]
            journal = Journal(folder, known, config.logdir)
    try:
        with (
            deferred_interrupt() as stop,
            tqdm(total=steps, unit="step", disable=None if show else True) as bar,
        ):

            def advance(run: Run) -> None:
                if journal is not None:
                    journal.add(run)
                bar.set_postfix(loss=f"{run.losses[-1]:.3f}", refresh=False)
                bar.update()

            done = sum(len(run.losses) for run in result.runs)
            bar.update(done + (len(state["run"]["losses"]) if state else 0))
            for mode, backend, seed in jobs[len(result.runs) :]:
                bar.set_description(f"{mode} seed {seed}")
                run, model = plan.fit(
                    mode,
                    backend,
                    seed,
                    on_step=advance,
                    state=state,
                    save=partial(save, result.runs),
                    stop=stop,
                )
                state = None
                result.runs.append(run)
                if show:
                    bar.write(
                        f"  {mode}, seed {seed}, {backend}: accuracy {run.accuracy:.3f}, "
                        f"{run.seconds:.1f} s"
                    )
                if seed == 0 and backend == backends[-1]:
                    path = folder / "checkpoints" / f"{run.file_name}.pt"
                    with processes.together():
                        if writes:
                            classes = collection.classes
                            save_classifier(path, model, config, classes, plan.format, run)
                save(result.runs, None)
    finally:
        if journal is not None:
            journal.close()
        # Ctrl-C and a failed run leave the report of what was finished.
        if result.runs:
            result.summary = summarise(result.runs)
        if result.runs and writes:
            try:
                runs, summary = result.runs, result.summary
                kept = [run for run in runs if run.backend == backends[-1]]
                keep_best(folder / "checkpoints", kept)
                write_report(folder, config, collection, runs, summary, result.description)
            except OutputError as error:
                failure = error
    with processes.together():
        if failure is not None:
            raise failure
        if writes and config.export is not None:
            export_program(load_classifier(folder), config.export)
        if writes:
            (folder / PROGRESS).unlink()
    return result


def keep_best(checkpoints: Path, runs: list[Run]) -> None:
    """Copy the checkpoint of the mode with the highest mean accuracy to best.pt.

    Raises:
        OutputError: it cannot be written.
    """
    kept = [r for r in runs if (checkpoints / f"{r.file_name}.pt").exists()]
    if kept:
        content = (checkpoints / f"{best_arm(kept)[0].file_name}.pt").read_bytes()
        with complete_file(checkpoints / "best.pt") as path:
            path.write_bytes(content)


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


def describe(
    config: FineTuneConfig,
    collection: Collection,
    format: InputFormat,
    images: int,
    weights: Weights | None,
) -> list[str]:
    """What will be done, in sentences for the terminal and the report."""
    with torch.random.fork_rng():
        parameters = count_parameters(build(config.chosen_arch, len(collection.classes)))
    count = processes.count()
    steps = config.count_steps(images, count)
    each = f"{count} processes of {config.batch_size}, " if count > 1 else ""
    start = {
        "none": "random weights",
        "DEFAULT": "the shipped weights"
        if config.chosen_arch == "small"
        else "torchvision's weights",
    }.get(config.weights, printable(config.weights))
    if weights is not None and weights.found:
        start += f" ({printable(weights.found)})"
    most = "at most " if images < config.chosen_shots * len(collection.classes) else ""
    shots = f" ({most}{config.chosen_shots} a class)" if config.chosen_shots else ""
    seeds = "1 seed" if config.seeds == 1 else f"{config.seeds} seeds"
    rates = f"{config.chosen_lr:.3g}"
    if config.chosen_modes != ("scratch",):
        which = "pretrained stages" if config.layer_decay == 1 else "last pretrained stage"
        rates += f" ({which} {config.chosen_lr * config.backbone_rate:.3g})"
    lines = [
        f"{collection.name}: {', '.join(collection.classes[:12])}"
        + (f" and {len(collection.classes) - 12} more" if len(collection.classes) > 12 else ""),
        f"{images:,} training images{shots}, {len(collection.test):,} test images, "
        f"{format.size} x {format.size} pixels, {seeds}",
        f"{'ResNet-14' if config.chosen_arch == 'small' else config.arch} "
        f"({parameters:,} parameters) from {start}; "
        f"{steps:,} steps of {min(config.batch_size * count, images)} images, {each}"
        f"{config.optimizer} at a rate of {rates}, {' and '.join(config.backends)}",
    ]
    lines += collection.notes
    if collection.skipped:
        more = f" and {len(collection.skipped) - 5} more" if len(collection.skipped) > 5 else ""
        lines.append(f"skipped: {'; '.join(collection.skipped[:5])}{more}")
    return lines
