"""explain(): which kernel a call would run, and why. The very code of fastops.functional is run to find out, on tensors
without values and with notes in place of kernels, so that what is said cannot differ from what is done."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _C, functional, memory
from ..patching.calls import NAMES
from ..patching.modules import attached
from .by_torch import DISABLED, DISABLED_REASON, SMALLEST
from .registry import COMPOSED, KERNELS, OPS
from .usable import tensors_of, unusable_because

#: What csrc/cpu compiles in: the elements that a thread takes at least, by kind; the bytes from which on a result comes from
#: the pool. For fastops.explain; a test compares them with the sources.
GRAIN = {
    "elementwise": 16384,
    "fused": 16384,
    "gate": 16384,
    "loss": 16384,
    "softmax": 16384,
    "cross_entropy": 16384,
    "dropout": 4096,
    "batch_norm": 16384,
    "row_norm": 16384,
}
POOL_MINIMUM = 128 << 10
#: What has a kernel that stands for no one function of torch's, and so is in no row of the table: C function -> kind.
OUTSIDE = {"batch_norm_act": "batch_norm", "layer_norm": "row_norm", "rms_norm": "row_norm"}


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; print it."""

    call: str  #: the function and what it was given
    runs: str  #: ``"fastops"``, ``"torch"``, or ``"nothing"`` where the input is the result
    kernels: tuple[tuple[str, str], ...]  #: (kind, name) of each, in the order they run
    device: str  #: ``"cpu"``, ``"cuda"``
    instruction_set: str | None  #: of CPU kernels: ``"AVX512"``, ``"AVX2"``, ``"DEFAULT"``
    parallel: bool  #: whether the call takes more than one thread
    pool: bool  #: whether its result comes from the pool
    why: tuple[str, ...]  #: why it is so, in words

    def __str__(self) -> str:
        lines = {"runs": self.runs}
        if self.kernels:
            names = ", ".join(f"{name} ({kind})" for kind, name in self.kernels)
            on = f"CPU, {self.instruction_set}" if self.instruction_set else self.device.upper()
            lines["runs"] = f"{self.runs}: {names}; {on}"
            if self.device == "cpu":
                lines["threads"] = str(torch.get_num_threads() if self.parallel else 1)
                lines["pool"] = "yes" if self.pool else "no"
        text = [self.call, *(f"  {k:<8} {v}" for k, v in lines.items())]
        return "\n".join([*text, *(f"  {'why':<8} {w}" for w in self.why)])


class _Caught(Exception):
    """A module's call of a function of ours, stopped before it runs."""


class _Catch:
    """fastops.functional as fastops.nn sees it, whose functions are caught with what they are given."""

    def __getattr__(self, name):
        def function(*args, **kwargs):
            raise _Caught(name, args, kwargs)

        return function


class _Kernels:
    """_C with notes of what is called."""

    def __init__(self, notes: list[tuple[str, tuple]]):
        self._notes = notes

    def __getattr__(self, name):
        def kernel(*args):
            result = getattr(_C, name)(*args)
            if result is not None:  # the kernel took them
                self._notes.append((name, args))
            return result

        return kernel


class _Torch:
    """torch.nn.functional with notes of what is called."""

    def __init__(self, notes: list[str]):
        self._notes = notes

    def __getattr__(self, name):
        found = getattr(torch.nn.functional, name)
        if not name.startswith("_"):
            self._notes.append(name)
        return found


def _noted(kernels: list, torchs: list) -> dict[str, Any]:
    """The names of fastops.functional, its functions calling notes."""
    kinds = [m for m in vars(functional).values() if inspect.ismodule(m)]
    kinds = [m for m in kinds if m.__name__.startswith(f"{functional.__name__}.")]
    space: dict[str, Any] = {k: v for kind in kinds for k, v in vars(kind).items()}
    space |= {"_C": _Kernels(kernels), "F": _Torch(torchs)}
    for name, value in list(space.items()):
        if str(getattr(value, "__module__", "")).startswith(functional.__name__):
            value = inspect.unwrap(value)
            if not isinstance(value, types.FunctionType):
                continue
            copy = types.FunctionType(
                value.__code__, space, name, value.__defaults__, value.__closure__
            )
            copy.__kwdefaults__ = value.__kwdefaults__
            space[name] = copy
    return space


def explain(fn: Callable, *args: Any, **kwargs: Any) -> Explanation:
    """Says which kernel ``fn(*args, **kwargs)`` would run, and why: ours or torch's, its kind, the instruction set, whether
    it runs in parallel, and whether the result comes from the pool. It computes and changes nothing.

    Args:
        fn: a function of :mod:`fastops.functional`, a module of :mod:`fastops.nn`, or torch's counterpart of one.
        args, kwargs: the arguments of the call.

    Returns:
        An :class:`Explanation`, which prints.

    Raises:
        TypeError: `fn` is something else, or the arguments do not fit it. Where the call itself would raise, so does this,
            unless that depends on the values.

    Example: ``print(fastops.explain(fastops.functional.gelu, torch.randn(1024, 1024)))``.
    """
    name = getattr(fn, "__name__", type(fn).__name__)
    if isinstance(fn, torch.nn.Module):
        cls = type(fn)
        if cls.__module__ == "fastops.nn" and not DISABLED:
            return _of_module(fn, cls, args, kwargs)
        if (found := attached(fn)) and found.recipe.how == "module":
            return _of_module(fn, _natives()[cls], args, kwargs)
        if cls.__module__ == "fastops.nn" or cls in _natives():
            why = (
                DISABLED_REASON
                if DISABLED
                else f"a module of torch's; patch() makes it run fastops.nn.{cls.__name__}'s forward"
            )
            return _torchs(f"{cls.__name__}", args, kwargs, why)
        raise TypeError(f"explain: expected a module of fastops.nn, got a {cls.__name__}")
    if DISABLED and (own := next((n for n, o in OPS.items() if o.function is fn), None)):
        return _torchs(own, args, kwargs, DISABLED_REASON)
    if fn in NAMES:
        ours = NAMES[fn]
        return _torchs(name, args, kwargs, f"torch's own; fastops.functional.{ours} is ours")
    if getattr(functional, name, None) is not fn:
        raise TypeError(
            f"explain: expected a function of fastops.functional or a module of fastops.nn, got {fn!r}"
        )
    return _of_function(name, args, kwargs)


def _natives():
    from ..nn import MODULES

    return MODULES


def _of_module(module: torch.nn.Module, cls: type, args: tuple, kwargs: dict) -> Explanation:
    forward: Any = cls.forward  # type: ignore[attr-defined]
    space = {**forward.__globals__, "F": _Catch()}
    try:
        types.FunctionType(forward.__code__, space, "forward", forward.__defaults__)(
            module, *args, **kwargs
        )
    except _Caught as caught:
        return _of_function(*caught.args)
    raise TypeError(f"explain: {type(module).__name__} calls no function of fastops.functional")


def _title(name: str, args: tuple, kwargs: dict) -> str:
    def said(value):
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        return repr(value)

    given = [said(a) for a in args] + [f"{k}={said(v)}" for k, v in kwargs.items() if v is not None]
    return f"{name}({', '.join(given)})"


def _torchs(name: str, args: tuple, kwargs: dict, *why: str) -> Explanation:
    tensors = tensors_of((*args, *kwargs.values()))
    device = tensors[0].device.type if tensors else "cpu"
    return Explanation(_title(name, args, kwargs), "torch", (), device, None, False, False, why)


def _of_function(name: str, args: tuple, kwargs: dict) -> Explanation:
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors = tensors_of((*args, *kwargs.values()))
    title = f"fastops.functional.{name}"
    unusable = next((w for t in tensors[:1] if (w := unusable_because(t))), None)
    if unusable:
        return _torchs(title, args, kwargs, f"{unusable}: the kernels take strided float64, float32, bfloat16 and float16 tensors")  # fmt: skip
    if tensors and tensors[0].numel() < SMALLEST.get(name, 0):
        return _torchs(title, args, kwargs, f"fewer than {SMALLEST[name]} elements: torch's kernel was measured to be faster")  # fmt: skip
    kernels: list[tuple[str, tuple]] = []
    torchs: list[str] = []
    function = _noted(kernels, torchs)[name]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
        named = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        given_fakes = [f for f in (*fakes, *named.values()) if isinstance(f, Tensor)]
        versions = [f._version for f in given_fakes]
        result = function(*fakes, **named)
        result = result[0] if isinstance(result, tuple) else result
    same = [f._version == v for f, v in zip(given_fakes, versions, strict=True) if f is result]
    if same and same[0]:
        return Explanation(_title(title, args, kwargs), "nothing", (), result.device.type, None, False, False, ("the result is the input",))  # fmt: skip
    if not kernels:
        composed = name in COMPOSED or not torchs
        why_torch = "it is torch's to compute" if composed else _handed_over(tensors, kwargs)
        return _torchs(title, args, kwargs, why_torch)
    found = tuple((_kind(kernel), kernel) for kernel in (_kernel(called) for called, _ in kernels))
    why = []
    expected = OPS[name].kernels if name in OPS else ()
    if all(kernel in OUTSIDE for _, kernel in found):
        pass
    elif name in COMPOSED:
        why.append("made of other functions of ours and torch's, in more than one pass")
    elif not any(kernel.removesuffix("_") in expected for _, kernel in found):
        why.append(
            "shapes, dtypes or layouts that the one kernel does not take: in more than one pass"
        )
    given = next(a for a in kernels[-1][1] if isinstance(a, Tensor))
    kind, _ = found[-1]
    device = given.device.type
    if not given.is_contiguous():
        dense = torch.ops.aten.is_non_overlapping_and_dense.default(given)
        why.append("the memory order is kept" if dense else "not dense: copied first")
    if device != "cpu":
        return Explanation(
            _title(title, args, kwargs), "fastops", found, device, None, False, False, tuple(why)
        )
    parallel, reason = _threads(kind, given, kernels[-1][1])
    why.append(reason)
    in_place = bool(same)
    size = 0 if in_place else result.numel() * result.element_size()
    pool = size >= POOL_MINIMUM and bool(memory.pool_info()["enabled"])
    why.append(_pooled(in_place, size, pool))
    return Explanation(_title(title, args, kwargs), "fastops", found, device, _C.cpu_capability(), parallel, pool, tuple(why))  # fmt: skip


def _kernel(called: str) -> str:
    """The kernel that a C function runs: that of its own name, or for what is more than a kernel of the one it is of."""
    if called.removesuffix("_") in KERNELS or called in OUTSIDE:
        return called
    return max((kernel for kernel in KERNELS if called.startswith(kernel)), key=len)


def _kind(kernel: str) -> str:
    return OUTSIDE.get(kernel) or KERNELS[kernel.removesuffix("_")][0]


def _threads(kind: str, given: Tensor, args: tuple) -> tuple[bool, str]:
    grain, n = GRAIN[kind], given.numel()
    threads = torch.get_num_threads()
    if threads == 1:
        return False, "torch.get_num_threads() is 1"
    if kind == "row_norm":
        classes = math.prod(args[2])
    elif kind in ("softmax", "cross_entropy"):
        dim = (
            args[1] if len(args) == 2 else min(1, given.dim() - 1)
        )  # softmax(x, dim), cross_entropy(x, target ...)
        classes = given.shape[dim] if given.dim() else 1
    if kind in ("row_norm", "softmax", "cross_entropy"):
        each = max(1, grain // max(classes, 1))
        rows = n // max(classes, 1)
        return rows > each, f"{rows} rows, of which a thread takes {each} at least"
    return n > grain, f"{n} elements, of which a thread takes {grain} at least"


def _pooled(in_place: bool, size: int, pool: bool) -> str:
    if in_place:
        return "in place: no new memory"
    if pool:
        return f"a result of {size} bytes comes from the pool (from {POOL_MINIMUM} on)"
    if size >= POOL_MINIMUM:
        return "the pool is switched off"
    return (
        f"a result of {size} bytes comes from torch's allocator (the pool begins at {POOL_MINIMUM})"
    )


def _handed_over(tensors: list[Tensor], kwargs: dict) -> str:
    for t in tensors:
        if (t.is_floating_point() or t.is_complex()) and (why := unusable_because(t)) is not None:
            return f"{why}: the kernels take strided float64, float32, bfloat16 and float16 tensors"
    if len({t.dtype for t in tensors if t.is_floating_point()}) > 1:
        return "tensors of more than one dtype"
    if any(torch.is_autocast_enabled(t.device.type) for t in tensors):
        return "under autocast, torch's own rules"
    given = [k for k, v in kwargs.items() if isinstance(v, Tensor)]
    return f"{' and '.join(given) or 'this function'} is torch's to compute"
