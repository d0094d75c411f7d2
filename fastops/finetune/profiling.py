"""Where the time of a training step goes, by op, on each back end."""

import statistics
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity

from .config import FineTuneConfig
from .data import take
from .measure import clock
from .plan import Plan, make_plan
from .recipe import ops_for
from .run import Run
from .summary import align
from .surroundings import usual_state
from .trainer import Trainer, prepare

WARM_UP, TIMED, PROFILED = 3, 10, 3
"""Steps of each kind."""

SHOWN = 18
"""Ops in the table; the others are summed."""

BETWEEN = "(between ops)"
"""What no op accounts for: Python's time, and the profiler's."""


class Stepper:
    """Takes the steps of a run one by one."""

    def __init__(self, plan: Plan, mode: str, backend: str):
        config, collection = plan.config, plan.collection
        parts = config, collection, plan.format, plan.weights
        network, _ = prepare(*parts, mode, 0, backend)
        images, test = (
            take(collection.train, plan.chosen[0]),
            take(collection.test, torch.arange(2)),
        )
        run = Run(mode, 0, backend)
        self.trainer = Trainer(run, config, ops_for(backend), network, images, test)
        self.trainer.set_training(0)
        kept = self.trainer.keep_outputs()
        self.loader = iter(self.trainer.load(kept))
        self.device = network.device

    def step(self) -> float:
        """Seconds of a step; the images are there before it."""
        batch = next(self.loader)
        started = clock(self.device)
        self.trainer.step(*batch)
        return clock(self.device) - started


@usual_state()
def profile(config: FineTuneConfig) -> str:
    """A table for each mode: milliseconds of a step by op, a column for each back end.

    The time of a step is the median of some that the back ends take in turns, without the
    profiler; the ops' are means of steps under it, in turns as well. What no op accounts for is
    Python's.

    Raises:
        ConfigError, DataError, WeightsError: see finetune.
    """
    steps = WARM_UP + TIMED + PROFILED
    plan = make_plan(
        replace(config, steps=steps, schedule="together", early_stop=None, keep="last")
    )
    with torch.random.fork_rng():
        tables = [profile_mode(plan, mode) for mode in config.chosen_modes]
    return "\n".join([*plan.description, *tables])


def profile_mode(plan: Plan, mode: str) -> str:
    """The table of one mode."""
    backends = plan.config.backends
    steppers = {backend: Stepper(plan, mode, backend) for backend in backends}
    for _ in range(WARM_UP):
        for stepper in steppers.values():
            stepper.step()
    times: dict[str, list[float]] = {backend: [] for backend in backends}
    for _ in range(TIMED):
        for backend, stepper in steppers.items():
            times[backend].append(stepper.step())
    ops: dict[str, dict[str, float]] = {BETWEEN: {}}
    for _ in range(PROFILED):
        for backend, stepper in steppers.items():
            for name, seconds in profile_step(stepper).items():
                taken = ops.setdefault(name, {})
                taken[backend] = taken.get(backend, 0.0) + seconds / PROFILED
    order = sorted(ops.keys() - {BETWEEN}, key=lambda name: -max(ops[name].values()))
    if len(order) > SHOWN:
        rest = order[SHOWN:]
        ops["other ops"] = {b: sum(ops[name].get(b, 0.0) for name in rest) for b in backends}
        order = [*order[:SHOWN], "other ops"]
    order.append(BETWEEN)

    totals = {b: sum(ops[name].get(b, 0.0) for name in order) for b in backends}
    rows = [("op", *(f"{b}, ms" for b in backends), *(f"{b}, %" for b in backends))]
    for name in order:
        own = [ops[name].get(b, 0.0) for b in backends]
        shares = [f"{100 * t / totals[b]:.1f}" for t, b in zip(own, backends, strict=True)]
        rows.append((name, *(f"{1e3 * t:.3f}" for t in own), *shares))
    rows.append(("sum", *(f"{1e3 * totals[b]:.3f}" for b in backends), *["100"] * len(backends)))
    medians = [statistics.median(times[b]) for b in backends]
    title = f"\n{mode}: a step takes " + ", ".join(
        f"{1e3 * t:.2f} ms on {b}" for t, b in zip(medians, backends, strict=True)
    )
    if len(backends) == 2:
        ratios = [a / b for a, b in zip(*times.values(), strict=True)]
        title += f"; {backends[0]}'s time over {backends[1]}'s {statistics.median(ratios):.3f}"
    return title + "\n" + align(rows)


def profile_step(stepper: Stepper) -> dict[str, float]:
    """Seconds of a step by op, and what lies between the ops."""
    cuda = stepper.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities) as profiler:
        seconds = stepper.step()
    found = {}
    for event in profiler.key_averages():
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        if own and not event.key.startswith("DataLoader") and "dataloader" not in event.key.lower():
            found[event.key] = own / 1e6
    return {**found, BETWEEN: max(0.0, seconds - sum(found.values()))}
