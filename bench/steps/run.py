"""The processes of the benchmark of steps: one for each peer, whose steps take turns, and what comes of them."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch

PEERS = ("torch", "torch + tcmalloc", "torch.compile", "fastops")
EPS = {"float32": torch.finfo(torch.float32).eps, "bfloat16": torch.finfo(torch.bfloat16).eps}
TCMALLOC = [
    Path(folder, name)
    for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib")
    for name in ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4", "libtcmalloc_minimal.so")
]  # fmt: skip
CHECKED = 3  # steps whose losses are compared


class Failed(Exception):
    """A process that ended, in one line."""


@dataclass
class Row:
    """A model in a dtype with a peer: `status` is ok, WRONG, ERROR or skipped; only ok has times."""

    model: str
    size: str
    dtype: str
    peer: str
    status: str = "ok"
    note: str = ""
    seconds: list[float] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    ratio: float | None = None  #: torch's time over this peer's, the median of the rounds

    def as_json(self) -> dict[str, Any]:
        """The row as plain data; times in seconds."""
        return vars(self) | {"median": median(self.seconds) if self.seconds else None}


def tcmalloc() -> Path | None:
    """The library to preload, where there is one."""
    return next((path for path in TCMALLOC if path.exists()), None)


@cache
def region_counter() -> Path | None:
    """The library that counts parallel regions, compiled; None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    folder = tempfile.mkdtemp(prefix="fastops-bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made = Path(folder, "regions.so")
    source = Path(__file__).with_name("regions.c")
    done = subprocess.run([compiler, "-O2", "-shared", "-fPIC", source, "-o", made, "-ldl"])
    return made if done.returncode == 0 else None


class Process:
    """A worker: bench/steps/worker.py with a peer's environment."""

    def __init__(self, model: str, dtype: str, peer: str, threads: int, check: bool):
        preload = [region_counter(), tcmalloc() if peer == "torch + tcmalloc" else None]
        environment = os.environ | {
            # threads of those that wait for their turn do not spin
            "OMP_WAIT_POLICY": "passive",
            "LD_PRELOAD": " ".join(map(str, filter(None, preload))),
        }
        self.peer = peer
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "bench.steps.worker", "--model", model, "--dtype", dtype,
                "--peer", peer, "--threads", str(threads), *["--check"] * check,
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=environment, cwd=Path(__file__).parents[2],
        )  # fmt: skip

    def ask(self, what: str) -> dict[str, Any]:
        """The answer to `step` or `measure`. Raises Failed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(what, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # it says below why it ended
        if answer := self.process.stdout.readline():
            return json.loads(answer)
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        raise Failed(f"{self.peer}: {lines[-1] if lines else f'ended with status {code}'}")

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def losses(model: str, dtype: str, peer: str, threads: int) -> list[float]:
    """Of the first steps at the small size, without dropout."""
    with Process(model, dtype, peer, threads, check=True) as process:
        return [process.ask("step")["loss"] for _ in range(CHECKED)]


def compare_losses(rows: list[Row], threads: int) -> None:
    """Marks the rows whose losses are further from float64's than torch's own: by more than twice its error and 4 eps."""
    first = rows[0]
    exact = losses(first.model, "float64", "torch", threads)
    torchs = losses(first.model, first.dtype, "torch", threads)
    error = max(abs(a - b) for a, b in zip(torchs, exact, strict=True))
    allowed = 2 * error + 4 * EPS[first.dtype] * max(map(abs, exact))
    for row in rows:
        if row.status != "ok" or row.peer == "torch":
            continue
        try:
            found = losses(row.model, row.dtype, row.peer, threads)
        except Failed as failure:
            row.status, row.note = "ERROR", str(failure)
            continue
        off = max(abs(a - b) for a, b in zip(found, exact, strict=True))
        if not off <= allowed:
            row.status = "WRONG"
            row.note = f"a loss is {off:.3g} from float64's, torch's {error:.3g} at most"


def measure(rows: list[Row], steps: int, warmup: int, threads: int) -> None:
    """Times a model's peers: all are alive at once, and each takes one step in every round."""
    alive = [row for row in rows if row.status == "ok"]
    processes: list[Process] = []
    try:
        for row in alive:
            processes.append(Process(row.model, row.dtype, row.peer, threads, check=False))
        for k in range(warmup + steps):
            for row, process in zip(alive, processes, strict=True):
                if row.status != "ok":
                    continue
                try:
                    seconds = process.ask("step")["seconds"]
                except Failed as failure:
                    row.status, row.note, row.seconds = "ERROR", str(failure), []
                    continue
                if k >= warmup:
                    row.seconds.append(seconds)
        for row, process in zip(alive, processes, strict=True):
            if row.status == "ok":
                try:
                    row.measured = process.ask("measure")
                except Failed as failure:
                    row.status, row.note, row.seconds = "ERROR", str(failure), []
    finally:
        for process in processes:
            process.__exit__()
    base = alive[0] if alive and alive[0].peer == "torch" and alive[0].status == "ok" else None
    for row in alive:
        if base and row.status == "ok":
            row.ratio = median(t / s for t, s in zip(base.seconds, row.seconds, strict=True))
