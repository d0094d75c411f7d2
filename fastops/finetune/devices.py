"""Devices, number formats and threads: what a name or "auto" stands for on this machine."""

import contextlib
import os
import statistics
import time
from pathlib import Path

import torch

from .. import memory
from . import processes
from .data import count_cores
from .errors import ConfigError


def find_device(name: str) -> torch.device:
    """The torch device of a name; "auto" prefers a GPU. Each of several processes has its own GPU.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and processes.count() > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', processes.rank())}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used: {reason}") from error
    return device


def serve_memory(backend: str, device: torch.device) -> contextlib.AbstractContextManager:
    """A block in which torch's CPU tensors come from fastops' pool, without page faults.

    Not on the back end torch, which is compared with fastops, and not where another library has
    replaced torch's allocator.
    """
    serve = getattr(memory, "serve_torch", None)
    if backend == "torch" or device.type != "cpu" or serve is None:
        return contextlib.nullcontext()
    try:
        return serve()
    except RuntimeError:
        return contextlib.nullcontext()


def choose_amp(name: str, device: torch.device) -> tuple[str, str]:
    """The value "off" or "bf16" for a name that may be "auto", and why."""
    if name != "auto":
        return name, ""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
        return (
            "bf16" if fast else "off"
        ), f"bfloat16 autocast: {'on' if fast else 'off'} (the GPU)"
    if device.type == "cpu":
        for which, supported in (
            ("AMX", "_is_amx_tile_supported"),
            ("AVX512-BF16", "_is_avx512_bf16_supported"),
        ):
            if getattr(torch.cpu, supported, lambda: False)():
                return (
                    "bf16",
                    f"bfloat16 autocast: on (the processor has {which}; --amp off for float32)",
                )
    return "off", "bfloat16 autocast: off (the processor has neither AMX nor AVX512-BF16)"


def granted_cores() -> int:
    """CPU cores that the affinity and the control group let this process use."""
    cores = count_cores()
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    with contextlib.suppress(OSError, ValueError):
        quota = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text()
        period = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text()
        if int(quota) > 0:
            cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def choose_threads(wanted: int | str | None) -> tuple[int | None, str]:
    """The number of CPU threads for a wish that may be "auto", and why; None for torch's own.

    On a machine that others use, threads wait for each other: one thread may be faster than two.
    """
    if wanted != "auto":
        return wanted, ""  # type: ignore[return-value]
    if "OMP_NUM_THREADS" in os.environ:  # torchrun sets it, too
        return None, ""
    cores = granted_cores()
    if cores == 1:
        return 1, "1 thread: there is one core"
    times = {number: time_convolution(number) for number in sorted({1, cores // 2, cores})}
    best = min(times, key=lambda number: times[number])
    measured = ", ".join(f"{1e3 * t:.1f} ms with {n}" for n, t in times.items())
    return best, f"{best} of {cores} threads: a convolution takes {measured}"


def time_convolution(threads: int) -> float:
    """Seconds of a convolution, forward and backward, with so many threads: the median of some."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            layer = torch.nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)
            images = torch.randn(8, 64, 56, 56).contiguous(memory_format=torch.channels_last)
        times = []
        for _ in range(7):
            started = time.perf_counter()
            layer(images).sum().backward()
            times.append(time.perf_counter() - started)
        return statistics.median(times)
    finally:
        torch.set_num_threads(before)
