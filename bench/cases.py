"""What is measured, as data: sizes for each kind of op, and the bytes that must move. No op is called here.

An op that is entered into fastops._core.registry.OPS gets the rows of its kind; one that needs other sizes or arguments gets a line
of its own in WORKLOADS.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch

FORWARD, BOTH, STEP = "forward", "forward+backward", "step"
NORM = "batch_norm"  # the kind of batch_norm_act, which is in no table of ops
ROW_NORM = "row_norm"  # that of layer_norm and rms_norm, which are not there either
PROBABILITIES = (
    "probabilities"  # the variant of a loss whose target is a distribution, which is read as well
)
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One row of the table: an op on tensors of given shapes, and the bytes that it cannot avoid moving."""

    op: str
    kind: str
    size: str
    shapes: tuple[Shape, ...]
    dtype: torch.dtype
    mode: str
    floor: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""
    beyond: Mapping[str, Any] = field(
        default_factory=dict
    )  # options of our optimizer that torch has apart from its own
    compiled: bool = False
    probabilities: bool = False  # whether targets (and the inputs of a reduction) are probabilities

    @property
    def name(self) -> str:
        """The op and its variant, as printed."""
        return f"{self.op} {self.variant}".rstrip()

    @property
    def label(self) -> str:
        """What --filter looks into: `cross_entropy 512x32000 float32 forward+backward`."""
        return f"{self.name} {self.size} {str(self.dtype).removeprefix('torch.')} {self.mode}"


@dataclass(frozen=True)
class Workload:
    """What the ops of a kind are run on.

    `passes` counts, for each mode, how often memory of the input's size must be read or written at the least.
    `narrow` is the shape that bfloat16 is run on, `compiled` the one whose forward and backward torch.compile is timed on
    by default (each compile takes seconds). `variants` are names and arguments.
    """

    shapes: tuple[Shape, ...]
    passes: Mapping[str, float]
    narrow: Shape
    compiled: Shape | None = None
    probabilities: bool = False
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})


MI = 1 << 20

WORKLOADS: dict[str, Workload] = {
    # Backward reads the upstream gradient and what was saved, and writes a gradient: three passes more.
    "elementwise": Workload(
        shapes=((16,), (4096,), (MI,), (16 * MI,)),
        passes={FORWARD: 2, BOTH: 5},
        narrow=(MI,),
    ),
    # Nothing is kept for backward but the two inputs, which it reads again to write a gradient.
    "loss": Workload(
        shapes=((65536,), (16 * MI,)),
        passes={FORWARD: 2, BOTH: 5},
        narrow=(MI,),
        compiled=(16 * MI,),
    ),
    "softmax": Workload(
        shapes=((128, 1024), (4096, 4096)),
        passes={FORWARD: 2, BOTH: 5},
        narrow=(1024, 1024),
        compiled=(4096, 4096),
        variants={"": {"dim": -1}},
    ),
    # Two inputs of one size.
    "fused": Workload(
        shapes=((128, 1024), (4096, 1024), (4096, 4096)),
        passes={FORWARD: 3, BOTH: 6},
        narrow=(4096, 1024),
        compiled=(4096, 1024),
    ),
    # The result is half as large as the input, whose gradient is as large as that.
    "gate": Workload(
        shapes=((128, 1024), (4096, 1024), (4096, 4096)),
        passes={FORWARD: 1.5, BOTH: 4},
        narrow=(4096, 1024),
        compiled=(4096, 1024),
    ),
    # The mask is made again, not read: backward is two passes.
    "dropout": Workload(
        shapes=((128, 1024), (4096, 1024), (4096, 4096)),
        passes={FORWARD: 2, BOTH: 4},
        narrow=(4096, 1024),
        compiled=(4096, 1024),
        variants={"": {"p": 0.3}},
    ),
}
# Lines for single ops, looked up before their kind's.
WORKLOADS |= {
    "gelu": replace(
        WORKLOADS["elementwise"],
        compiled=(MI,),
        variants={"": {}, "tanh": {"approximate": "tanh"}},
    ),
    "bias_gelu": replace(
        WORKLOADS["fused"],
        passes={FORWARD: 2, BOTH: 5},
        variants={"": {}, "tanh": {"approximate": "tanh"}},
    ),
    "relu_dropout": replace(WORKLOADS["dropout"], passes={FORWARD: 2, BOTH: 5}),
    "bias_dropout_add": replace(WORKLOADS["dropout"], passes={FORWARD: 3, BOTH: 5}),
    "binary_cross_entropy": replace(WORKLOADS["loss"], probabilities=True),
    "cross_entropy": Workload(
        shapes=((128, 1000), (4096, 1000), (512, 32000), (256, 128256)),
        passes={FORWARD: 1, BOTH: 2},
        narrow=(512, 32000),
        compiled=(512, 32000),
        variants={"": {}, PROBABILITIES: {}},
    ),
}
# Over the classes of every pixel of a picture, as in segmentation: small ones, and pictures that fill the caches.
PIXELS = Workload(
    shapes=((8, 21, 64, 64), (2, 150, 128, 128)),
    passes={FORWARD: 2, BOTH: 5},
    narrow=(8, 21, 64, 64),
    variants={"of pixels": {"dim": 1}},
)
# Variants of single ops on shapes of their own; bench/calls.py says what they call.
VARIANTS: dict[str, tuple[Workload, ...]] = {
    "softmax": (PIXELS,),
    "log_softmax": (PIXELS,),
    "binary_cross_entropy_with_logits": (
        Workload(
            shapes=((1024, 80), (131072, 128)),
            passes={FORWARD: 2, BOTH: 5},
            narrow=(8192, 128),
            compiled=(131072, 128),
            variants={"pos_weight": {}},
        ),
    ),
    "cross_entropy": (
        Workload(
            shapes=((128, 1000), (512, 32000)),
            passes={FORWARD: 1, BOTH: 2},
            narrow=(512, 32000),
            variants={"mixup": {}, "lse+z_loss": {}},
        ),
        # The logits are made first, of a leaf: that is a pass for each of its two, and as much backward.
        Workload(
            shapes=((128, 1000), (512, 32000)),
            passes={FORWARD: 3, BOTH: 6},
            narrow=(512, 32000),
            variants={"inplace_backward": {}},
        ),
        replace(PIXELS, passes={FORWARD: 1, BOTH: 2}, variants={"of pixels": {}}),
    ),
}


def resnet_shapes(blocks: tuple[int, ...], expansion: int) -> tuple[Shape, ...]:
    """The shapes of torchvision's ResNet parameters: `expansion` is 1 for basic blocks, 4 for bottlenecks."""

    def conv_and_norm(outputs: int, inputs: int, size: int) -> list[Shape]:
        return [(outputs, inputs, size, size), (outputs,), (outputs,)]

    shapes = conv_and_norm(64, 3, 7)
    inputs = 64
    for stage, count in enumerate(blocks):
        width = 64 << stage
        outputs = width * expansion
        for block in range(count):
            if expansion == 1:
                shapes += conv_and_norm(width, inputs, 3) + conv_and_norm(width, width, 3)
            else:
                shapes += conv_and_norm(width, inputs, 1) + conv_and_norm(width, width, 3)
                shapes += conv_and_norm(outputs, width, 1)
            if block == 0 and inputs != outputs:
                shapes += conv_and_norm(outputs, inputs, 1)
            inputs = outputs
    return (*shapes, (1000, inputs), (1000,))


PARAMETERS: dict[str, tuple[Shape, ...]] = {
    "resnet18": resnet_shapes((2, 2, 2, 2), 1),
    "resnet50": resnet_shapes((3, 4, 6, 3), 4),
    "1000x64": ((64,),) * 1000,
    "300x1024": ((1024,),) * 300,
}


@dataclass(frozen=True)
class OptimizerWorkload:
    """Arguments of an optimizer, and how many states of a parameter's size it keeps. `beyond`: clipping and averages,
    which are steps of their own in torch."""

    arguments: Mapping[str, Any]
    states: int
    beyond: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passes(self) -> int:
        """Reading the gradient, reading and writing the parameter and each state; reading the gradient for its norm."""
        clips, averages = "max_grad_norm" in self.beyond, "ema_decay" in self.beyond
        return 3 + 2 * (self.states + averages) + clips


OPTIMIZERS: dict[str, OptimizerWorkload] = {
    "Adam": OptimizerWorkload({"lr": 1e-3, "weight_decay": 1e-2}, states=2),
    "AdamW": OptimizerWorkload({"lr": 1e-3, "weight_decay": 1e-2}, states=2),
    "SGD": OptimizerWorkload({"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}, states=1),
    "RMSprop": OptimizerWorkload({"lr": 1e-3, "weight_decay": 1e-4}, states=1),
    "AdamW clip+EMA": OptimizerWorkload(
        {"lr": 1e-3, "weight_decay": 1e-2},
        states=2,
        beyond={"max_grad_norm": 1.0, "ema_decay": 0.999},
    ),
    "Adagrad": OptimizerWorkload({"lr": 1e-2}, states=1),
    "Adadelta": OptimizerWorkload({"lr": 1.0}, states=2),
    "Adamax": OptimizerWorkload({"lr": 2e-3}, states=2),
    "NAdam": OptimizerWorkload({"lr": 2e-3}, states=2),
    "RAdam": OptimizerWorkload({"lr": 1e-3}, states=2),
    "Rprop": OptimizerWorkload({"lr": 1e-2}, states=2),
    "ASGD": OptimizerWorkload({"lr": 1e-2}, states=1),
}

QUICK_BYTES = 64 * MI  # --quick leaves out the cases that move more


def function_cases(name: str, kind: str) -> Iterator[Case]:
    """The cases of one function of the table."""
    works = (WORKLOADS.get(name) or WORKLOADS[kind], *VARIANTS.get(name, ()))
    for work, variant, arguments in ((w, *v) for w in works for v in w.variants.items()):
        read_too = variant == PROBABILITIES
        runs = [(s, torch.float32, mode) for s in work.shapes for mode in (FORWARD, BOTH)]
        runs += [(work.narrow, torch.bfloat16, BOTH)]
        for shape, dtype, mode in runs:
            yield Case(
                op=name,
                kind=kind,
                size="x".join(map(str, shape)),
                shapes=(shape,),
                dtype=dtype,
                mode=mode,
                floor=int((work.passes[mode] + read_too) * prod(shape)) * dtype.itemsize,
                arguments=arguments,
                variant=variant,
                probabilities=work.probabilities or read_too,
                compiled=shape == work.compiled and mode == BOTH and dtype == torch.float32,
            )


# A ResNet's first stage and last one, of a batch of 16.
NORM_SHAPES: tuple[Shape, ...] = ((16, 64, 56, 56), (16, 512, 7, 7))
NORM_LAYOUTS = ("", "channels_last")
# relu(batch_norm(x)), and relu(batch_norm(x) + residual), in training. Forward reads x twice, as the statistics come first;
# backward reads what it is computed from for the sums and once more for the gradients.
NORM_PASSES = {"": {FORWARD: 3, BOTH: 8}, "add": {FORWARD: 4, BOTH: 12}}


def norm_cases() -> Iterator[Case]:
    """The cases of batch_norm_act, in training."""
    for variant, passes in NORM_PASSES.items():
        for layout in NORM_LAYOUTS:
            runs = [(s, torch.float32, mode) for s in NORM_SHAPES for mode in (FORWARD, BOTH)]
            for shape, dtype, mode in [*runs, (NORM_SHAPES[0], torch.bfloat16, BOTH)]:
                yield Case(
                    op="batch_norm_act",
                    kind=NORM,
                    size="x".join(map(str, shape)),
                    shapes=(shape,),
                    dtype=dtype,
                    mode=mode,
                    floor=passes[mode] * prod(shape) * dtype.itemsize,
                    variant=f"{variant} {layout}".strip(),
                )


# Of a small batch and of a language model's hidden states.
ROW_NORM_SHAPES: tuple[Shape, ...] = ((128, 768), (4096, 768), (512, 4096), (8192, 1024))
# Backward reads the upstream gradient and what was normalized, and writes a gradient. A sum of two tensors is written as well.
ROW_NORM_PASSES = {
    "layer_norm": {FORWARD: 2, BOTH: 5},
    "rms_norm": {FORWARD: 2, BOTH: 5},
    "add_layer_norm": {FORWARD: 4, BOTH: 7},
    "add_rms_norm": {FORWARD: 4, BOTH: 7},
}


def row_norm_cases() -> Iterator[Case]:
    """The cases of layer norm and RMS norm."""
    for op, passes in ROW_NORM_PASSES.items():
        runs = [(s, torch.float32, mode) for s in ROW_NORM_SHAPES for mode in (FORWARD, BOTH)]
        runs += [(s, torch.bfloat16, BOTH) for s in ROW_NORM_SHAPES[1:3]]
        for shape, dtype, mode in runs:
            yield Case(
                op=op,
                kind=ROW_NORM,
                size="x".join(map(str, shape)),
                shapes=(shape,),
                dtype=dtype,
                mode=mode,
                floor=passes[mode] * prod(shape) * dtype.itemsize,
            )


def optimizer_cases(name: str) -> Iterator[Case]:
    """The cases of one optimizer."""
    work = OPTIMIZERS[name]
    for size, shapes in PARAMETERS.items():
        yield Case(
            op=name.split()[0],
            variant=" ".join(name.split()[1:]),
            beyond=work.beyond,
            kind=STEP,
            size=size,
            shapes=shapes,
            dtype=torch.float32,
            mode=STEP,
            floor=work.passes * sum(map(prod, shapes)) * torch.float32.itemsize,
            arguments=work.arguments,
        )


def all_cases(ops: Mapping[str, Any]) -> list[Case]:
    """Every case of the functions in `ops` (name -> an entry with `kind`), of the norms and of the optimizers."""
    cases = [case for name, op in ops.items() for case in function_cases(name, op.kind)]
    cases += [*norm_cases(), *row_norm_cases()]
    return cases + [case for name in OPTIMIZERS for case in optimizer_cases(name)]
