"""A whole experiment: every mode with every seed, then the report."""

import contextlib
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from tqdm import tqdm

from . import processes
from .config import FineTuneConfig
from .errors import OutputError
from .export import export_program
from .interrupts import deferred_interrupt
from .journal import Journal
from .plan import Plan, make_plan
from .predict import load_classifier, save_classifier
from .progress import PROGRESS, load_progress, save_progress
from .report import write_report, write_text
from .run import Run
from .storage import check_run_folder, complete_file, make_run_folder, remove_unfinished
from .summary import best_arm, compare_backends, describe_keeping, format_table, summarize
from .surroundings import usual_state
from .text import any_terminal


@dataclass
class Result:
    """The results of an experiment.

    Attributes:
        config: as given.
        folder: the run's folder, None for a dry run.
        classes: names of the classes.
        runs: one for each mode, back end and seed.
        summary: one row of figures for each mode and back end (see summary.summarize).
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


@usual_state()
def resume(
    folder: str | PathLike, *, threads: int | str | None = None, show: bool = False
) -> Result:
    """Go on with an experiment that was interrupted, for whatever reason. The results are the same as without the
    interruption, bit for bit (with the same number of threads and processes).

    Raises:
        ConfigError: `folder` is not that of an unfinished experiment, or damaged.
    """
    path = Path(folder)
    processes.join()
    with processes.together():
        config = FineTuneConfig.from_json(path / "config.json")
    if threads is not None:
        config = replace(config, threads=threads)
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
    before = torch.get_num_threads()
    if isinstance(plan.config.threads, int):
        torch.set_num_threads(plan.config.threads)
    try:
        with any_terminal() if show else contextlib.nullcontext():
            return carry_out(plan, show, _resumed)
    finally:
        torch.set_num_threads(before)


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
    jobs = [(m, b, s) for m in modes for b in backends for s in range(config.chosen_seeds)]
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
            result.summary = summarize(result.runs)
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
