"""What one training run came to."""

import statistics
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Run:
    """What one training run came to.

    Attributes:
        mode, seed, backend: which run it was.
        accuracy: share of the test images predicted rightly, after the last step.
        seconds: training alone, without evaluation; frozen stages that ran once are counted.
        times: seconds of each step.
        stopped: whether it ended early.
        images_per_second: training images over `seconds`.
        peak_memory: bytes by which the memory in use rose at most (see measure.PeakMemory); None
            where the system does not tell.
        parameters: the number of trained values.
        epoch_speedup: time of an epoch with the frozen stages in it over time of one on their
            kept outputs; None when nothing is kept.
        losses: the loss before each step.
        rates: the learning rate of the head at each step.
        curve: (steps done, accuracy on a fixed part of the test images).
        predictions: class of each test image, int64 (N,).
        confidence: softmax probability of that class, float32 (N,).
        metrics: metrics.Metrics of the test images, as plain values.
    """

    mode: str
    seed: int
    backend: str
    accuracy: float = 0.0
    seconds: float = 0.0
    times: list[float] = field(default_factory=list)
    stopped: bool = False
    images_per_second: float = 0.0
    peak_memory: int | None = None
    parameters: int = 0
    epoch_speedup: float | None = None
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    predictions: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    confidence: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """The mode as a part of a file's name."""
        return self.mode.replace(":", "-")

    @property
    def seconds_per_step(self) -> float:
        """The median of `times`."""
        return statistics.median(self.times)
