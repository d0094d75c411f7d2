"""One training run: a network, a mode, a seed, a back end."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .config import OPTIMIZERS, FineTuneConfig
from .data import Collection, InMemory, InputFormat, OnDisk, augment, draw_batches, iterate, take
from .errors import ConfigError, FineTuneError
from .model import build, count_parameters, evaluating, load_weights, split

CACHE_LIMIT = 2 << 30
"""Outputs of frozen stages are kept when they take fewer bytes than this."""

EVALUATION_BATCH = 250

CURVE_IMAGES = 300
"""The curves are drawn from this many test images; the table counts all of them."""


@dataclass(frozen=True)
class Ops:
    """What a recipe takes from a back end."""

    cross_entropy: Callable[..., torch.Tensor]
    optimizers: ModuleType
    patch: Callable[[nn.Module], Any]


def ops_for(backend: str) -> Ops:
    """The loss, the optimizers and the module patch of "fastops" or "torch"."""
    if backend == "torch":
        return Ops(F.cross_entropy, torch.optim, lambda model: None)
    from fastops import functional, optim, patch

    return Ops(functional.cross_entropy, optim, patch)


@dataclass
class Run:
    """What one training run came to.

    Attributes:
        mode, seed, backend: which run it was.
        accuracy: share of the test images predicted rightly, after the last step.
        seconds: training alone, without evaluation; frozen stages that ran once are counted.
        images_per_second: training images over `seconds`.
        parameters: the number of trained values.
        epoch_speedup: time of an epoch with the frozen stages in it over time of one on their
            kept outputs; None when nothing is kept.
        losses: the loss before each step.
        curve: (steps done, accuracy on a fixed part of the test images).
        predictions: class of each test image, int64 (N,).
        confidence: softmax probability of that class, float32 (N,).
    """

    mode: str
    seed: int
    backend: str
    accuracy: float = 0.0
    seconds: float = 0.0
    images_per_second: float = 0.0
    parameters: int = 0
    epoch_speedup: float | None = None
    losses: list[float] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    predictions: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    confidence: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class CutNetwork:
    """A network cut where its training starts (see model.split), on a device.

    What goes into the trained part is made of uint8 pixels, or was kept from an earlier time: then
    it is floating point.
    """

    def __init__(self, model: nn.Module, mode: str, format: InputFormat, amp: str):
        self.frozen, self.pieces = split(model, mode)
        self.trained = nn.Sequential(*self.pieces.values())
        self.format = format
        self.amp = amp
        self.device = next(model.parameters()).device

    def autocast(self) -> torch.autocast:
        """bfloat16 where it is asked for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp == "bf16")

    def inputs(self, images: torch.Tensor, noise: torch.Generator | None = None) -> torch.Tensor:
        """What the trained part takes: the frozen stages' output without gradients.

        Args:
            images: uint8 (N, C, H, W), or outputs that were kept.
            noise: augment the images with it before anything else sees them.
        """
        images = images.to(self.device)
        if images.dtype != torch.uint8:
            return images
        pixels = self.format.normalise(images).contiguous(memory_format=torch.channels_last)
        if noise is not None:
            pixels = augment(pixels, noise)
        with torch.no_grad(), self.autocast():
            return self.frozen(pixels)

    def keep_outputs(self, images: InMemory | OnDisk) -> InMemory | None:
        """The frozen stages' outputs for all images; None without such stages or if too large."""
        if not len(self.frozen):
            return None
        example = self.inputs(images[0][0].unsqueeze(0))
        if example.nbytes * len(images) > CACHE_LIMIT:
            return None
        outputs = [self.inputs(pixels).cpu() for pixels, _ in iterate(images, in_order(images))]
        return InMemory(torch.cat(outputs), images.labels)

    def predict(self, images: InMemory | OnDisk) -> torch.Tensor:
        """Softmax probabilities, float32 (N, classes) on the CPU, with the network in eval."""
        with evaluating(self.trained), self.autocast():
            logits = [
                self.trained(self.inputs(pixels)).float().cpu()
                for pixels, _ in iterate(images, in_order(images))
            ]
        return torch.cat(logits).softmax(1)


def fit(
    config: FineTuneConfig,
    collection: Collection,
    format: InputFormat,
    weights: dict[str, torch.Tensor] | None,
    *,
    mode: str,
    seed: int,
    backend: str,
    chosen: torch.Tensor,
    on_step: Callable[[float], None] = lambda loss: None,
) -> tuple[Run, nn.Module]:
    """Train one network and test it.

    Args:
        weights: pretrained weights by name, or None.
        chosen: indices of the training images to use.
        on_step: called after each step with its loss.

    Returns:
        The run's figures and the trained network, in eval.

    Raises:
        WeightsError: the weights do not fit the network.
        ConfigError: the back end lacks the optimizer, or "last:N" asks for too many stages.
        FineTuneError: the loss became infinite or NaN.
    """
    ops = ops_for(backend)
    run = Run(mode, seed, backend)
    images = take(collection.train, chosen)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build(config.arch, len(collection.classes), config.dropout)
        if weights is not None and mode != "scratch":
            load_weights(model, weights, head=False)
        model.to(find_device(config.device)).to(memory_format=torch.channels_last)
        ops.patch(model)
        network = CutNetwork(model, mode, format, config.amp)
        train(run, config, ops, network, images, collection.test, on_step)
    return run, model.eval()


def train(
    run: Run,
    config: FineTuneConfig,
    ops: Ops,
    network: CutNetwork,
    images: InMemory | OnDisk,
    test: InMemory | OnDisk,
    on_step: Callable[[float], None],
) -> None:
    """The loop itself; fills in `run`."""
    steps = config.count_steps(len(images))
    batches = draw_batches(len(images), config.batch_size, steps, run.seed)
    noise = torch.Generator().manual_seed(run.seed) if config.augment else None
    optimizer = make_optimizer(config, ops, run.mode, network.pieces)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(steps, config.warmup))
    run.parameters = count_parameters(network.trained)

    test = network.keep_outputs(test) or test
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    part = take(test, order[:CURVE_IMAGES])

    started = clock(network.device)
    kept = None if config.augment else network.keep_outputs(images)
    keeping = clock(network.device) - started

    testing = 0.0
    test_every = max(1, steps // 8)
    started = clock(network.device)
    for step, (pixels, labels) in enumerate(iterate(kept or images, batches), 1):
        with network.autocast():
            logits = network.trained(network.inputs(pixels, noise))
            loss = ops.cross_entropy(
                logits, labels.to(network.device), label_smoothing=config.label_smoothing
            )
        value = loss.item()
        if not math.isfinite(value):
            raise FineTuneError(
                f"{run.mode}, seed {run.seed}: the loss is {value} at step {step}; lower --lr"
            )
        optimizer.zero_grad()
        loss.backward()
        if config.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(network.trained.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        run.losses.append(value)
        on_step(value)
        if step % test_every == 0 or step == steps:
            paused = clock(network.device)
            right = network.predict(part).argmax(1) == part.labels
            run.curve.append((step, right.float().mean().item()))
            testing += clock(network.device) - paused
    looping = clock(network.device) - started - testing

    trained_images = sum(map(len, batches))
    run.seconds = keeping + looping
    run.images_per_second = trained_images / run.seconds
    if kept is not None:
        epoch = looping * len(images) / trained_images
        run.epoch_speedup = (keeping + epoch) / epoch
    run.confidence, run.predictions = network.predict(test).max(1)
    run.accuracy = (run.predictions == test.labels).float().mean().item()


def in_order(images: InMemory | OnDisk) -> list[list[int]]:
    """Batches for evaluation: every image once, in order."""
    indices = list(range(len(images)))
    return [indices[i : i + EVALUATION_BATCH] for i in range(0, len(images), EVALUATION_BATCH)]


def find_optimizer(config: FineTuneConfig, ops: Ops) -> Callable[..., torch.optim.Optimizer]:
    """The back end's class for `config.optimizer`.

    Raises:
        ConfigError: the back end has none.
    """
    name = OPTIMIZERS[config.optimizer]
    if not hasattr(ops.optimizers, name):
        raise ConfigError(f"{ops.optimizers.__name__} has no {name}: choose another optimizer")
    return getattr(ops.optimizers, name)


def make_optimizer(
    config: FineTuneConfig, ops: Ops, mode: str, trained: dict[str, nn.Module]
) -> torch.optim.Optimizer:
    """The optimizer over the trained pieces: own rates for head and backbone, own groups for
    weights (decayed) and for biases and norms (not)."""
    optimizer = find_optimizer(config, ops)
    head_rate = config.chosen_lr
    groups = []
    for piece, module in trained.items():
        pretrained = piece != "head" and mode != "scratch"
        rate = head_rate * config.backbone_rate if pretrained else head_rate
        weights = [p for p in module.parameters() if p.ndim > 1]
        others = [p for p in module.parameters() if p.ndim <= 1]
        for params, decay in ((weights, config.weight_decay), (others, 0.0)):
            if params:
                groups.append({"params": params, "lr": rate, "weight_decay": decay})
    options = {"momentum": 0.9} if config.optimizer == "sgd" else {}
    return optimizer(groups, lr=head_rate, **options)


def warmup_cosine(steps: int, warmup: float) -> Callable[[int], float]:
    """The factor on every learning rate at a step: linear rise, then a cosine down to 0."""
    rise = max(1, round(steps * warmup))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

    return factor


def find_device(name: str) -> torch.device:
    """The torch device of a name; "auto" prefers a GPU.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used: {reason}") from error
    return device


def clock(device: torch.device) -> float:
    """Seconds, with the device's work until now finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    numbers = torch.tensor(list(values), dtype=torch.float64)
    return numbers.mean().item(), numbers.std().item() if len(numbers) > 1 else 0.0
