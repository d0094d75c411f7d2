"""The pool that large CPU tensors come from: how much it holds, how much it may hold, and giving memory back.

Memory fresh from the system costs a page fault per page. Results of fastops of 128 KiB and more therefore reuse what
earlier results gave back, and after `serve_torch()` so do all of torch's CPU tensors: convolutions, embeddings,
gradients. A tensor from the pool is an ordinary tensor.

Idle memory is bounded in three ways. What is in use and idle together exceeds the most that was in use lately by a
64th at most; a peak that does not come back is forgotten once eight to sixteen times its size have been allocated. No more
than `limit` bytes are idle. And nothing stays idle when the machine or the process's control group has less than 1 GiB
left (or an eighth of its memory, if that is less).

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
    """The pool's state: `enabled`; `serves_torch`; `limit`, `cached` (idle), `in_use` and `peak` (the most
    in use lately) in bytes; `hits` and `misses`, the numbers of tensors served from idle memory and from the system."""
    return _C.pool_info()


def set_limit(nbytes: int) -> None:
    """Lets at most `nbytes` be idle; what is above is given back now.

    The default is an eighth of the memory there is, and half of it while `serve_torch()` is on. The memory there is: the
    machine's, or the limit of a control group (a container) that the process is in.

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
    """Lets the pool serve all of torch's CPU tensors of 128 KiB and more, in the whole process.

    A training step then runs without page faults: torch gives the memory of every large tensor back to the system and
    takes it anew, and that costs some models a third of the step. Call it at the start of the program, before the model
    is made. Results do not change. Tensors that are alive stay valid, now and after `stop_serving()`; smaller ones, shared
    and pinned memory, and memory of other libraries are not touched.

    Returns a context manager that stops at the end of its block:

        >>> import fastops, torch
        >>> with fastops.memory.serve_torch():
        ...     x = torch.ones(1 << 20)
        >>> x.sum()
        tensor(1048576.)

    Raises RuntimeError if another library has put an allocator of its own in the place of torch's that cannot be replaced.
    """
    return _Serving(_C.pool_serve_torch())


def stop_serving() -> None:
    """Undoes `serve_torch()`: new tensors come from torch's allocator, those that are alive stay valid."""
    _C.pool_stop_serving()


if os.environ.get("FASTOPS_SERVE_TORCH", "0") not in ("", "0"):
    serve_torch()
