"""One training run: a network, a mode, a seed, a back end."""

import contextlib
import inspect
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..optim import param_groups
from . import processes
from .checkpoints import Weights, load_weights
from .config import OPTIMIZERS, FineTuneConfig
from .data import Collection, InMemory, OnDisk, augment, draw_batches, iterate, take
from .errors import ConfigError, FineTuneError
from .freezing import split
from .measure import PeakMemory, clock
from .networks import build, count_parameters, evaluating
from .pictures import InputFormat

CACHE_LIMIT = 2 << 30
"""Outputs of frozen stages are kept when they take fewer bytes than this."""

EVALUATION_BATCH = 250

SAVE_SECONDS = 30
"""Time between checkpoints where no number of steps is given."""

options_of_ddp = inspect.signature(DistributedDataParallel.__init__).parameters
SYNC_BUFFERS = next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in options_of_ddp)
"""What DistributedDataParallel calls it to overwrite buffers by the first process's (torch 2.14 renamed it)."""

CURVE_IMAGES = 300
"""The curves are drawn from this many test images; the table counts all of them."""


@dataclass(frozen=True)
class Ops:
    """What a recipe takes from a back end."""

    cross_entropy: Callable[..., torch.Tensor]
    mixup_cross_entropy: Callable[..., torch.Tensor]
    optimizers: ModuleType
    patch: Callable[[nn.Module], Any]
    fused: bool
    """The optimizers take l1, max_grad_norm and ema_decay."""


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

    @property
    def file_name(self) -> str:
        """The mode as a part of a file's name."""
        return self.mode.replace(":", "-")

    @property
    def seconds_per_step(self) -> float:
        """The median of `times`."""
        return statistics.median(self.times)


class CutNetwork:
    """A network cut where its training starts (see model.split), on a device.

    What goes into the trained part is made of uint8 pixels, or was kept from an earlier time: then
    it is floating point. Of what is computed without gradients for many images, each of several
    processes computes a share.
    """

    def __init__(self, model: nn.Module, mode: str, format: InputFormat, amp: str):
        cut = split(model, mode)
        self.frozen, self.trained, self.pieces = cut.frozen, cut.trained, cut.pieces
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
        if self.frozen is None:
            return pixels
        with torch.no_grad(), self.autocast():
            return self.frozen(pixels)

    def keep_outputs(self, images: InMemory | OnDisk) -> InMemory | None:
        """The frozen stages' outputs for all images; None without such stages or if too large."""
        if self.frozen is None:
            return None
        example = self.inputs(images[0][0].unsqueeze(0))
        if example.nbytes * len(images) > CACHE_LIMIT:
            return None
        outputs = [self.inputs(pixels).cpu() for pixels, _ in iterate(images, in_order(images))]
        return InMemory(torch.cat(sum(processes.gather(outputs), [])), images.labels)

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
        return torch.cat(sum(processes.gather(logits), [])).softmax(1)


def fit(
    config: FineTuneConfig,
    collection: Collection,
    format: InputFormat,
    weights: Weights | None,
    *,
    mode: str,
    seed: int,
    backend: str,
    chosen: torch.Tensor,
    on_step: Callable[[Run], None] = lambda run: None,
    state: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda state: None,
    stop: threading.Event | None = None,
) -> tuple[Run, nn.Module]:
    """Train one network and test it.

    Args:
        weights: pretrained weights by name, or None.
        chosen: indices of the training images to use.
        on_step: called after each step, and the evaluation after it if there is one.
        state: go on from here; what `save` was given.
        save: called now and then with all that is needed to go on, in every process.
        stop: when it is set, the step is finished, its state saved and KeyboardInterrupt raised.

    Returns:
        The run's figures and the trained network, in eval.

    Raises:
        WeightsError: the weights do not fit the network.
        ConfigError: the back end lacks the optimizer, "last:N" asks for too many stages, or the
            state is of another network or recipe.
        FineTuneError: the loss became infinite or NaN.
    """
    run = Run(mode, seed, backend)
    device = find_device(config.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        memory = PeakMemory(device)
        network, model = prepare(config, collection, format, weights, mode, seed, backend)
        images = take(collection.train, chosen)
        trainer = Trainer(run, config, ops_for(backend), network, images, collection.test)
        if state is not None:
            try:
                trainer.load_state_dict(state)
            except (KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
                reason = (str(error).splitlines() or [""])[0]
                raise ConfigError(
                    f"the saved state of {mode}, seed {seed}, is not one of this network and recipe: {reason}"
                ) from error
        trainer.train(on_step, save, stop or threading.Event())
        run.peak_memory = memory.rise()
    return run, model.eval()


def prepare(
    config: FineTuneConfig,
    collection: Collection,
    format: InputFormat,
    weights: Weights | None,
    mode: str,
    seed: int,
    backend: str,
) -> tuple[CutNetwork, nn.Module]:
    """The network of a run before its first step: cut, and whole. Seeds torch's generators."""
    torch.manual_seed(seed)
    model = build(config.chosen_arch, len(collection.classes), config.dropout)
    if weights is not None and mode != "scratch":
        load_weights(model, weights.state, head=False)
    model.to(find_device(config.device)).to(memory_format=torch.channels_last)
    ops_for(backend).patch(model)
    return CutNetwork(model, mode, format, config.amp), model


class Trainer:
    """One run from its first step, or from any step that was saved, to its last.

    What is computed from a saved state equals, bit for bit, what would have been computed without
    the break (on the same machine, with the same number of threads).

    Several processes each take their part of a batch that is so many times as large. Gradients and
    losses are those of the whole batch; BatchNorm normalises by a process's own part, as one
    process does with `accumulate`, and its running statistics are the mean of all processes'.
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
        self.steps = config.count_steps(len(images), processes.count())
        size = config.batch_size * processes.count()
        self.batches = draw_batches(len(images), size, self.steps, run.seed)
        self.batch = len(self.batches[0])
        # The same network in every process, but not the same dropout.
        own_seed = run.seed + (processes.rank() << 32)
        torch.manual_seed(own_seed)
        self.noise = torch.Generator().manual_seed(own_seed)
        self.replica: nn.Module = network.trained
        self.optimizer = make_optimizer(config, ops, run.mode, network.pieces)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, warmup_cosine(self.steps, config.warmup)
        )
        run.parameters = count_parameters(network.trained)
        gradual = config.schedule == "gradual" and run.mode != "scratch"
        epoch = max(1, len(images) // self.batch)
        self.thaw = thaw_steps(network.pieces, self.steps, epoch) if gradual else {}
        self.ema: AveragedModel | None = None
        if config.ema is not None and averages_in_step(config, ops):
            self.ema = StepAverage(network.trained, config.ema, self.optimizer)
        elif config.ema is not None:
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
        if self.ema is None:
            return self.network.trained
        if isinstance(self.ema, StepAverage):
            self.ema.fetch(self.network.trained)
        return self.ema.module

    def state_dict(self) -> dict[str, Any]:
        """All that changes from step to step; tensors and plain values only."""
        return {
            "run": asdict(self.run),
            "trained": self.network.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "ema": self.ema and self.ema.state_dict(),
            "best": self.best,
            "random": processes.gather(self.random_state()),
        }

    def random_state(self) -> dict[str, torch.Tensor]:
        """Where this process's random number generators stand."""
        state = {"noise": self.noise.get_state(), "cpu": torch.get_rng_state()}
        if self.network.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.network.device)
        return state

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
        random = state["random"][processes.rank()]
        self.noise.set_state(random["noise"])
        torch.set_rng_state(random["cpu"])
        if "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self.network.device)

    def keep_outputs(self) -> InMemory | None:
        """The frozen stages' outputs, where nothing changes the images on their way."""
        varied = self.config.augment or self.config.mixup
        return None if varied else self.network.keep_outputs(self.images)

    def set_training(self, step: int) -> None:
        """Freeze what the schedule has not reached at `step`, and the norms that are to stay."""
        for name, piece in self.network.pieces.items():
            thawed = self.thaw.get(name, 0) <= step
            piece.requires_grad_(thawed).train(thawed)
        if self.config.freeze_norm and self.run.mode != "scratch":
            for module in self.network.trained.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        if processes.count() > 1:
            # It takes the parameters that learn now; BatchNorm's statistics are averaged in step().
            options: dict[str, Any] = {SYNC_BUFFERS: False}
            self.replica = DistributedDataParallel(self.network.trained, **options)

    def loss(self, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of a batch, augmented and mixed as the recipe says."""
        config, network = self.config, self.network
        noise = self.noise if config.augment else None
        labels = labels.to(network.device)
        smoothing = config.label_smoothing
        with network.autocast():
            if not config.mixup:
                logits = self.replica(network.inputs(pixels, noise))
                return self.ops.cross_entropy(logits, labels, label_smoothing=smoothing)
            share = torch.distributions.Beta(config.mixup, config.mixup).sample().item()
            others = torch.randperm(len(labels))
            logits = self.replica(network.inputs(pixels, noise, (share, others)))
            mixed = (labels, labels[others.to(network.device)], share)
            return self.ops.mixup_cross_entropy(logits, *mixed, label_smoothing=smoothing)

    def step(self, pixels: torch.Tensor, labels: torch.Tensor) -> float:
        """One step of the optimizer on this process's part of the batch; the whole batch's loss before it."""
        run, config = self.run, self.config
        self.optimizer.zero_grad()
        loss_sum = torch.zeros(())
        # The same number in every process: the smallest part of the batch decides.
        parts = min(config.accumulate, max(1, self.batch // processes.count() // 2))
        chunks = zip(pixels.tensor_split(parts), labels.tensor_split(parts), strict=True)
        for number, (some, theirs) in enumerate(chunks, 1):
            with self.alone() if number < parts else contextlib.nullcontext():
                loss = self.loss(some, theirs) * (len(theirs) * processes.count() / self.batch)
                loss.backward()
            loss_sum += loss.item()
        self.agree(loss_sum)
        value = loss_sum.item()
        if not math.isfinite(value):
            raise FineTuneError(
                f"{run.mode}, seed {run.seed}: the loss is {value} at step {len(run.losses) + 1}; "
                "lower --lr"
            )
        if not self.ops.fused:
            regularise(self.optimizer, config.max_grad_norm)
        run.rates.append(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.scheduler.step()
        if self.ema is not None:
            self.ema.update_parameters(self.network.trained)
        run.losses.append(value)
        return value

    def alone(self) -> contextlib.AbstractContextManager:
        """A block whose backward pass leaves the gradients' exchange to a later one."""
        if isinstance(self.replica, DistributedDataParallel):
            return self.replica.no_sync()
        return contextlib.nullcontext()

    def agree(self, value: torch.Tensor) -> None:
        """Make a loss, and the floating-point buffers of the network, the means over the processes."""
        if processes.count() == 1:
            return
        buffers = [b for b in self.network.trained.buffers() if b.is_floating_point()]
        loss = value.to(self.network.device)
        processes.average_([loss, *buffers])
        value.copy_(loss)

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
        on_step: Callable[[Run], None],
        save: Callable[[dict[str, Any]], None],
        stop: threading.Event,
    ) -> None:
        """The loop itself, then the test; fills in `run`."""
        run, config, network = self.run, self.config, self.network
        started = clock(network.device)
        kept = self.keep_outputs()
        keeping = clock(network.device) - started

        test_every = max(1, self.steps // 8)
        first = len(run.losses)
        self.set_training(first)
        saved = time.monotonic()
        batches = [batch[processes.part(len(batch))] for batch in self.batches[first:]]
        if run.stopped:
            batches = []
        started = clock(network.device)
        for number, (pixels, labels) in enumerate(iterate(kept or self.images, batches), first):
            if number in self.thaw.values():
                self.set_training(number)
            self.step(pixels, labels)
            run.times.append(clock(network.device) - started)
            done = number + 1
            if done % test_every == 0 or done == self.steps:
                run.stopped = self.evaluate()
            on_step(run)
            due = time.monotonic() - saved > SAVE_SECONDS
            if config.save_every is not None:
                due = done % config.save_every == 0
            due, stopping = processes.any_of(due, stop.is_set())
            if due or stopping:
                save(self.state_dict())
                saved = time.monotonic()
            if stopping:
                raise KeyboardInterrupt
            if run.stopped:
                break
            started = clock(network.device)

        if self.best is not None:
            network.trained.load_state_dict(self.best)
        elif self.ema is not None:
            network.trained.load_state_dict(self.averaged.state_dict())
        trained_images = self.batch * len(run.losses)
        looping = sum(run.times)
        run.seconds = keeping + looping
        run.images_per_second = trained_images / run.seconds
        if kept is not None:
            epoch = looping * len(self.images) / trained_images
            run.epoch_speedup = (keeping + epoch) / epoch
        run.confidence, run.predictions = network.predict(self.test).max(1)
        right = run.predictions == self.test.labels
        if config.early_stop is not None:
            right = right[self.other_order]
        run.accuracy = right.float().mean().item()


class StepAverage(AveragedModel):
    """The moving average of a network whose parameters the optimizer averages within its step
    (fastops.optim's ema_decay): only the buffers are left to average here."""

    def __init__(self, model: nn.Module, decay: float, optimizer: torch.optim.Optimizer):
        super().__init__(model)
        self.decay, self.optimizer = decay, optimizer

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """After a step."""
        for average, value in zip(self.module.buffers(), model.buffers(), strict=True):
            if self.n_averaged and average.is_floating_point():
                average.lerp_(value, 1 - self.decay)
            else:
                average.copy_(value)
        self.n_averaged += 1

    @torch.no_grad()
    def fetch(self, model: nn.Module) -> None:
        """Copy the optimizer's averages of the model's parameters into `module`."""
        for average, p in zip(self.module.parameters(), model.parameters(), strict=True):
            average.copy_(self.optimizer.state[p].get("ema", p))


def averages_in_step(config: FineTuneConfig, ops: Ops) -> bool:
    """Whether the optimizer keeps the moving average: it starts a parameter's average with the
    parameter's first step, as AveragedModel does where all parameters step from the first on."""
    return config.ema is not None and ops.fused and config.schedule == "together"


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
    """Batches for evaluation: every image of this process's part once, in order."""
    indices = list(range(len(images)))[processes.part(len(images))]
    return [indices[i : i + EVALUATION_BATCH] for i in range(0, len(indices), EVALUATION_BATCH)]


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
    if ops.fused:
        options["max_grad_norm"] = config.max_grad_norm
    if averages_in_step(config, ops):
        options["ema_decay"] = config.ema
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
    """The torch device of a name; "auto" prefers a GPU. Each of several processes has its own GPU.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and processes.count() > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', processes.rank())}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used: {reason}") from error
    return device
