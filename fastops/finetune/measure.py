"""Time and memory, and where the time of a training step goes."""

import gc
import re
import time
from collections.abc import Iterable
from pathlib import Path

import torch


def clock(device: torch.device) -> float:
    """Seconds, with the device's work until now finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    numbers = torch.tensor(list(values), dtype=torch.float64)
    return numbers.mean().item(), numbers.std().item() if len(numbers) > 1 else 0.0


class PeakMemory:
    """How far the memory in use rose above what it was when this was made.

    On CUDA the tensors' memory. On the CPU the whole process's (Linux; what has been freed is
    given back to the system first, so that one run does not hide in another's leavings).
    """

    def __init__(self, device: torch.device):
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.before: int | None = torch.cuda.memory_allocated(device)
            return
        give_back()
        try:
            # Linux: the high-water mark starts again from what is resident now.
            Path("/proc/self/clear_refs").write_text("5")
            self.before = resident("VmRSS")
        except OSError:
            self.before = None

    def rise(self) -> int | None:
        """Bytes; None where the system does not tell."""
        if self.before is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return max(0, resident("VmHWM") - self.before)


def resident(name: str) -> int:
    """VmRSS (bytes of this process in memory now) or VmHWM (the most there were)."""
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    if match is None:
        raise OSError(f"/proc/self/status has no {name}")
    return 1024 * int(match[1])


def give_back() -> None:
    """Return freed memory to the system: fastops' pool, and the C library's where it can."""
    import ctypes

    from .. import memory

    memory.trim()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
