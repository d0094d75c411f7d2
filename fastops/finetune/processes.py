"""The processes of torchrun that train one network together: who is who, and what they agree on.

Alone (no RANK and WORLD_SIZE in the environment) every function here does nothing, and costs nothing.
"""

import atexit
import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from .errors import ConfigError, FineTuneError

T = TypeVar("T")


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def first() -> bool:
    """Whether this is the process that writes and prints, of those that a launcher has started."""
    return int(os.environ.get("RANK", 0)) == 0


def count() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def join() -> None:
    """Join the other processes where a launcher started several: gloo on CPU tensors, nccl on CUDA's.

    A process group that the caller has made is taken as it is; one that is made here stays until
    the program ends (a second one would meet the addresses of the first in the launcher's store).

    Raises:
        ConfigError: several processes were started with a torch that has no torch.distributed.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "RANK" not in os.environ:
        return
    if not dist.is_available():
        raise ConfigError("this torch was built without torch.distributed: start one process")
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(dist.destroy_process_group)


def gather(value: T) -> list[T]:
    """The values that all processes gave, in the order of their numbers."""
    if count() == 1:
        return [value]
    values: list[T | None] = [None] * count()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block at whose end every process raises the FineTuneError that any of them met.

    So that none waits for one that has given up. The processes must not talk to each other inside.
    """
    error = None
    try:
        yield
    except FineTuneError as raised:
        if count() == 1:
            raise
        error = raised
    for number, other in enumerate(gather(error)):
        if other is not None:
            raise other if number == rank() else type(other)(f"process {number}: {other}")


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Each flag, whether any process raised it."""
    if count() == 1:
        return flags
    raised = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return tuple(bool(flag) for flag in raised)


def part(count_of_all: int) -> slice:
    """This process's share of so many things in a row: contiguous, as even as can be."""
    number, processes = rank(), count()
    return slice(
        count_of_all * number // processes,
        count_of_all * (number + 1) // processes,
    )


def average_(tensors: Sequence[torch.Tensor]) -> None:
    """Replace floating-point tensors of one dtype and device by their means over the processes."""
    if count() == 1 or not tensors:
        return
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= count()
    for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.detach().copy_(mean.view_as(tensor))
