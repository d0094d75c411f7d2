"""The instruction sets that the CPU kernels are compiled for, and which of them this machine can run."""

import platform

import pytest
import torch

ISAS = ["default", "avx2", "avx512"]


BEST = torch.backends.cpu.get_cpu_capability()


def available(isa: str) -> bool:
    return (
        isa == "default"
        or (isa == "avx2" and BEST in ("AVX2", "AVX512"))
        or (isa == "avx512" and BEST == "AVX512")
    )


def need(isa: str) -> None:
    if platform.machine() not in ("x86_64", "AMD64") and isa != "default":
        pytest.skip(f"{isa} is x86-64's, this machine is {platform.machine()}")
    if not available(isa):
        pytest.skip(f"this CPU has no {isa} (it has {BEST})")
