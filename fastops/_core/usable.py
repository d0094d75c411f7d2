"""What the kernels take: questions about a tensor, asked by the table of ops, by patch and by explain."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import _C

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda") if _C.cuda_built() else ("cpu",)
CLASSES = (Tensor, torch.nn.Parameter, FakeTensor)


def usable(t: object) -> bool:
    """Whether the kernels take t: an ordinary strided tensor of a float dtype on a device that they are built for
    (or one without values, as torch.export has them)."""
    return (
        type(t) in CLASSES
        and t.dtype in DTYPES  # type: ignore[attr-defined]
        and t.device.type in DEVICES  # type: ignore[attr-defined]
        and t.layout is torch.strided  # type: ignore[attr-defined]
        and not t.is_nested  # type: ignore[attr-defined]
    )


def unusable_because(t: object) -> str | None:
    """Why not, in words; None where :func:`usable` is true."""
    if not isinstance(t, Tensor):
        return f"it is no tensor but a {type(t).__name__}"
    if type(t) not in CLASSES:
        return f"a tensor subclass, {type(t).__name__}"
    if t.is_nested:
        return "a nested tensor"
    if t.layout is not torch.strided:
        return f"the layout {t.layout}"
    if t.dtype not in DTYPES:
        return f"the dtype {str(t.dtype).removeprefix('torch.')}"
    if t.device.type not in DEVICES:
        return f"no kernels for {t.device.type} in this build"
    return None


def tensors_of(args: Iterable[Any]) -> list[Tensor]:
    """Those of the arguments that are tensors."""
    return [a for a in args if isinstance(a, Tensor)]


def refused(*args: Any) -> bool:
    """Whether the kernels do not take these arguments: no float tensor among them, or one of another kind."""
    tensors = tensors_of(args)
    floats = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    return (
        not floats
        or any(t.dtype not in DTYPES for t in floats)
        or any(t.layout is not torch.strided for t in tensors)
    )
