"""Stochastic rounding as it is defined, in numpy, and parameters of any dtype to step on."""

import numpy as np
import torch
from torch import nn

BF16 = torch.bfloat16


def rand(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(dtype, *shapes):
    shapes = shapes or ((5,), (3, 4), (37, 29), (), (0, 2))
    return [nn.Parameter(rand(*s, dtype=dtype, seed=k)) for k, s in enumerate(shapes)]


def philox(counters, seed, number, fourth):
    """Philox 4x32-10 (Salmon et al., 2011): four words each for the counters (c, number, fourth)."""
    u64, low = np.uint64, np.uint64(0xFFFFFFFF)
    counters = counters.astype(u64)
    c = [counters & low, counters >> u64(32)]
    c += [np.full_like(counters, number), np.full_like(counters, fourth)]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = u64(0xD2511F53) * c[0], u64(0xCD9E8D57) * c[2]
        c = [b >> u64(32) ^ c[1] ^ u64(k[0]), b & low, a >> u64(32) ^ c[3] ^ u64(k[1]), a & low]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c, -1)


def rounded(values, seed, step, number, slot):
    """float32 values to bfloat16: element i of slot s has half of word i % 4 of counter i / 4, and goes away from zero
    where its lower 16 bits and that are 2^16 or more."""
    n = values.numel()
    words = philox(np.arange((n + 3) // 4), seed, number, 2 * step + slot // 2).reshape(-1)[:n]
    noise = words >> np.uint64(16) if slot % 2 else words & np.uint64(0xFFFF)
    bits = values.contiguous().numpy().view(np.uint32).astype(np.uint64).reshape(-1)
    up = (bits + noise) >> np.uint64(16)
    return torch.from_numpy(up.astype(np.uint16).view(np.int16)).view(BF16).view(values.shape)
