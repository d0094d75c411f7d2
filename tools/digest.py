"""What every op and optimizer computes, as a digest for each case, to show that a change left the bits alone.

    python tools/digest.py write FILE [--filter TEXT] [--device cpu|cuda|emulated]
    python tools/digest.py compare BEFORE AFTER

`write` calls the public Python API alone: forward with and without grad, the gradients, their gradients and forward
derivatives of every function, over dtypes, layouts, sizes and options, and the parameters and states that every optimizer
leaves. ATEN_CPU_CAPABILITY chooses the instruction set; files are compared within one. `--device emulated` runs the CUDA
kernels on the emulator of the tests. `compare` prints the cases that differ and ends with 1 where there are any.

Inputs are integers scaled by powers of two, so that no random number generator and no instruction set changes them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DEVICE = "cpu"
SEED = 20_26
LARGE = 6_400_001  # above 24 MB in float32, where stores bypass the caches


# ---------------------------------------------------------------------------------------------- inputs


def numbers(*shape: int, seed: int = 0, scale: float = 4.0) -> Tensor:
    """Values in [-scale, scale), multiples of scale / 2^23: exact in float32, the same everywhere."""
    count = 1
    for size in shape:
        count *= size
    i = torch.arange(count, dtype=torch.int64) + (seed * 7919 + 1)
    mixed = (i * 2_654_435_761) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 2_246_822_519) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 13)) >> 8) - (1 << 23)
    return (mixed.double() * (scale / (1 << 23))).reshape(shape)


def integers(*shape: int, below: int, seed: int = 0) -> Tensor:
    return ((numbers(*shape, seed=seed, scale=1.0) + 1) / 2 * below).long().clamp(0, below - 1)


def probabilities(*shape: int, dim: int, seed: int = 0) -> Tensor:
    weights = numbers(*shape, seed=seed, scale=1.0).abs() + 1 / 64
    return weights / weights.sum(dim, keepdim=True)


LAYOUTS: dict[str, Callable[[int], Tensor]] = {
    "0-d": lambda s: numbers(seed=s),
    "0": lambda s: numbers(0, 3, seed=s),
    "1": lambda s: numbers(1, seed=s),
    "7x13": lambda s: numbers(7, 13, seed=s),
    "4096": lambda s: numbers(64, 64, seed=s),
    "301x1001": lambda s: numbers(301, 1001, seed=s),
    "channels_last": lambda s: numbers(2, 19, 5, 7, seed=s).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda s: numbers(2, 3, 2, 3, 4, seed=s).to(memory_format=torch.channels_last_3d),
    "transposed": lambda s: numbers(37, 29, seed=s).t(),
    "strided": lambda s: numbers(33, 60, seed=s)[:, ::3],
    "offset": lambda s: numbers(1027, seed=s)[3:],
    "expanded": lambda s: numbers(5, 1, seed=s).expand(5, 9),
    "special": lambda s: torch.tensor(
        [0.0, -0.0, 1e-40, -1e-40, 6e-8, 65504.0, -3e38, 88.8, -104.0, 20.0, 1.0, -1.0, 3.0, -3.0, torch.inf, -torch.inf, torch.nan]
    ).double().roll(s),
}  # fmt: skip
SOFTMAX_SHAPES = {"0": (0, 3), "1": (1,), "7x13": (7, 13), "5x4099": (5, 4099), "3x70001": (3, 70_001), "4x9x37": (4, 9, 37), "2x1500x3": (2, 1500, 3), "301x1001": (301, 1001)}  # fmt: skip


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A tensor of floats in a dtype and on the device, with its strides; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        value = value.to(dtype)
    if DEVICE == "cpu":
        return value
    memory = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    return memory.to(DEVICE).as_strided(value.size(), value.stride(), value.storage_offset())


# ---------------------------------------------------------------------------------------------- digests


def digest(*values: Any) -> str:
    """Of dtype, shape, memory order and bits of tensors, and of the text of other things."""
    made = hashlib.sha256()
    for value in values:
        if not isinstance(value, Tensor):
            made.update(repr(value).encode())
            continue
        value = value.detach().resolve_conj().cpu()
        order = [s for n, s in zip(value.shape, value.stride(), strict=True) if n > 1] if value.numel() > 1 else []  # fmt: skip
        made.update(f"{value.dtype}{tuple(value.shape)}{order}".encode())
        flat = value.contiguous().reshape(-1)
        if value.is_floating_point():
            flat = torch.where(flat.isnan(), torch.full_like(flat, torch.nan), flat)
        made.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return made.hexdigest()


@dataclass
class Fixed:
    """A tensor that no derivative is taken of: weights of classes."""

    tensor: Tensor


Case = tuple[str, Callable[..., Any], tuple[Any, ...]]


def parts(function: Callable[..., Any], given: tuple[Any, ...], dtype: torch.dtype) -> Iterator[tuple[str, str]]:  # fmt: skip
    """(part, digest) of a call: each derivative that there is; an exception has its type for a digest."""

    def attempt(part: str, compute: Callable[[], Any]) -> Any:
        try:
            torch.manual_seed(SEED)
            result = compute()
        except Exception as error:
            found.append((part, f"raises {type(error).__name__}"))
            return None
        found.append((part, digest(*result)))
        return result

    found: list[tuple[str, str]] = []
    tensors = [cast(v.tensor if isinstance(v, Fixed) else v, dtype) for v in given]
    listed = lambda y: list(y) if isinstance(y, tuple) else [y]  # noqa: E731
    with torch.no_grad():
        attempt("value", lambda: listed(function(*tensors)))
    leaves = [
        t.detach().requires_grad_()
        if isinstance(t, Tensor) and t.is_floating_point() and not isinstance(v, Fixed)
        else t
        for t, v in zip(tensors, given, strict=True)
    ]
    free = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    outputs = attempt("forward", lambda: listed(function(*leaves)))
    if not outputs or not free:
        return iter(found)
    outputs = [y for y in outputs if y.requires_grad]
    dys = [cast(numbers(*y.shape, seed=91 + k, scale=2.0), y.dtype) for k, y in enumerate(outputs)]
    tied = [dy.requires_grad_() for dy in dys]

    def backward() -> Any:
        return torch.autograd.grad(outputs, free, dys, create_graph=True, allow_unused=True)

    gradients = attempt("backward", backward)
    if gradients is None:  # some have no second derivative
        attempt("backward once", lambda: torch.autograd.grad(listed(function(*leaves)), free, [dy.detach() for dy in dys], allow_unused=True))  # fmt: skip
    smooth = [g for g in gradients or [] if g is not None and g.requires_grad]
    if smooth:
        ddx = [cast(numbers(*g.shape, seed=95 + k, scale=2.0), g.dtype) for k, g in enumerate(smooth)]  # fmt: skip
        attempt("second", lambda: torch.autograd.grad(smooth, [*free, *tied], ddx, allow_unused=True))  # fmt: skip
    count = max((t.numel() for t in free), default=0)
    if 0 < count < 5000:

        def tangents() -> Any:
            with torch.autograd.forward_ad.dual_level():
                make = torch.autograd.forward_ad.make_dual
                duals = [
                    make(t.detach(), cast(numbers(*t.shape, seed=97 + k, scale=2.0), t.dtype))
                    if isinstance(t, Tensor) and t.requires_grad
                    else t
                    for k, t in enumerate(leaves)
                ]
                pairs = [torch.autograd.forward_ad.unpack_dual(y) for y in listed(function(*duals))]
                return [v for pair in pairs for v in pair]

        attempt("tangent", tangents)
    return iter(found)


# ---------------------------------------------------------------------------------------------- functions

ACTIVATIONS: dict[str, list[dict[str, Any]]] = {
    "relu": [{}], "relu6": [{}], "leaky_relu": [{}, {"negative_slope": 0.3}], "elu": [{}, {"alpha": 0.7}],
    "selu": [{}], "celu": [{}, {"alpha": 0.7}], "gelu": [{}, {"approximate": "tanh"}], "silu": [{}], "mish": [{}],
    "hardswish": [{}], "hardsigmoid": [{}], "hardtanh": [{}, {"min_val": -0.5, "max_val": 2.0}], "sigmoid": [{}],
    "logsigmoid": [{}], "tanh": [{}], "softplus": [{}, {"beta": 2.0, "threshold": 1.0}], "softsign": [{}],
    "squareplus": [{}, {"b": 0.5}],
}  # fmt: skip
LOSSES: dict[str, list[dict[str, Any]]] = {
    "mse_loss": [{}], "l1_loss": [{}], "smooth_l1_loss": [{}, {"beta": 0.3}, {"beta": 0.0}],
    "huber_loss": [{}, {"delta": 0.3}], "binary_cross_entropy": [{}], "binary_cross_entropy_with_logits": [{}],
}  # fmt: skip
PAIRS: dict[str, list[dict[str, Any]]] = {
    "add_relu": [{}],
    "bias_gelu": [{}, {"approximate": "tanh"}],
}
DROPOUTS = ["dropout", "relu_dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"]
INPLACE = {"relu", "relu6", "leaky_relu", "elu", "selu", "celu", "silu", "mish", "hardswish", "hardsigmoid", "hardtanh"}  # fmt: skip
OTHERS = ["softmax", "log_softmax", "cross_entropy", "nll_loss", "mixup_cross_entropy", "bias_dropout_add"]  # fmt: skip


def label(options: dict[str, Any]) -> str:
    shown = {k: "tensor" if isinstance(v, Tensor) else v for k, v in options.items()}
    return ",".join(f"{k}={v}" for k, v in shown.items()) or "-"


def activations(F: Any) -> Iterator[Case]:
    for name, settings in ACTIVATIONS.items():
        function = getattr(F, name)
        for options in settings:
            for layout, make in LAYOUTS.items():
                yield f"{name} {label(options)} {layout}", partial(function, **options), (make(0),)  # fmt: skip
        if name in INPLACE:
            for layout in ("0", "7x13", "4096", "channels_last", "transposed", "strided", "offset"):
                yield f"{name} inplace {layout}", lambda x, f=function: f(x * 1, inplace=True), (LAYOUTS[layout](0),)  # fmt: skip


def losses(F: Any) -> Iterator[Case]:
    for name, settings in LOSSES.items():
        function = getattr(F, name)
        for options in settings:
            for layout, make in LAYOUTS.items():
                x, t = make(0), make(5)
                if name == "binary_cross_entropy":
                    x, t = (((v.clamp(-4, 4) + 4) / 8).nan_to_num() for v in (x, t))
                for reduction in ("none", "mean", "sum"):
                    o = {**options, "reduction": reduction}
                    yield f"{name} {label(o)} {layout}", partial(function, **o), (x, t)  # fmt: skip
                if x.dim() and layout != "special" and not options:
                    w = make(9).abs() + 0.125
                    for reduction in ("none", "mean"):
                        yield f"{name} weight,{reduction} {layout}", lambda x, t, w, f=function, r=reduction: f(x, t, weight=w, reduction=r), (x, t, w)  # fmt: skip
                if name.endswith("logits") and x.dim():
                    w = numbers(x.shape[-1], seed=4).abs()
                    yield f"{name} pos_weight {layout}", lambda x, t, w, f=function: f(x, t, pos_weight=w), (x, t, w)  # fmt: skip


def pairs(F: Any) -> Iterator[Case]:
    for name, settings in PAIRS.items():
        function = getattr(F, name)
        for options in settings:
            for layout, make in LAYOUTS.items():
                x = make(0)
                if name == "bias_gelu" and not x.dim():
                    continue
                other = numbers(x.shape[-1], seed=3) if name == "bias_gelu" else make(3)
                yield f"{name} {label(options)} {layout}", partial(function, **options), (x, other)  # fmt: skip
    for layout in ("7x13", "4096", "channels_last", "strided"):
        yield f"add_relu inplace {layout}", lambda x, y: F.add_relu(x * 1, y, inplace=True), (LAYOUTS[layout](0), LAYOUTS[layout](3))  # fmt: skip
    for shape in ((129, 1), (65, 33), (1000, 768)):
        yield f"bias_gelu column sums {shape}", F.bias_gelu, (numbers(*shape), numbers(shape[1], seed=3))  # fmt: skip


def softmaxes(F: Any) -> Iterator[Case]:
    for name in ("softmax", "log_softmax"):
        function = getattr(F, name)
        for text, shape in SOFTMAX_SHAPES.items():
            for dim in range(len(shape)):
                for scale in (4.0, 1e4) if text == "7x13" else (4.0,):
                    yield f"{name} {text} dim={dim} scale={scale}", partial(function, dim=dim), (numbers(*shape, scale=scale),)  # fmt: skip
        for layout in ("channels_last", "transposed", "strided", "expanded", "special"):
            x = LAYOUTS[layout](0)
            yield f"{name} {layout}", partial(function, dim=min(1, x.dim() - 1)), (x,)
        yield f"{name} dtype", partial(function, dim=1, dtype=torch.float32), (numbers(7, 130),)  # fmt: skip


def cross_entropies(F: Any) -> Iterator[Case]:
    shapes = {
        "one": (13,), "0": (0, 13), "7x13": (7, 13), "33x1000": (33, 1000), "3x50003": (3, 50_003), "2x200001": (2, 200_001),
        "4x13x37": (4, 13, 37), "2x19x5x7": (2, 19, 5, 7), "1000x10": (1000, 10),
    }  # fmt: skip
    for text, shape in shapes.items():
        dim = min(1, len(shape) - 1)
        classes, rows = shape[dim], shape[:dim] + shape[dim + 1 :]
        labels = integers(*rows, below=classes, seed=2)
        soft = probabilities(*shape, dim=dim, seed=6)
        ignored = torch.where(labels % 3 == 0, -100, labels)
        weight = numbers(classes, seed=7).abs() + 0.125
        x = numbers(*shape)
        inputs = {text: (x, labels)}
        if text in ("7x13", "2x19x5x7", "4x13x37", "33x1000"):
            inputs |= {f"{text} ignored": (x, ignored), f"{text} soft": (x, soft)}
        if len(shape) == 4:
            inputs[f"{text} channels_last"] = x.to(memory_format=torch.channels_last), labels
        if text == "7x13":
            inputs[f"{text} strided"] = numbers(7, 39)[:, ::3], labels
            inputs[f"{text} transposed"] = numbers(13, 7).t(), labels
            inputs[f"{text} large"] = x * 1e4, labels
        for name, (x, t) in inputs.items():
            settings: list[dict[str, Any]] = [{"reduction": r} for r in ("none", "mean", "sum")]
            if "large" not in name and x.numel():
                settings += [{"label_smoothing": 0.1}, {"label_smoothing": 0.1, "weight": weight}, {"weight": weight}, {"weight": weight, "reduction": "sum"}]  # fmt: skip
                settings += [{"return_lse": True}, {"z_loss": 0.01}, {"z_loss": 0.01, "return_lse": True, "label_smoothing": 0.1}, {"inplace_backward": True}]  # fmt: skip
            for options in settings:
                w = options.get("weight")
                o = {k: v for k, v in options.items() if k != "weight"}
                inner = "inplace_backward" in o
                yield f"cross_entropy {name} {label(options)}", lambda x, t, w, o=o, i=inner: F.cross_entropy(x * 1 if i else x, t, weight=w, **o), (x, t, w if w is None else Fixed(w))  # fmt: skip
        if text in ("7x13", "4x13x37", "33x1000"):
            other = integers(*rows, below=classes, seed=8)
            for smoothing in (0.0, 0.1):
                for reduction in ("none", "mean"):
                    yield f"mixup_cross_entropy {text} {smoothing} {reduction}", partial(F.mixup_cross_entropy, lam=0.3, label_smoothing=smoothing, reduction=reduction), (x, labels, other)  # fmt: skip
            yield f"nll_loss {text}", F.nll_loss, (x, labels)


def dropouts(F: Any) -> Iterator[Case]:
    for name in DROPOUTS:
        function = getattr(F, name)
        for p in (0.0, 0.3, 1.0):
            for layout, make in LAYOUTS.items():
                if layout == "special" and p != 0.3:
                    continue
                x = make(0)
                rank = {"dropout1d": 3, "dropout2d": 4, "dropout3d": 5}.get(name)
                if rank and x.dim() != rank:
                    if layout != "7x13":
                        continue
                    x = numbers(*(3, 5, 4, 2, 7)[:rank])
                yield f"{name} p={p} {layout}", partial(function, p=p, training=True), (x,)
        for layout in ("7x13", "4096", "channels_last", "offset"):
            if name in ("dropout", "relu_dropout", "alpha_dropout"):
                yield f"{name} inplace {layout}", lambda x, f=function: f(x * 1, 0.3, True, True), (LAYOUTS[layout](0),)  # fmt: skip
    yield "dropout eval", partial(F.dropout, p=0.3, training=False), (numbers(7, 13),)
    for layout in ("0", "7x13", "4096", "301x1001", "channels_last", "strided", "transposed", "offset"):  # fmt: skip
        x, r = LAYOUTS[layout](0), LAYOUTS[layout](1)
        yield f"bias_dropout_add {layout}", partial(F.bias_dropout_add, p=0.3), (x, numbers(x.shape[-1], seed=3), r)  # fmt: skip
        yield f"bias_dropout_add no bias {layout}", lambda x, r: F.bias_dropout_add(x, None, r, 0.3), (x, r)  # fmt: skip


def newcomers(F: Any) -> Iterator[Case]:
    """Functions that the tables above do not know yet, called with as many tensors as they ask for."""
    known = {*ACTIVATIONS, *LOSSES, *PAIRS, *DROPOUTS, *OTHERS}
    for name in sorted({*F.__all__} - known):
        function = getattr(F, name)
        for layout in ("7x13", "4096", "channels_last", "strided", "offset", "special"):
            tensors = [LAYOUTS[layout](seed) for seed in (0, 3, 5)]
            for count in (1, 2, 3):
                try:
                    function(*tensors[:count])
                except TypeError:
                    continue
                except Exception:
                    pass
                yield f"{name} {count} {layout}", function, tuple(tensors[:count])
                break


def large(F: Any) -> Iterator[tuple[str, Callable[..., Any], Callable[[], tuple[Any, ...]]]]:
    """Results that are written past the caches; inputs are made when a case is run."""
    one, two = (lambda: (numbers(LARGE),)), (lambda: (numbers(LARGE), numbers(LARGE, seed=1)))
    rows = lambda: (numbers(6400, 1001),)  # noqa: E731
    for name in ("relu", "gelu"):
        yield name, getattr(F, name), one
    yield "mse_loss", F.mse_loss, two
    yield "l1_loss none", partial(F.l1_loss, reduction="none"), two
    yield "add_relu", F.add_relu, two
    yield "dropout", partial(F.dropout, p=0.3), one
    yield "softmax", partial(F.softmax, dim=1), rows
    yield "log_softmax", partial(F.log_softmax, dim=1), rows
    yield "cross_entropy", F.cross_entropy, lambda: (*rows(), integers(6400, below=1001))
    yield "bias_gelu", F.bias_gelu, lambda: (*rows(), numbers(1001, seed=3))


# ---------------------------------------------------------------------------------------------- optimizers

OPTIMIZERS: dict[str, list[dict[str, Any]]] = {
    "Adam": [{}, {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6}, {"weight_decay": 0.1}, {"amsgrad": True, "weight_decay": 0.01}, {"maximize": True}],
    "AdamW": [{}, {"weight_decay": 0.1, "betas": (0.0, 0.3)}, {"amsgrad": True, "maximize": True}],
    "SGD": [{"lr": 0.1}, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}, {"lr": 0.03, "momentum": 0.9}, {"lr": 0.03, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, {"lr": 0.03, "momentum": 0.8, "dampening": 0.5}],
    "RMSprop": [{}, {"alpha": 0.9, "weight_decay": 0.1}, {"momentum": 0.9, "maximize": True}, {"centered": True, "momentum": 0.9, "eps": 1e-3}],
}  # fmt: skip
EXTRAS: list[dict[str, Any]] = [
    {}, {"l1": 0.01}, {"l1": 0.01, "l1_mode": "proximal"}, {"max_grad_norm": 0.5}, {"ema_decay": 0.9},
    {"max_grad_norm": 0.5, "ema_decay": 0.9, "l1": 0.01}, {"state_dtype": torch.bfloat16},
    {"rounding": "stochastic"}, {"rounding": "stochastic", "state_dtype": torch.bfloat16, "ema_decay": 0.9},
]  # fmt: skip


def parameters(dtype: torch.dtype, layout: str) -> list[Tensor]:
    if layout == "large":
        return [cast(numbers(LARGE), dtype).requires_grad_()]
    made = [numbers(*s, seed=k) for k, s in enumerate([(), (1,), (0, 3), (5,), (37, 29), (50_001,), (3, 4), *[(97,)] * 20])]  # fmt: skip
    if layout == "mixed":
        made += [numbers(2, 3, 5, 7).to(memory_format=torch.channels_last), numbers(19, 23).t(), numbers(8, 30)[:, ::3]]  # fmt: skip
    return [cast(p, dtype).requires_grad_() for p in made]


def steps(optim: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    def run(name: str, options: dict[str, Any], dtype: torch.dtype, layout: str) -> Any:
        torch.manual_seed(SEED)
        params = parameters(dtype, layout)
        optimizer = getattr(optim, name)(params, **options)
        for step in range(2 if layout == "large" else 4):
            for k, p in enumerate(params):
                late = step == 0 and k == 3  # this one's first gradient comes late
                dense = numbers(*p.shape, seed=100 * step + k, scale=1.0)
                p.grad = None if late else cast(dense, dtype)
            optimizer.step()
        found: list[Any] = list(params)
        for p in params:
            for key, value in sorted(optimizer.state[p].items()):
                found += [key, value]
        return found

    def scaled() -> Any:
        params = parameters(torch.float32, "plain")
        optimizer = optim.AdamW(params, max_grad_norm=0.5)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
        for step in range(3):
            for k, p in enumerate(params):
                p.grad = cast(numbers(*p.shape, seed=100 * step + k) * 1024, torch.float32)
                if step == 1 and p.numel():
                    p.grad.view(-1)[0] = torch.inf
            scaler.scale(torch.zeros((), device=DEVICE))
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        return params

    classes = [n for n in optim.__all__ if isinstance(getattr(optim, n), type)]
    for name in classes:
        settings = OPTIMIZERS.get(name, [{}])
        for options in settings:
            for extra in EXTRAS:
                for dtype in DTYPES:
                    o = {**options, **extra}
                    layouts = ["mixed"] if extra else ["plain", "mixed"]
                    for layout in layouts:
                        yield f"{name} {label(o)} {dtype} {layout}", partial(run, name, o, dtype, layout)  # fmt: skip
        first = settings[-1]
        if DEVICE == "cpu":
            yield f"{name} {label(first)} large", partial(run, name, first, torch.float32, "large")  # fmt: skip
        yield f"{name} lr tensor", partial(run, name, {**first, "lr": torch.tensor(0.0625)}, torch.float32, "plain")  # fmt: skip
    yield "AdamW GradScaler", scaled


# ---------------------------------------------------------------------------------------------- commands


def every_digest(wanted: str) -> dict[str, str]:
    import fastops

    F = fastops.functional
    found: dict[str, str] = {}
    makers = [activations, losses, pairs, softmaxes, cross_entropies, dropouts, newcomers]
    for make in makers:
        for name, function, given in make(F):
            for dtype in DTYPES:
                key = f"{name} {str(dtype)[6:]}"
                if wanted in key:
                    found |= {f"{key} {part}": d for part, d in parts(function, given, dtype)}
    for name, function, given_of in large(F) if DEVICE == "cpu" else ():
        key = f"{name} large float32"
        if wanted in key:
            found |= {f"{key} {part}": d for part, d in parts(function, given_of(), torch.float32)}
    for name, run in steps(fastops.optim):
        if wanted in name:
            try:
                found[name] = digest(*run())
            except Exception as error:
                found[name] = f"raises {type(error).__name__}"
    return found


def write(path: Path, wanted: str) -> int:
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    import fastops

    found = every_digest(wanted)
    capability = fastops._C.cpu_capability()
    path.write_text(
        json.dumps({"capability": capability, "device": DEVICE, "digests": found}, indent=0)
    )
    refused = Counter(d for d in found.values() if d.startswith("raises"))
    print(f"{len(found)} digests, {capability}, {DEVICE}: {path}")
    if refused:
        print("exceptions:", ", ".join(f"{n} x {what[7:]}" for what, n in refused.items()))
    return 0


def compare(before: Path, after: Path, shown: int = 40) -> int:
    a, b = (json.loads(path.read_text()) for path in (before, after))
    for key in ("capability", "device"):
        if a[key] != b[key]:
            print(f"not comparable: {key} is {a[key]} in {before}, {b[key]} in {after}")
            return 2
    first, second = a["digests"], b["digests"]
    common = first.keys() & second.keys()
    different = [name for name in first if name in common and first[name] != second[name]]
    for name in different[:shown]:
        was, now = first[name], second[name]
        print(f"{name}: {was[:20]} -> {now[:20]}")
    if len(different) > shown:
        print(f"... and {len(different) - shown} more")
    for path, names in ((before, first.keys() - common), (after, second.keys() - common)):
        if names:
            print(f"{len(names)} only in {path}: {', '.join(sorted(names)[:3])}")
    print(f"{len(common)} compared, {len(different)} different")
    return int(bool(different))


def main(words: list[str] | None = None) -> int:
    global DEVICE
    parser = argparse.ArgumentParser(prog="digest.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="run every case and write the digests to a file")
    writing.add_argument("file", type=Path)
    writing.add_argument("--filter", default="", help="only cases whose name has this text")
    writing.add_argument("--device", choices=["cpu", "cuda", "emulated"], default="cpu")
    comparing = commands.add_parser("compare", help="print the cases that differ in two files")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    options = parser.parse_args(words)
    if options.command == "compare":
        return compare(options.before, options.after)
    if options.device == "emulated":
        from emulation import device

        device.install()
    DEVICE = "cpu" if options.device == "cpu" else "cuda"
    return write(options.file, options.filter)


if __name__ == "__main__":
    sys.exit(main())
