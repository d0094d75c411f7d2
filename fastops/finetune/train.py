"""One training run: a network, a mode, a seed, a back end."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..optim import param_groups
from .config import OPTIMIZERS, FineTuneConfig
from .data import Collection, InMemory, InputFormat, OnDisk, augment, draw_batches, iterate, take
from .errors import ConfigError, FineTuneError
from .model import build, count_parameters, evaluating, load_weights, split

CACHE_LIMIT = 2 << 30
"""Outputs of frozen stages are kept when they take fewer bytes than this."""

EVALUATION_BATCH = 250

SAVE_SECONDS = 30
"""Time between checkpoints where no number of steps is given."""

CURVE_IMAGES = 300
"""The curves are drawn from this many test images; the table counts all of them."""


@dataclass(frozen=True)
class Ops:
    """What a recipe takes from a back end."""

    cross_entropy: Callable[..., torch.Tensor]
    mixup_cross_entropy: Callable[..., torch.Tensor]
    optimizers: ModuleType
    patch: Callable[[nn.Module], Any]
    regularises: bool
    """The optimizers take l1 and max_grad_norm."""


def ops_for(backend: str) -> Ops:
    """The losses, the optimizers and the module patch of "fastops" or "torch"."""
    if backend == "torch":
        return Ops(F.cross_entropy, mix_cross_entropies, torch.optim, lambda model: None, False)
    from fastops import functional, optim, patch

    return Ops(functional.cross_entropy, functional.mixup_cross_entropy, optim, patch, True)


def mix_cross_entropies(logits, labels_a, labels_b, share, **options) -> torch.Tensor:
    """fastops.functional.mixup_cross_entropy on torch's own cross-entropy."""
    first = F.cross_entropy(logits, labels_a, **options)
    return share * first + (1 - share) * F.cross_entropy(logits, labels_b, **options)


@dataclass
class Run:
    """What one training run came to.

    Attributes:
        mode, seed, backend: which run it was.
        accuracy: share of the test images predicted rightly, after the last step.
        seconds: training alone, without evaluation; frozen stages that ran once are counted.
        looping: the part of `seconds` that the steps took.
        stopped: whether it ended early.
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
    looping: float = 0.0
    stopped: bool = False
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

    def inputs(
        self,
        images: torch.Tensor,
        noise: torch.Generator | None = None,
        mixture: tuple[float, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """What the trained part takes: the frozen stages' output without gradients.

        Args:
            images: uint8 (N, C, H, W), or outputs that were kept.
            noise: augment the images with it before anything else sees them.
            mixture: the share of an image, and the index of the image that the rest is of.
        """
        images = images.to(self.device)
        if images.dtype != torch.uint8:
            return images
        pixels = self.format.normalise(images).contiguous(memory_format=torch.channels_last)
        if noise is not None:
            pixels = augment(pixels, noise)
        if mixture is not None:
            share, others = mixture
            pixels = share * pixels + (1 - share) * pixels[others.to(self.device)]
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

    def predict(self, images: InMemory | OnDisk, trained: nn.Module | None = None) -> torch.Tensor:
        """Softmax probabilities, float32 (N, classes) on the CPU, with the network in eval.

        Args:
            trained: takes the place of the trained part.
        """
        trained = trained or self.trained
        with evaluating(trained), self.autocast():
            logits = [
                trained(self.inputs(pixels)).float().cpu()
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
    state: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda state: None,
    stop: threading.Event | None = None,
) -> tuple[Run, nn.Module]:
    """Train one network and test it.

    Args:
        weights: pretrained weights by name, or None.
        chosen: indices of the training images to use.
        on_step: called after each step with its loss.
        state: go on from here; what `save` was given.
        save: called now and then with all that is needed to go on.
        stop: when it is set, the step is finished, its state saved and KeyboardInterrupt raised.

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
        trainer = Trainer(run, config, ops, network, images, collection.test)
        if state is not None:
            trainer.load_state_dict(state)
        trainer.train(on_step, save, stop or threading.Event())
    return run, model.eval()


class Trainer:
    """One run from its first step, or from any step that was saved, to its last.

    What is computed from a saved state equals, bit for bit, what would have been computed without
    the break (on the same machine, with the same number of threads).
    """

    def __init__(
        self,
        run: Run,
        config: FineTuneConfig,
        ops: Ops,
        network: CutNetwork,
        images: InMemory | OnDisk,
        test: InMemory | OnDisk,
    ):
        self.run, self.config, self.ops, self.network = run, config, ops, network
        self.images = images
        self.steps = config.count_steps(len(images))
        self.batches = draw_batches(len(images), config.batch_size, self.steps, run.seed)
        self.noise = torch.Generator().manual_seed(run.seed)
        self.optimizer = make_optimizer(config, ops, run.mode, network.pieces)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, warmup_cosine(self.steps, config.warmup)
        )
        run.parameters = count_parameters(network.trained)
        gradual = config.schedule == "gradual" and run.mode != "scratch"
        epoch = max(1, len(images) // len(self.batches[0]))
        self.thaw = thaw_steps(network.pieces, self.steps, epoch) if gradual else {}
        self.ema = None
        if config.ema is not None:
            average = get_ema_multi_avg_fn(config.ema)
            self.ema = AveragedModel(network.trained, multi_avg_fn=average, use_buffers=True)
        self.best: dict[str, torch.Tensor] | None = None
        self.test = network.keep_outputs(test) or test
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
        count = CURVE_IMAGES if config.early_stop is None else min(CURVE_IMAGES, len(test) // 2)
        self.curve_order, self.other_order = order[:count], order[count:]
        self.curve_images = take(self.test, self.curve_order)

    @property
    def averaged(self) -> nn.Module:
        """The trained part as it is tested: the moving average where there is one."""
        return self.network.trained if self.ema is None else self.ema.module

    def state_dict(self) -> dict[str, Any]:
        """All that changes from step to step; tensors and plain values only."""
        return {
            "run": asdict(self.run),
            "trained": self.network.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "ema": self.ema and self.ema.state_dict(),
            "best": self.best,
            "noise": self.noise.get_state(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        for name, value in state["run"].items():
            setattr(self.run, name, value)
        self.network.trained.load_state_dict(state["trained"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.best = state["best"]
        self.noise.set_state(state["noise"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"]:
            torch.cuda.set_rng_state_all(state["random_cuda"])

    def set_training(self, step: int) -> None:
        """Freeze what the schedule has not reached at `step`, and the norms that are to stay."""
        for name, piece in self.network.pieces.items():
            thawed = self.thaw.get(name, 0) <= step
            piece.requires_grad_(thawed).train(thawed)
        if self.config.freeze_norm and self.run.mode != "scratch":
            for module in self.network.trained.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def loss(self, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of a batch, augmented and mixed as the recipe says."""
        config, network = self.config, self.network
        noise = self.noise if config.augment else None
        labels = labels.to(network.device)
        smoothing = config.label_smoothing
        with network.autocast():
            if not config.mixup:
                logits = network.trained(network.inputs(pixels, noise))
                return self.ops.cross_entropy(logits, labels, label_smoothing=smoothing)
            share = torch.distributions.Beta(config.mixup, config.mixup).sample().item()
            others = torch.randperm(len(labels))
            logits = network.trained(network.inputs(pixels, noise, (share, others)))
            mixed = (labels, labels[others.to(network.device)], share)
            return self.ops.mixup_cross_entropy(logits, *mixed, label_smoothing=smoothing)

    def step(self, pixels: torch.Tensor, labels: torch.Tensor) -> float:
        """One step of the optimizer; the batch's loss before it."""
        run, config = self.run, self.config
        self.optimizer.zero_grad()
        value = 0.0
        parts = min(config.accumulate, max(1, len(labels) // 2))
        for some, theirs in zip(
            pixels.tensor_split(parts), labels.tensor_split(parts), strict=True
        ):
            loss = self.loss(some, theirs) * (len(theirs) / len(labels))
            loss.backward()
            value += loss.item()
        if not math.isfinite(value):
            raise FineTuneError(
                f"{run.mode}, seed {run.seed}: the loss is {value} at step {len(run.losses) + 1}; "
                "lower --lr"
            )
        if not self.ops.regularises:
            regularise(self.optimizer, config.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        if self.ema is not None:
            self.ema.update_parameters(self.network.trained)
        run.losses.append(value)
        return value

    def evaluate(self) -> bool:
        """Add a point to the curve; whether it is time to stop early."""
        right = self.network.predict(self.curve_images, self.averaged).argmax(1)
        accuracy = (right == self.curve_images.labels).float().mean().item()
        self.run.curve.append((len(self.run.losses), accuracy))
        if self.config.early_stop is None:
            return False
        accuracies = [accuracy for _, accuracy in self.run.curve]
        best = accuracies.index(max(accuracies))
        if best == len(accuracies) - 1:
            self.best = {k: v.clone() for k, v in self.averaged.state_dict().items()}
        return len(accuracies) - 1 - best >= self.config.early_stop

    def train(
        self,
        on_step: Callable[[float], None],
        save: Callable[[dict[str, Any]], None],
        stop: threading.Event,
    ) -> None:
        """The loop itself, then the test; fills in `run`."""
        run, config, network = self.run, self.config, self.network
        started = clock(network.device)
        varied = config.augment or config.mixup
        kept = None if varied else network.keep_outputs(self.images)
        keeping = clock(network.device) - started

        test_every = max(1, self.steps // 8)
        first = len(run.losses)
        self.set_training(first)
        saved = time.monotonic()
        started = clock(network.device)
        batches = self.batches[first:]
        if run.stopped:
            batches = []
        for number, (pixels, labels) in enumerate(iterate(kept or self.images, batches), first):
            if number in self.thaw.values():
                self.set_training(number)
            value = self.step(pixels, labels)
            run.looping += clock(network.device) - started
            done = number + 1
            on_step(value)
            if done % test_every == 0 or done == self.steps:
                run.stopped = self.evaluate()
            interval = time.monotonic() - saved
            if done % config.save_every == 0 if config.save_every else interval > SAVE_SECONDS:
                save(self.state_dict())
                saved = time.monotonic()
            if stop.is_set():
                save(self.state_dict())
                raise KeyboardInterrupt
            if run.stopped:
                break
            started = clock(network.device)

        if self.best is not None:
            network.trained.load_state_dict(self.best)
        elif self.ema is not None:
            network.trained.load_state_dict(self.ema.module.state_dict())
        trained_images = sum(map(len, self.batches[: len(run.losses)]))
        run.seconds = keeping + run.looping
        run.images_per_second = trained_images / run.seconds
        if kept is not None:
            epoch = run.looping * len(self.images) / trained_images
            run.epoch_speedup = (keeping + epoch) / epoch
        run.confidence, run.predictions = network.predict(self.test).max(1)
        right = run.predictions == self.test.labels
        if config.early_stop is not None:
            right = right[self.other_order]
        run.accuracy = right.float().mean().item()


def regularise(optimizer: torch.optim.Optimizer, max_grad_norm: float | None) -> None:
    """What fastops.optim does within its step: clip, then add the L1 penalty's subgradient."""
    if max_grad_norm is not None:
        every = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(every, max_grad_norm)
    for group in optimizer.param_groups:
        if group["l1"]:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.add_(p.detach().sign(), alpha=group["l1"])


def thaw_steps(pieces: dict[str, nn.Module], steps: int, epoch: int) -> dict[str, int]:
    """The step at which each piece starts to learn: the head at 0, the others one after another.

    Pieces start in equal intervals over the first half of the steps, and with a new epoch where
    an interval is longer than an epoch.
    """
    names = [name for name in reversed(pieces) if count_parameters(pieces[name])]
    interval = steps / (2 * len(names))
    starts = [math.ceil(i * interval) for i in range(len(names))]
    if interval > epoch:
        starts = [-(-start // epoch) * epoch for start in starts]
    return dict(zip(names, starts, strict=True))


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C sets; the second raises KeyboardInterrupt as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(number, frame):
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


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
    """The optimizer over the trained pieces: own rates for the head and each stage, own groups for
    weights (regularised) and for biases and norms (not)."""
    optimizer = find_optimizer(config, ops)
    head_rate = config.chosen_lr
    stages = [name for name, module in reversed(trained.items()) if count_parameters(module)]
    groups = []
    for depth, piece in enumerate(stages):
        rate = head_rate
        if piece != "head" and mode != "scratch":
            rate *= config.backbone_rate * config.layer_decay ** (depth - 1)
        for group in param_groups(trained[piece], config.weight_decay, config.l1):
            groups.append({**group, "lr": rate})
    options: dict[str, Any] = {"momentum": 0.9} if config.optimizer == "sgd" else {}
    if ops.regularises:
        options["max_grad_norm"] = config.max_grad_norm
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
