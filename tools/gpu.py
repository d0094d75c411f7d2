"""Everything that a machine with a GPU can say about fastops, in one dated report: `make gpu`.

The tests marked cuda, some of them again under compute-sanitizer where the toolkit has it, and the benchmark. The report
is bench/results/gpu-DATE.md, written as the results come; the whole output is gpu-DATE.log beside it, and the
benchmark's JSON lines are gpu-DATE.jsonl. Each step has a time limit, after which the next one starts. Ends with 1
where a step failed, with 2 where there is no GPU.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.devices import why_not  # noqa: E402

RESULTS = ROOT / "bench" / "results"
SHOWN = 400  # lines of each step's output
LIMIT = 1800.0


@dataclass
class Step:
    """One command of the report."""

    title: str
    command: Sequence[str]
    limit: float = LIMIT
    """Seconds after which it is ended."""


def steps(json: Path) -> list[Step]:
    """What is run, in order; compute-sanitizer is slow, and gets one layout of each op and the optimizers."""
    pytest = [sys.executable, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider"]
    found = [Step("Tests", [*pytest, "tests"])]
    if sanitizer := shutil.which("compute-sanitizer"):
        few = [
            *pytest,
            "tests/cuda/test_cuda_device.py",
            "-k",
            "odd or rows or optimizers or masks",
        ]
        for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *few]
            found.append(Step(f"compute-sanitizer {tool}", command))
    bench = [sys.executable, "-m", "bench", "--device", "cuda", "--json", str(json)]
    return [*found, Step("Benchmark", bench, 2 * LIMIT)]


def machine() -> list[str]:
    """What the figures belong to."""
    show = "import fastops; print(fastops.show_config())"
    commands = [["nvidia-smi"], ["git", "rev-parse", "HEAD"], [sys.executable, "-c", show]]
    found = []
    for command in commands:
        if shutil.which(command[0]):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            found.append(done.stdout.rstrip() or done.stderr.rstrip())
    return found


def run(step: Step, log: TextIO) -> tuple[int, bool, list[str]]:
    """Runs a step and copies its output to the log line by line: its exit code, whether it was ended at its limit, and
    its last lines."""
    last: deque[str] = deque(maxlen=SHOWN)
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,  # its own children end with it
    )
    ended = threading.Event()

    def end() -> None:
        ended.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(step.limit, end)
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            log.flush()
            last.append(line.rstrip("\n"))
        process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:  # Ctrl-C
            end()
    return process.returncode, ended.is_set(), list(last)


def write(path: Path, todo: Sequence[Step], about: Sequence[str]) -> bool:
    """Runs the steps one by one and adds each to the report as soon as it is done; whether all went well."""
    well = True
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", buffering=1) as file, path.with_suffix(".log").open("w") as log:
        print(f"# fastops on a GPU, {path.stem.removeprefix('gpu-')}", file=file)
        for text in about:
            print(f"\n```\n{text}\n```", file=file)
        for step in todo:
            print(f"{step.title} ...", flush=True)
            start = time.perf_counter()
            code, ended, lines = run(step, log)
            seconds = time.perf_counter() - start
            well &= code == 0 and not ended
            verdict = f"exit code {code} after {seconds:.0f} s"
            if ended:
                verdict = f"ended at its limit of {step.limit:.0f} s"
            print(f"{step.title}: {verdict}", flush=True)
            print(f"\n## {step.title}\n\n{verdict}\n\n```", file=file)
            print("\n".join(lines), "\n```", sep="", file=file, flush=True)
    return well


def main() -> int:
    """The exit code."""
    if reason := why_not("cuda"):
        print(f"tools/gpu.py: error: {reason}", file=sys.stderr)
        return 2
    path = RESULTS / f"gpu-{datetime.now():%Y-%m-%d-%H%M}.md"
    well = write(path, steps(path.with_suffix(".jsonl")), machine())
    print(path)
    return int(not well)


if __name__ == "__main__":
    sys.exit(main())
