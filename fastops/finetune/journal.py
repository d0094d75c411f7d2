"""What is written while a run goes on: metrics.jsonl, one line a step, and TensorBoard's files."""

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from .errors import ConfigError, OutputError
from .run import Run
from .storage import complete_file

METRICS = "metrics.jsonl"


def find_writer() -> Any:
    """TensorBoard's SummaryWriter.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"--logdir needs TensorBoard ({error}): pip install tensorboard"
        ) from error
    return SummaryWriter


class Journal:
    """Keeps a run's metrics.jsonl, and TensorBoard's files below `logdir` if there is one.

    A line is {"mode", "backend", "seed", "step", "loss", "rate"}, and "accuracy" where the step was
    followed by an evaluation. Whatever a killed run left is first made what its checkpoint knows.

    Args:
        folder: the run's.
        runs: what was done before.

    Raises:
        OutputError: a file cannot be written.
    """

    def __init__(self, folder: Path, runs: Sequence[Run], logdir: str | PathLike | None = None):
        self.path = folder / METRICS
        self.logdir = Path(logdir) / folder.name if logdir else None
        self.board: Any = None
        self.arm: tuple[str, str, int] | None = None
        with complete_file(self.path) as path, open(path, "w", encoding="utf-8") as file:
            for run in runs:
                file.writelines(line(run, step) for step in range(1, len(run.losses) + 1))
        try:
            self.file = open(self.path, "a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error}") from error

    def add(self, run: Run) -> None:
        """Write down the last step of a run."""
        try:
            self.file.write(line(run, len(run.losses)))
            if self.logdir:
                self.show(run)
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error}") from error

    def show(self, run: Run) -> None:
        """Hand the last step of a run to TensorBoard."""
        step, arm = len(run.losses), (run.mode, run.backend, run.seed)
        if arm != self.arm:
            if self.board is not None:
                self.board.close()
            name = f"{run.file_name}-{run.backend}-{run.seed}"
            self.board = find_writer()(f"{self.logdir}/{name}", purge_step=step)
            self.arm = arm
        self.board.add_scalar("loss", run.losses[-1], step)
        self.board.add_scalar("rate", run.rates[-1], step)
        if run.curve and run.curve[-1][0] == step:
            self.board.add_scalar("accuracy", run.curve[-1][1], step)

    def close(self) -> None:
        """Write what is still in memory; a full disk has been reported by then."""
        try:
            self.file.close()
            if self.board is not None:
                self.board.close()
        except OSError:
            pass


def line(run: Run, step: int) -> str:
    """The line of metrics.jsonl for a step of a run, numbered from 1."""
    values = {"mode": run.mode, "backend": run.backend, "seed": run.seed, "step": step}
    values.update(loss=run.losses[step - 1], rate=run.rates[step - 1])
    for done, accuracy in run.curve:
        if done == step:
            values["accuracy"] = accuracy
    return json.dumps(values) + "\n"
