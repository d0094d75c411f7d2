"""One training run: a network, a mode, a seed, a back end."""

import contextlib
import inspect
import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from . import processes
from .augmentation import Augmented, draw_mixture, training_transform
from .checkpoints import Weights, load_weights
from .config import FineTuneConfig
from .cutting import CutNetwork
from .data import (
    Collection,
    InMemory,
    OnDisk,
    balancing_weights,
    count_cores,
    draw_batches,
    iterate,
    take,
)
from .devices import find_device, serve_memory
from .errors import ConfigError, FineTuneError
from .measure import PeakMemory, clock
from .metrics import compute_metrics
from .networks import build, count_parameters
from .pictures import InputFormat
from .recipe import (
    Ops,
    StepAverage,
    averages_in_step,
    make_optimizer,
    ops_for,
    regularise,
    thaw_steps,
    warmup_cosine,
)
from .run import Run

SAVE_SECONDS = 30
"""Time between checkpoints where no number of steps is given."""

options_of_ddp = inspect.signature(DistributedDataParallel.__init__).parameters

SYNC_BUFFERS = next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in options_of_ddp)
"""What DistributedDataParallel calls it to overwrite buffers by the first process's (torch 2.14 renamed it)."""

CURVE_IMAGES = 300
"""The curves are drawn from this many test images; the table counts all of them."""


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
    forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with forked, serve_memory(backend, device):
        memory = PeakMemory(device)
        network, model = prepare(config, collection, format, weights, mode, seed, backend)
        images = take(collection.train, chosen)
        parts = images, collection.test, collection.validation
        trainer = Trainer(run, config, ops_for(backend), network, *parts)
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
        tested = trainer.tested
        labels = collection.test.labels[tested]
        run.metrics = asdict(
            compute_metrics(trainer.probabilities[tested], labels, collection.classes)
        )
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
    return CutNetwork(model, mode, format, config.amp or "off"), model


class Trainer:
    """One run from its first step, or from any step that was saved, to its last.

    What is computed from a saved state equals, bit for bit, what would have been computed without
    the break (on the same machine, with the same number of threads).

    Several processes each take their part of a batch that is so many times as large. Gradients and
    losses are those of the whole batch; BatchNorm normalizes by a process's own part, as one
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
        validation: InMemory | OnDisk | None = None,
    ):
        self.run, self.config, self.ops, self.network = run, config, ops, network
        self.images = images
        self.steps = config.count_steps(len(images), processes.count())
        size = config.chosen_batch_size * processes.count()
        self.classes = balancing_weights(images.labels)
        often = self.classes[images.labels] if config.balance == "sample" else None
        self.batches = draw_batches(len(images), size, self.steps, run.seed, often)
        self.batch = len(self.batches[0])
        self.transform = training_transform(config.chosen_augment, network.format)
        # The same network in every process, but not the same dropout. The generator takes 32 bits.
        own_seed = run.seed + processes.rank() * 0x9E3779B1
        torch.manual_seed(own_seed)
        self.replica: nn.Module = network.trained
        self.optimizer = make_optimizer(config, ops, run.mode, network.pieces)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, warmup_cosine(self.steps, config.warmup)
        )
        run.parameters = count_parameters(network.trained)
        epoch = max(1, len(images) // self.batch)
        schedule = config.chosen_schedule if run.mode != "scratch" else "together"
        self.thaw = thaw_steps(network.pieces, self.steps, epoch, schedule)
        self.ema: AveragedModel | None = None
        if config.ema is not None and averages_in_step(config, ops):
            self.ema = StepAverage(network.trained, config.ema, self.optimizer)
        elif config.ema is not None:
            average = get_ema_multi_avg_fn(config.ema)
            self.ema = AveragedModel(network.trained, multi_avg_fn=average, use_buffers=True)
        self.best: dict[str, torch.Tensor] | None = None
        self.best_score = (0.0, 0.0)
        self.validated = validation is not None
        self.test = network.keep_outputs(test) or test
        self.tested = torch.arange(len(test))
        if validation is not None:
            self.curve_images = network.keep_outputs(validation) or validation
        else:
            order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
            count = min(CURVE_IMAGES, len(test) // 2) if config.keeps_best else CURVE_IMAGES
            self.curve_images = take(self.test, order[:count])
            if config.keeps_best:  # by images that are not tested
                self.tested = order[count:]

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
            "best_score": self.best_score,
            "random": processes.gather(self.random_state()),
        }

    def random_state(self) -> dict[str, torch.Tensor]:
        """Where this process's random number generators stand."""
        state = {"cpu": torch.get_rng_state()}
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
        self.best, self.best_score = state["best"], tuple(state["best_score"])
        random = state["random"][processes.rank()]
        torch.set_rng_state(random["cpu"])
        if "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self.network.device)

    def keep_outputs(self) -> InMemory | None:
        """The frozen stages' outputs, where nothing changes the images on their way."""
        varied = self.transform is not None or self.config.mixup or self.config.cutmix
        return None if varied else self.network.keep_outputs(self.images)

    def load(self, kept: InMemory | None, first: int = 0) -> Iterable:
        """This process's parts of the batches from number `first` on: (images, labels)."""
        parts = [processes.part(len(batch)) for batch in self.batches[first:]]
        workers = self.config.workers
        if kept is not None or self.transform is None:
            batches = [b[p] for b, p in zip(self.batches[first:], parts, strict=True)]
            return iterate(kept or self.images, batches, workers)
        # An image's random numbers are those of its place in all batches.
        places = [
            [(index, number * self.batch + place) for place, index in enumerate(batch)][part]
            for number, (batch, part) in enumerate(
                zip(self.batches[first:], parts, strict=True), first
            )
        ]
        if workers is None and self.network.device.type == "cuda":
            workers = min(8, count_cores())
        if workers is None and isinstance(self.images, OnDisk):
            workers = min(8, count_cores())
        varied = Augmented(self.images, self.transform, self.run.seed)
        return iterate(varied, places, workers)

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
        """The loss of a batch, mixed as the recipe says."""
        config, network = self.config, self.network
        labels = labels.to(network.device)
        options: dict[str, Any] = {"label_smoothing": config.label_smoothing}
        if config.balance == "loss":
            options["weight"] = self.classes.to(network.device)
        size = network.format.size
        mixture = draw_mixture(config.mixup, config.cutmix, len(labels), size)
        with network.autocast():
            logits = self.replica(network.inputs(pixels, mixture))
            if mixture is None:
                return self.ops.cross_entropy(logits, labels, **options)
            others = labels[mixture.others.to(network.device)]
            return self.ops.mixup_cross_entropy(logits, labels, others, mixture.share, **options)

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
        labels = self.curve_images.labels
        probabilities = self.network.predict(self.curve_images, self.averaged)
        accuracy = (probabilities.argmax(1) == labels).float().mean().item()
        self.run.curve.append((len(self.run.losses), accuracy))
        if not self.config.keeps_best:
            return False
        accuracies = [accuracy for _, accuracy in self.run.curve]
        best = accuracies.index(max(accuracies))
        # Few validation images give few different accuracies: of equal ones the loss decides.
        loss = F.nll_loss(probabilities.clamp(min=1e-12).log(), labels).item() * self.validated
        if self.best is None or (accuracy, -loss) > self.best_score:
            self.best_score = accuracy, -loss
            self.best = {k: v.clone() for k, v in self.averaged.state_dict().items()}
        patience = self.config.early_stop
        return patience is not None and len(accuracies) - 1 - best >= patience

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
        loader = () if run.stopped else self.load(kept, first)
        started = clock(network.device)
        for number, (pixels, labels) in enumerate(loader, first):
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
        self.probabilities = network.predict(self.test)
        run.confidence, run.predictions = self.probabilities.max(1)
        right = run.predictions == self.test.labels
        run.accuracy = right[self.tested].float().mean().item()
