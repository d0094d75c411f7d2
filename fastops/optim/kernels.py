"""The table of the optimizers' kernels as Python sees it: what a kernel keeps in a parameter's state, and how its options
are read from a parameter group. No kernel by name."""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import _C


def number(group: dict[str, Any], value: Any) -> Any:
    """An option as the kernels take it: a float, or a tensor on a GPU as it is where the host must not wait for it."""
    if type(value) is float:
        return value
    if (
        isinstance(value, Tensor)
        and value.is_cuda
        and (group.get("capturable") or group.get("fused"))
    ):
        return value
    return float(value)


def check_group(group: dict[str, Any]) -> None:
    """Raises ValueError for what a group has wrong beyond torch's own options."""
    l1, mode = group.get("l1", 0.0), group.get("l1_mode", "subgradient")
    rounding = group.get("rounding", "nearest")
    if not l1 >= 0:
        raise ValueError(f"Invalid l1 value: {l1}; it must not be negative")
    if mode not in ("subgradient", "proximal"):
        raise ValueError(f"Invalid l1_mode: {mode!r}; it is 'subgradient' or 'proximal'")
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"Invalid rounding: {rounding!r}; it is 'nearest' or 'stochastic'")


def _l1(group: dict[str, Any]) -> float:
    l1 = group.get("l1", 0.0)
    if l1:
        check_group(group)
    return float(l1)


def _item(key: str, index: int) -> Callable[[dict[str, Any]], Any]:
    return lambda group: number(group, group[key][index])


# What a group calls otherwise than a formula does; all else is `group[option]`.
_READERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "lr": lambda group: number(group, group["lr"]),
    "beta1": _item("betas", 0),
    "beta2": _item("betas", 1),
    "etaminus": _item("etas", 0),
    "etaplus": _item("etas", 1),
    "step_size_min": _item("step_sizes", 0),
    "step_size_max": _item("step_sizes", 1),
    "l1": _l1,
    "proximal": lambda group: float(group.get("l1_mode") == "proximal"),
}


class Kernel:
    """An entry of the table.

    Attributes:
        index: its place.
        states: the keys of the states that are like the parameter.
        scalar_states: the keys of those that are one number; the first is the step count.
    """

    def __init__(
        self, index: int, states: list[str], scalar_states: list[str], options: list[str]
    ) -> None:
        self.index = index
        self.states = [sys.intern(name) for name in states]
        self.scalar_states = [sys.intern(name) for name in scalar_states]
        self._options = [(option, _READERS.get(option)) for option in options]

    def options_of(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """What the kernel takes of a parameter group, in its order."""
        return tuple([read(group) if read else float(group[name]) for name, read in self._options])


KERNELS = {name: Kernel(k, *rest) for k, (name, *rest) in enumerate(_C.optimizer_kernels())}
STATE_NAMES = {name for kernel in KERNELS.values() for name in kernel.states}
SCALAR_STATE_NAMES = {name for kernel in KERNELS.values() for name in kernel.scalar_states}
