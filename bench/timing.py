"""Times calls in alternation: torch's, ours, torch's, ours; what slows the machine down for a while slows both.

The result of a pair is a ratio, and that of a case the median of its ratios.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from statistics import median, quantiles

import torch

from .calls import Call, Contenders

SAMPLE = 200e-6  # seconds: shorter calls are repeated until a sample takes this long
WARM_BELOW = 5e-3  # seconds: up to here a call's data may still lie in a cache
LEAST = 5  # pairs of every baseline, whatever the budget
PATIENCE, FEW = 10.0, 3  # seconds after which so many pairs must do
ENOUGH = 25  # pairs from which on a narrow result ends the measurement
NARROW = 0.005  # half the confidence interval of the median over the median
FAR = 1.25  # a baseline this much slower than the best gets no more than LEAST pairs
COPY_EVERY = 4  # rounds, after the first LEAST


@dataclass
class Measurement:
    """Seconds a call, one number a sample, in the order taken; `ratios` are theirs over ours, pair by pair. `theirs` are
    torch's calls and those of `peers`."""

    ours: list[float] = field(default_factory=list)
    theirs: dict[str, list[float]] = field(default_factory=dict)
    ratios: dict[str, list[float]] = field(default_factory=dict)
    copy: list[float] = field(default_factory=list)
    peers: frozenset[str] = frozenset()

    @property
    def best(self) -> str:
        """The one of torch's that is fastest beside ours."""
        return min(self.ratios.keys() - self.peers, key=lambda name: median(self.ratios[name]))


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The first quartile, the median and the third."""
    if len(values) < 2:
        return (values[0],) * 3
    return tuple(quantiles(values, n=4, method="inclusive"))


def cpu_seconds(call: Call, number: int) -> float:
    """Seconds that `number` calls take."""
    start = time.perf_counter()
    for _ in repeat(None, number):
        call()
    return time.perf_counter() - start


def cuda_seconds(call: Call, number: int) -> float:
    """Seconds between two events on the current stream, around `number` calls."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in repeat(None, number):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


@contextmanager
def no_garbage_collection():
    """Keeps the collector out of the samples; what lies around is collected before."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def make_copy(nbytes: int, device: str) -> Call:
    """A copy that moves `nbytes`, half of them read and half written, between buffers that are ready."""
    # Written, not zeros: untouched pages would all be read from one page of zeros.
    source = torch.ones(max(1, nbytes // 8), device=device)
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


class Sampler:
    """Takes one sample of a call after a warm-up that finds how often to repeat it."""

    def __init__(self, call: Call, seconds: Callable[[Call, int], float]):
        self.call, self.seconds = call, seconds
        for _ in range(2):
            once = seconds(call, 1)
        self.once = min(once, *(seconds(call, 1) for _ in range(3 if once < WARM_BELOW else 1)))

    def __call__(self, number: int) -> float:
        """Seconds a call, the mean of `number` calls."""
        if self.once < WARM_BELOW:
            self.call()  # what ran before had the caches
        return self.seconds(self.call, number) / number


def measure(contenders: Contenders, copy: Call, budget: float, device: str) -> Measurement:
    """Samples all contenders and the copy in alternation for about `budget` seconds."""
    seconds = cuda_seconds if device == "cuda" else cpu_seconds
    with no_garbage_collection():
        ours, copied = Sampler(contenders.ours, seconds), Sampler(copy, seconds)
        others = contenders.theirs | contenders.peers
        theirs = {name: Sampler(call, seconds) for name, call in others.items()}
        fastest = min(s.once for s in (ours, *theirs.values()))
        number = max(1, round(SAMPLE / fastest))
        result = Measurement(
            theirs={name: [] for name in theirs},
            ratios={name: [] for name in theirs},
            peers=frozenset(contenders.peers),
        )
        in_contest = list(theirs)
        start = time.perf_counter()
        for turn in range(100_000):
            for name in in_contest:
                them, us = theirs[name](number), ours(number)
                result.theirs[name].append(them)
                result.ours.append(us)
                result.ratios[name].append(them / us)
            if turn < LEAST or turn % COPY_EVERY == 0:
                result.copy.append(copied(max(1, round(SAMPLE / copied.once))))
            elapsed = time.perf_counter() - start
            if turn + 1 >= FEW and elapsed >= max(budget, PATIENCE):
                break
            if turn + 1 < LEAST:
                continue
            if turn + 1 == LEAST:
                limit = FAR * median(result.ratios[result.best])
                in_contest = [n for n in in_contest if median(result.ratios[n]) <= limit]
            if elapsed >= budget or (turn + 1 >= ENOUGH and is_narrow(result)):
                break
    return result


def is_narrow(result: Measurement) -> bool:
    """Whether more pairs would hardly change the median ratio (McGill, Tukey and Larsen's notch, 1978)."""
    ratios = result.ratios[result.best]
    low, middle, high = quartiles(ratios)
    return 1.57 * (high - low) / len(ratios) ** 0.5 <= NARROW * middle
