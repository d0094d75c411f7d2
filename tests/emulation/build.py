"""Compiles csrc/cuda and the tests' own kernels with the host compiler on csrc/emulation, cached by content."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulation"
COMPILER = os.environ.get("CXX", "g++")
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
FLAGS = ["-std=c++20", "-g1", "-fPIC", *WARNINGS, "-DFASTOPS_EMULATION"]
INCLUDES = [
    "csrc/emulation",
    Path(torch.__file__).parent / "include",
]  # not csrc: its math.h is not <math.h>

# What a program can be built for. UBSan's checks end the program; TSan's and ASan's do by themselves.
VARIANTS = {
    "plain": ["-O2"],
    "ucontext": ["-O1", "-DFASTOPS_EMULATION_UCONTEXT"],
    "asan": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-O1", "-fsanitize=thread"],
}
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0",  # frames live on stacks of ours
    "TSAN_OPTIONS": "exitcode=66:halt_on_error=1:atexit_sleep_ms=0",
    "UBSAN_OPTIONS": "print_stacktrace=0",
}


def made_by_setup(part: str) -> list[Path]:
    """The objects of csrc/`part` as setup.py leaves them in build/, for csrc/cpu those of every instruction set; an
    AssertionError where build/ is there without a whole number of each."""
    made = sorted(ROOT.glob(f"build/temp*/**/csrc-{part}-*.cpp/csrc/{part}/**/*.o"))
    stems = sorted(o.stem for o in made)
    wanted = sorted(source.stem for source in ROOT.glob(f"csrc/{part}/**/*.cpp"))
    times = len(stems) // len(wanted)
    assert times and stems == sorted(wanted * times), (
        "build/ holds an unfinished or an old build: `make clean build`"
    )
    return made


@cache
def _headers() -> bytes:
    """A digest of everything but the source itself that an object is made of."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cuh")]):
        digest.update(path.name.encode() + path.read_bytes())
    version = subprocess.run([COMPILER, "--version"], capture_output=True, check=True).stdout
    digest.update(version.splitlines()[0] + torch.__version__.encode())
    return digest.digest()


def _run(command: list[str | Path], made: Path) -> Path:
    """Makes a file by a command that takes `-o PATH`; a reader never sees half of it."""
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        part = Path(folder) / made.name
        done = subprocess.run([*command, "-o", part], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[-8000:]}")
        os.replace(part, made)
    return made


def _object(source: Path, flags: list[str]) -> Path:
    digest = hashlib.sha256(
        _headers() + source.read_bytes() + " ".join(flags).encode()
    ).hexdigest()[:16]
    made = BUILD / "objects" / f"{source.stem}-{digest}.o"
    if made.exists():
        return made
    ccache = [shutil.which("ccache")] if shutil.which("ccache") else []
    includes = [f"-I{path}" for path in INCLUDES]
    return _run([*ccache, COMPILER, *flags, *includes, "-x", "c++", "-c", source], made)


def objects(sources: list[Path], variant: str = "plain", extra: Sequence[str] = ()) -> list[Path]:
    """Compiles them; MAX_JOBS compilers at a time, or two."""
    flags = [*FLAGS, *VARIANTS[variant], *extra]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 2))) as pool:
        return list(pool.map(lambda source: _object(source, flags), sources))


def link(name: str, made_of: list[Path], flags: list[str]) -> Path:
    """The program, or with -shared among the flags the library, `name`."""
    parts = [f"{path} {path.stat().st_mtime_ns}" for path in made_of]
    digest = hashlib.sha256(" ".join([*parts, *flags]).encode()).hexdigest()[:16]
    made = BUILD / f"{name}-{digest}{'.so' if '-shared' in flags else ''}"
    if made.exists():
        return made
    return _run([COMPILER, *made_of, *flags], made)


def build(name: str, sources: list[Path], variant: str = "plain", *, shared: bool = False) -> Path:
    """The program, or shared library, `name` made of `sources`."""
    flags = [*VARIANTS[variant], *(["-shared"] if shared else [])]
    return link(f"{name}-{variant}", objects(sources, variant), flags)


def kernels() -> list[Path]:
    """The sources of the kernels."""
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def every_kernel(variant: str) -> Path:
    """The program that runs every kernel once."""
    source = ROOT / "tests" / "emulation" / "every_kernel.cpp"
    return build("every_kernel", [*kernels(), source], variant)


def run(program: Path, *arguments: str, timeout: float = 300) -> tuple[int, str]:
    """Exit status (negative: a signal) and output of a program that may well be killed by what it finds."""
    done = subprocess.run(
        [program, *arguments],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return done.returncode, done.stdout + done.stderr
