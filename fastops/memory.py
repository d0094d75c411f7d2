"""The pool that large CPU results come from: how much it holds, how much it may hold, and giving memory back.

Memory fresh from the system costs a page fault per page; results of 128 KiB and more therefore reuse what earlier results
gave back. A tensor from the pool is an ordinary tensor. The environment variable FASTOPS_CPU_POOL_LIMIT (bytes) sets
the limit at start, 0 switches the pool off.
"""

from __future__ import annotations

from . import _C

__all__ = ["disable", "enable", "pool_info", "set_limit", "trim"]


def pool_info() -> dict[str, int | bool]:
    """The pool's state: `enabled`; `limit`, `cached` (idle) and `in_use` in bytes; `hits` and `misses`, the numbers of
    results served from idle memory and from the system."""
    return _C.pool_info()


def set_limit(nbytes: int) -> None:
    """Lets at most `nbytes` lie idle (default: an eighth of the machine's memory); what is above is given back now.

    Raises ValueError for a negative number.
    """
    if nbytes < 0:
        raise ValueError(f"set_limit: nbytes must be 0 or more, got {nbytes}")
    _C.pool_set_limit(nbytes)


def trim() -> None:
    """Gives all idle memory back to the system."""
    _C.pool_trim()


def disable() -> None:
    """Switches the pool off: results come from torch's allocator, idle memory is given back."""
    _C.pool_enable(False)


def enable() -> None:
    """Switches the pool on again."""
    _C.pool_enable(True)
