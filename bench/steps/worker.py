"""One peer with one model, in a process of its own: takes a step for every line that it reads.

Reads `step` and `measure` from the standard input and answers each by a line of JSON; ends when the input does. Its
parent is bench/steps/run.py.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import resource
import sys
import time
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from .models import MODELS

#: What a step has to do in any library: products of matrices and convolutions.
PRODUCTS = re.compile(r"mm\b|addmm|bmm|convolution|linear|gemm", re.IGNORECASE)


def regions() -> int | None:
    """How many parallel regions OpenMP has begun in this process; None without the counter."""
    try:
        return ctypes.c_long.in_dll(ctypes.CDLL(None), "fastops_bench_regions").value
    except ValueError:
        return None


class Trainer:
    """Forward, loss, backward, clip and optimizer, as `peer` does them."""

    def __init__(self, name: str, dtype: str, peer: str, check: bool):
        torch.manual_seed(0)
        self.model: nn.Module
        entry = MODELS[name]
        self.model, self.x, self.t = entry.make(check, not check)
        self.loss = entry.loss
        self.autocast = dtype == "bfloat16"
        self.clip = peer != "fastops"
        if dtype == "float64":
            self.model.double()
            self.x = self.x.double() if self.x.is_floating_point() else self.x
        if peer == "fastops":
            import fastops

            fastops.memory.serve_torch()
            fastops.patch(self.model, functional=True)
            self.optimizer = fastops.optim.AdamW(
                self.model.parameters(), lr=1e-4, max_grad_norm=1.0
            )
        else:
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(), lr=1e-4, fused=dtype != "float64"
            )
        self.called = torch.compile(self.model) if peer == "torch.compile" else self.model

    def step(self) -> float:
        """Takes a step; returns the loss before it."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = self.loss(self.called, self.x, self.t)
        loss.backward()
        if self.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def profiled(trainer: Trainer) -> dict[str, Any]:
    """A step's seconds outside products and convolutions, its parallel regions, and its ops that take longest."""
    before = regions()
    start = time.perf_counter()
    trainer.step()
    after = regions()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        start = time.perf_counter()
        trainer.step()
        whole = time.perf_counter() - start
    ops = [(e.key, e.self_cpu_time_total / 1e6, e.count) for e in seen.key_averages()]
    products = sum(seconds for name, seconds, _ in ops if PRODUCTS.search(name))
    others = sorted((o for o in ops if not PRODUCTS.search(o[0])), key=lambda o: -o[1])
    return {
        "rest": whole - products,
        "regions": None if before is None or after is None else after - before,
        "ops": others[:12],
    }


def main() -> None:
    """Answers until the input ends."""
    parser = argparse.ArgumentParser()
    for name in ("--model", "--dtype", "--peer", "--threads"):
        parser.add_argument(name)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(int(options.threads))
    trainer = Trainer(options.model, options.dtype, options.peer, options.check)
    for line in sys.stdin:
        if line == "step\n":
            start = time.perf_counter()
            loss = trainer.step()
            answer: dict[str, Any] = {"seconds": time.perf_counter() - start, "loss": loss}
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10  # before the profiler's
            answer = {"peak_rss": peak} | profiled(trainer)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
