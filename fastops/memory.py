"""The pool that large CPU tensors come from: how much it holds, how much it may hold, and giving memory back.

New memory from the system costs a page fault per page. Results of fastops that take 128 KiB or more therefore reuse the
memory of earlier results. After `serve_torch()`, all of torch's CPU tensors of that size do: outputs of convolutions,
embeddings, gradients. A tensor from the pool is an ordinary tensor.

Idle memory is bounded in three ways. Memory in use and idle memory together exceed the recent peak by 1/64 at most; the
pool forgets a peak that does not come back once it has allocated eight to sixteen times its size. At most `limit` bytes
are idle. And nothing stays idle when the machine or the process's control group has less than 1 GiB left (or an eighth of
its memory, if that is less).

Environment variables: FASTOPS_CPU_POOL_LIMIT (bytes) sets the limit at start, and 0 switches the pool off;
FASTOPS_SERVE_TORCH=1 calls `serve_torch()` when fastops is imported.
"""

from __future__ import annotations

import os

from . import _C

__all__ = [
    "disable",
    "enable",
    "pool_info",
    "serve_torch",
    "set_limit",
    "stop_serving",
    "trim",
]


def pool_info() -> dict[str, int | bool]:
    """The state of the pool: `enabled`; `serves_torch`; `limit`, `cached` (idle), `in_use` and `peak` (the recent maximum
    of `in_use`) in bytes; `hits` and `misses`, the numbers of tensors served from idle memory and from the system."""
    return _C.pool_info()


def set_limit(nbytes: int) -> None:
    """Keeps at most `nbytes` idle, and gives the rest back to the system now.

    By default it is an eighth of the memory of the machine, or of what the process's control group (its container)
    allows, and half of that memory while `serve_torch()` is on.

    Raises ValueError for a negative number.
    """
    if nbytes < 0:
        raise ValueError(f"set_limit: nbytes must be 0 or more, got {nbytes}")
    _C.pool_set_limit(nbytes)


def trim() -> None:
    """Gives all idle memory back to the system."""
    _C.pool_trim()


def disable() -> None:
    """Switches the pool off: tensors come from torch's allocator, idle memory is given back."""
    _C.pool_enable(False)


def enable() -> None:
    """Switches the pool on again."""
    _C.pool_enable(True)


class _Serving:
    """What `serve_torch()` returns. As a context manager it stops at the end, unless the pool served before."""

    def __init__(self, started: bool):
        self._started = started

    def __enter__(self) -> _Serving:
        return self

    def __exit__(self, *_: object) -> None:
        if self._started:
            self._started = False
            stop_serving()


def serve_torch() -> _Serving:
    """Makes the pool serve all of torch's CPU tensors of 128 KiB and more, in the whole process.

    A training step then runs without page faults. Otherwise torch returns the memory of every large tensor to the system
    and asks for new memory each time, which takes a third of the step in some models. Call it at the start of the program,
    before you make the model. Results do not change. Existing tensors stay valid, now and after `stop_serving()`. Smaller
    tensors, shared and pinned memory, and memory of other libraries are not affected.

    Returns a context manager that stops at the end of its block:

        >>> import fastops, torch
        >>> with fastops.memory.serve_torch():
        ...     x = torch.ones(1 << 20)
        >>> x.sum()
        tensor(1048576.)

    Raises RuntimeError if another library has replaced torch's allocator with one that cannot be replaced in turn.
    """
    return _Serving(_C.pool_serve_torch())


def stop_serving() -> None:
    """Undoes `serve_torch()`: new tensors come from torch's allocator, and existing ones stay valid."""
    _C.pool_stop_serving()


if os.environ.get("FASTOPS_SERVE_TORCH", "0") not in ("", "0"):
    serve_torch()
