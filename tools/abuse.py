"""What takes too long for every run of the tests: `make abuse`.

asan    every CPU kernel, for every instruction set that this machine has, between guard pages, under AddressSanitizer
        and UndefinedBehaviorSanitizer; the pool of CPU tensors
tsan    eight threads in every CPU kernel at once, and in the pool, under ThreadSanitizer
fuzz    tests/ops/test_fuzz.py with FASTOPS_FUZZ examples of every op (default 300)
leaks   tests/package/test_concurrency.py's leak loop with 10,000 calls of every op

The programs of the first two are tests/sanitize/cpu_kernels.cpp with csrc/cpu, where torch is not in them but for the
vector functions of libtorch_cpu, and tests/sanitize/pool_threads.cpp with the pool of csrc/torch. Ends with 1 where anything is found.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
COMPILER = os.environ.get("CXX", "g++")
LIBRARIES = Path(torch.__file__).parent / "lib"
ISA = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": [
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c",
    ],
}  # fmt: skip
# AddressSanitizer's checks as calls: the programs run longer, and step.cpp compiles in 80 s, not in 160.
CALLS = [] if "clang" in COMPILER else ["--param=asan-instrumentation-with-call-threshold=0"]
SANITIZERS = {
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", *CALLS],
    "tsan": ["-fsanitize=thread"],
}
POOL = "POOL"  # in the place of an instruction set
MODES = {"asan": "kernels", "tsan": "threads"}
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=1",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def instruction_sets() -> list[str]:
    """Those that this machine can run."""
    best = torch.backends.cpu.get_cpu_capability()
    names = list(ISA)
    return names[: names.index(best) + 1] if best in names else names[:1]


def sources(isa: str) -> list[Path]:
    """Of the program for an instruction set, or of the pool's, which is the same for all."""
    if isa == POOL:
        return [
            ROOT / "csrc/torch/memory_limit.cpp",
            ROOT / "csrc/torch/pool.cpp",
            ROOT / "tests/sanitize/pool_threads.cpp",
        ]
    return [*sorted((ROOT / "csrc/cpu").glob("*.cpp")), ROOT / "tests/sanitize/cpu_kernels.cpp"]


def program(isa: str, sanitizer: str) -> Path:
    """Builds a program; nothing is compiled twice from the same sources."""
    flags = [
        "-std=c++20", "-O1", "-g1", "-fopenmp-simd", "-pthread", "-Wno-psabi", f"-DCPU_CAPABILITY={isa}",
        f"-DCPU_CAPABILITY_{isa}", f"-I{LIBRARIES.parent / 'include'}", *ISA.get(isa, []), *SANITIZERS[sanitizer],
    ]  # fmt: skip
    digest = hashlib.sha256(f"{COMPILER} {flags} {torch.__version__}".encode())
    for path in sorted([*sources(isa), *ROOT.glob("csrc/**/*.h")]):
        digest.update(path.read_bytes())
    folder = BUILD / f"{sanitizer}-{isa}-{digest.hexdigest()[:16]}"
    made = folder / "program"
    if made.exists():
        return made
    folder.mkdir(parents=True, exist_ok=True)
    ccache = [shutil.which("ccache")] if shutil.which("ccache") else []

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run([*ccache, COMPILER, *flags, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 2))) as pool:
        objects = list(pool.map(compiled, sources(isa)))
    libraries = [f"-L{LIBRARIES}", f"-Wl,-rpath,{LIBRARIES}", "-ltorch_cpu", "-lc10"]
    unfinished = folder / "unfinished"
    subprocess.run(
        [COMPILER, *SANITIZERS[sanitizer], "-pthread", *objects, *libraries, "-o", unfinished],
        check=True,
    )
    unfinished.rename(made)
    return made


def sanitized(sanitizer: str, isa: str) -> bool:
    path = program(isa, sanitizer)
    done = subprocess.run(
        [path] if isa == POOL else [path, MODES[sanitizer]],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    print((done.stdout + done.stderr)[-6000:].rstrip() or f"exit status {done.returncode}")
    return done.returncode == 0


def tested(test: str, environment: dict[str, str]) -> bool:
    # pyproject.toml has one -q already: with two there is no line of what has passed
    command = [sys.executable, "-X", "faulthandler", "-m", "pytest", *test.split()]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment).returncode == 0


def main() -> int:
    """A line for each part, and what was found."""
    parts = ["asan", "tsan", "fuzz", "leaks"]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", nargs="+", choices=parts, default=parts)
    parser.add_argument(
        "--isa", nargs="+", choices=[*instruction_sets(), POOL], default=[POOL, *instruction_sets()]
    )
    parser.add_argument("--examples", type=int, default=300, help="of every op, for fuzz")
    parser.add_argument("--calls", type=int, default=10_000, help="of every op, for leaks")
    options = parser.parse_args()
    jobs = [(f"{s} {isa}", sanitized, (s, isa)) for s in MODES for isa in options.isa]
    jobs = [job for job in jobs if job[2][0] in options.part]
    budgets = {
        "fuzz": ("tests/ops/test_fuzz.py", {"FASTOPS_FUZZ": str(options.examples)}),
        "leaks": (
            "tests/package/test_concurrency.py -k leak",
            {"FASTOPS_LEAK_CALLS": str(options.calls)},
        ),
    }
    jobs += [(part, tested, budgets[part]) for part in budgets if part in options.part]
    fine = True
    for name, job, arguments in jobs:
        start = time.perf_counter()
        found = not job(*arguments)
        fine &= not found
        print(f"{name} ({time.perf_counter() - start:.0f} s): {'FAILED' if found else 'nothing found'}", flush=True)  # fmt: skip
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
