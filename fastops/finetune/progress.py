"""What an unfinished experiment goes on from."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from . import processes
from .config import FineTuneConfig
from .data import Collection
from .errors import ConfigError
from .run import Run
from .storage import check_records, complete_file

PROGRESS = "progress.pt"
"""What an unfinished experiment goes on from: the finished runs, and the state of the one that is not."""

FREE = ("out", "logdir", "export", "save_every", "threads", "workers")
"""The options that an unfinished experiment may go on with another value of: none of them changes what is computed."""


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
        check_records(path)
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
