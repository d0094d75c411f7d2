"""Everything that a machine with a GPU can say about fastops, in one dated report: `make gpu`.

The tests marked cuda, some of them again under compute-sanitizer where the toolkit has it, and the benchmark. The report
is bench/results/gpu-DATE.md; the benchmark's JSON lines are beside it. Ends with 1 where a step failed, with 2 where
there is no GPU.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.devices import why_not  # noqa: E402

RESULTS = ROOT / "bench" / "results"
KEPT = 400  # lines of each step's output


@dataclass
class Step:
    """One command of the report."""

    title: str
    command: Sequence[str]


def steps(json: Path) -> list[Step]:
    """What is run, in order; compute-sanitizer is slow, and gets one layout of each op and the optimizers."""
    pytest = [sys.executable, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider"]
    found = [Step("Tests", [*pytest, "tests"])]
    if sanitizer := shutil.which("compute-sanitizer"):
        few = [*pytest, "tests/test_cuda_device.py", "-k", "odd or rows or optimizers or masks"]
        for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *few]
            found.append(Step(f"compute-sanitizer {tool}", command))
    bench = [sys.executable, "-m", "bench", "--device", "cuda", "--json", str(json)]
    return [*found, Step("Benchmark", bench)]


def machine() -> list[str]:
    """What the figures belong to."""
    show = "import fastops; fastops.show_config()"
    commands = [["nvidia-smi"], ["git", "rev-parse", "HEAD"], [sys.executable, "-c", show]]
    found = []
    for command in commands:
        if shutil.which(command[0]):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            found.append(done.stdout.rstrip())
    return found


def write(path: Path, todo: Sequence[Step], about: Sequence[str]) -> bool:
    """Runs the steps one by one and adds each to the report as soon as it is done; whether all went well."""
    well = True
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        print(f"# fastops on a GPU, {path.stem.removeprefix('gpu-')}", file=file)
        for text in about:
            print(f"\n```\n{text}\n```", file=file)
        for step in todo:
            print(f"{step.title} ...", flush=True)
            start = time.perf_counter()
            done = subprocess.run(
                step.command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            seconds = time.perf_counter() - start
            well &= done.returncode == 0
            verdict = f"exit code {done.returncode} after {seconds:.0f} s"
            print(f"{step.title}: {verdict}", flush=True)
            print(f"\n## {step.title}\n\n{verdict}\n\n```", file=file)
            print(
                "\n".join(done.stdout.splitlines()[-KEPT:]), "\n```", sep="", file=file, flush=True
            )
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
