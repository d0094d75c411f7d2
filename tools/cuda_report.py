"""What nvcc makes of csrc/cuda: registers, spills, shared memory, occupancy and widths of accesses of every kernel.

    python tools/cuda_report.py                         # writes bench/cuda_report.csv: what has changed since
    python tools/cuda_report.py --all                   # everything; a few minutes
    python tools/cuda_report.py --arch 90 --output FILE

Needs nvcc and no GPU. Widths are read from SASS where nvdisasm is found (the toolkit's, PyPI's
nvidia-cuda-nvdisasm, or the one that comes with triton), else from PTX. Ends with 1 on a spill or a narrow access.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from math import ceil
from pathlib import Path

Line = dict[str, str]  # of the table
Widths = tuple[
    Counter[int], Counter[int]
]  # how many loads and stores there are of each number of bytes
ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "bench" / "cuda_report.csv"


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor: "Technical Specifications per Compute Capability" in the CUDA programming guide."""

    threads: int
    blocks: int
    shared: int
    registers: int = 65536


LIMITS = {
    "80": Limits(2048, 32, 164 << 10),
    "90": Limits(2048, 32, 228 << 10),
    "100": Limits(2048, 32, 228 << 10),
    "120": Limits(1536, 24, 100 << 10),
}
# As torch.utils.cpp_extension and setup.py compile, with warnings as errors.
FLAGS = [
    "-std=c++20", "-arch=compute_80", "--expt-relaxed-constexpr", "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__", "-D__CUDA_NO_BFLOAT16_CONVERSIONS__", "-D__CUDA_NO_HALF2_OPERATORS__", "-Werror", "all-warnings",
]  # fmt: skip
DTYPES = {
    "float": "float32",
    "double": "float64",
    "c10::Half": "float16",
    "c10::BFloat16": "bfloat16",
}


# ---------------------------------------------------------------------------------------------- tools


def cuda_home() -> Path | None:
    """A toolkit with nvcc and its headers. The nvcc on PATH may be a wrapper script: it is asked where it works."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        command = [nvcc, "-dryrun", "-x", "cu", "-c", os.devnull]
        dry = subprocess.run(command, capture_output=True, text=True)
        homes += map(os.path.realpath, re.findall(r"^#\$ TOP=(.*)$", dry.stderr, re.MULTILINE))
    for home in map(Path, filter(None, homes)):
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            return home
    return None


def nvdisasm(home: Path) -> Path | None:
    """The disassembler of cubins, which toolkits from package managers often come without."""
    found = [home / "bin" / "nvdisasm", *map(Path, filter(None, [shutil.which("nvdisasm")]))]
    for package, below in {"nvidia": "*/bin", "triton": "backends/nvidia/bin"}.items():
        spec = find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or []:
            found += Path(folder).glob(f"{below}/nvdisasm")
    return next((path for path in found if path.exists()), None)


def run(*command: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a command that must succeed."""
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr[-8000:]}")
    return done


def first(pattern: str, text: str) -> str:
    """The first group of a pattern that must be there."""
    found = re.search(pattern, text)
    assert found, f"{pattern} is not in {text[:200]}"
    return found[1]


def sources() -> list[Path]:
    """The files that are compiled."""
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def made_from(path: Path) -> set[Path]:
    """A file and all of ours that it includes."""
    found, left = set(), [path]
    while left:
        if (file := left.pop()) in found:
            continue
        found.add(file)
        names = re.findall(r'^#include "(.*)"', file.read_text(), re.MULTILINE)
        left += [p for p in ((file.parent / name).resolve() for name in names) if p.exists()]
    return found


def digest(source: Path) -> str:
    """Of everything of ours that the kernels of a file are made from, but for comments."""
    made = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted(made_from(source)):
        code = re.sub(r"\s*//.*", "", path.read_text())
        made.update(path.name.encode() + code.encode())
    return made.hexdigest()[:12]


def digests() -> dict[str, str]:
    """Of every file that is compiled, by its name."""
    return {source.stem: digest(source) for source in sources()}


# ---------------------------------------------------------------------------------------------- what is read


def arguments_of(name: str) -> list[str]:
    """The template arguments at the outermost level of `kernel<...>`."""
    found, depth = [""], 0
    for character in name[name.index("<") + 1 : name.rindex(">")]:
        depth += (character == "<") - (character == ">")
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return [argument.strip() for argument in found]


def demangled(symbols: list[str]) -> dict[str, tuple[str, str]]:
    """(kernel without namespaces and dtypes, its dtypes) of every mangled name."""
    names = run("c++filt", text="\n".join(symbols)).stdout.splitlines()
    found = {}
    for symbol, name in zip(symbols, names, strict=True):
        name = re.sub(r"\(anonymous namespace\)::|fastops::(cuda::)?", "", name)
        name = re.sub(r"^void ", "", name)
        name = first(r"^([^(]*)", name)  # without its parameters
        arguments = arguments_of(name)
        others = [a for a in arguments if a not in DTYPES]
        dtypes = [DTYPES[a] for a in arguments if a in DTYPES]
        kernel = name[: name.index("<")] + (f"<{', '.join(others)}>" if others else "")
        found[symbol] = kernel, "/".join(dtypes)
    return found


def resources(log: str) -> dict[str, dict[str, int]]:
    """Registers, spilled bytes and shared memory of every kernel in what `ptxas -v` says."""
    found = {}
    for part in re.split(r"Compiling entry function ", log)[1:]:
        symbol = first(r"^'(\w+)'", part)
        spills = re.findall(r"(\d+) bytes spill", part)
        shared = re.search(r"(\d+) bytes smem", part)
        found[symbol] = {
            "registers": int(first(r"Used (\d+) registers", part)),
            "spills": sum(map(int, spills)),
            "stack": int(first(r"(\d+) bytes stack frame", part)),
            "shared": int(shared[1]) if shared else 0,
        }
    return found


def functions(ptx: str) -> dict[str, str]:
    """The text of every kernel in PTX, from its name to its end."""
    return dict(re.findall(r"\.entry (\w+)(\(.*?\n\})", ptx, re.DOTALL))


def widths_of_sass(sass: str) -> dict[str, Widths]:
    """Of every kernel."""
    found: dict[str, Widths] = {}
    for symbol, body in re.findall(r"^\.text\.(\w+):\n(.*?)(?=^//-----|\Z)", sass, re.M | re.S):
        found[symbol] = counts = (Counter[int](), Counter[int]())
        for kind, suffixes in re.findall(r"\b(LDG?|STG?)\.E((?:\.\w+)*)", body):
            bits = re.search(r"\.[US]?(256|128|64|16|8)\b", suffixes)
            counts[kind.startswith("S")][int(bits[1]) // 8 if bits else 4] += 1
    return found


def widths_of_ptx(ptx: str) -> dict[str, Widths]:
    """The same from PTX."""
    found: dict[str, Widths] = {}
    for symbol, body in functions(ptx).items():
        found[symbol] = counts = (Counter[int](), Counter[int]())
        for kind, suffixes in re.findall(r"\b(ld|st)\.global((?:\.\w+)+)", body):
            count = re.search(r"\.v(\d)", suffixes)
            bits = int(first(r"\.[bufs](\d+)", suffixes))
            counts[kind == "st"][(int(count[1]) if count else 1) * bits // 8] += 1
    return found


def occupancy(limits: Limits, threads: int, registers: int, shared: int) -> int:
    """Percent of the threads that can be resident, as NVIDIA's occupancy calculator finds it."""
    warps = ceil(threads / 32)
    of_a_warp = ceil(registers * 32 / 256) * 256
    by_registers = limits.registers // 4 // of_a_warp * 4 // (ceil(warps / 4) * 4)
    by_shared = limits.shared // (ceil(shared / 128) * 128 + 1024)  # 1 KB is the system's
    blocks = min(limits.blocks, limits.threads // (warps * 32), by_registers, by_shared)
    return round(100 * blocks * warps * 32 / limits.threads)


# ---------------------------------------------------------------------------------------------- table


def written(widths: Counter[int]) -> str:
    """3 of 16 bytes and 2 of 4 are `16:3 4:2`."""
    return " ".join(f"{width}:{widths[width]}" for width in sorted(widths, reverse=True))


def to_ptx(source: Path, folder: Path, home: Path) -> Path:
    """The one PTX that setup.py has the machine code of every architecture made from."""
    import torch

    ptx = folder / f"{source.stem}.ptx"
    include = f"-I{Path(torch.__file__).parent / 'include'}"
    run(home / "bin" / "nvcc", *FLAGS, include, "-ptx", source, "-o", ptx)
    return ptx


def assembled(ptx: Path, arch: str, home: Path) -> list[Line]:
    """A line per kernel of a file."""
    cubin = ptx.with_suffix(f".{arch}")
    command = [home / "bin" / "ptxas", "-v", f"-arch=sm_{arch}", ptx, "-o", cubin]
    used = resources(run(*command).stderr)
    text = ptx.read_text()
    bodies = functions(text)
    if disassembler := nvdisasm(home):
        widths = widths_of_sass(run(disassembler, "-c", cubin).stdout)
    else:
        widths = widths_of_ptx(text)
    found = []
    for symbol, (kernel, dtype) in demangled(list(used)).items():
        threads = int(first(r"\.maxntid (\d+)", bodies[symbol]))
        registers, spills, stack, shared = used[symbol].values()
        loads, stores = widths[symbol]
        line: dict[str, object] = {"source": ptx.stem, "kernel": kernel, "dtype": dtype}
        line |= {"threads": threads, "float64": len(re.findall(r"\.f64\b", bodies[symbol]))}
        line |= {f"shared {arch}": shared, f"registers {arch}": registers, f"spills {arch}": spills}
        line[f"stack {arch}"] = stack
        line[f"occupancy {arch}"] = occupancy(LIMITS[arch], threads, registers, shared)
        line |= {f"loads {arch}": written(loads), f"stores {arch}": written(stores)}
        found.append({name: str(value) for name, value in line.items()})
    return found


def make(architectures: list[str], home: Path, stale: set[str]) -> list[Line]:
    """The lines of the files that are named, sorted."""
    lines: dict[tuple, Line] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        named = [source for source in sources() if source.stem in stale]
        print(*[source.name for source in named], file=sys.stderr, flush=True)
        every = pool.map(lambda source: to_ptx(source, Path(folder), home), named)
        jobs = [pool.submit(assembled, ptx, arch, home) for ptx in every for arch in architectures]
        try:
            for job in jobs:
                for line in job.result():
                    lines[key_of(line)] = lines.get(key_of(line), {}) | line
        finally:
            pool.shutdown(cancel_futures=True)
    return [lines[key] for key in sorted(lines)]


def key_of(line: Line) -> tuple[str, ...]:
    """What a line is of."""
    return line["source"], line["kernel"], line["dtype"]


def release(home: Path) -> str:
    """Of nvcc: "13.0"."""
    return first(r"release (\S+),", run(home / "bin" / "nvcc", "--version").stdout)


def write(path: Path, lines: list[Line], home: Path) -> None:
    """A comment with what the table was made from, then CSV."""
    made = " ".join(f"{name}={value}" for name, value in digests().items())
    tool = "SASS" if nvdisasm(home) else "PTX"
    with path.open("w", newline="") as file:
        file.write(f"# sources {made}, nvcc {release(home)}, widths from {tool}\n")
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def read(path: Path = TABLE) -> tuple[dict[str, str], list[Line]]:
    """The digests of the sources that a table was made from, and its lines."""
    comment, *rest = path.read_text().splitlines()
    made = dict(re.findall(r"(\w+)=(\w+)", comment))
    return made, list(csv.DictReader(rest))


def kept(path: Path, architectures: list[str], home: Path) -> list[Line]:
    """The lines of a table that are still right: of sources that have not changed, by this nvcc."""
    if not path.exists() or f"nvcc {release(home)}, " not in path.read_text().partition("\n")[0]:
        return []
    made, lines = read(path)
    if {c.split()[1] for c in lines[0] if c.startswith("spills ")} != set(architectures):
        return []
    return [line for line in lines if made.get(line["source"]) == digests().get(line["source"])]


# ---------------------------------------------------------------------------------------------- what is wrong

# The packs that each pass of a kernel's vector loop loads and stores at the least: one for every buffer that it needs.
PACKS = {
    "elementwise_kernel": (1, 1),
    "chunk_kernel": (1, 0),
    "strided_kernel": (1, 1),
    "summed_kernel": (1, 2),  # the sums as well
    "softmax_kernel": (1, 1),
    "softmax_backward_kernel": (2, 1),
    "cross_entropy_kernel": (1, 1),
    "probability_kernel": (2, 1),
    "step_kernel": (2, 1),
    "sums_kernel": (1, 0),
}
# More loads than that, by what the elementwise loop, or the sum over it, is made for.
INPUTS = {
    r"\bBackward<": 2,
    r"\bGateForward<": 2,
    r"\bGateBackward<": 3,
    r"\bGateTangent<": 4,
    r"\bGateSecond<": 5,
    r"\bFusedForward<": 2,
    r"\bFusedBackward<": 3,
    r"\bFusedSummed<": 2,  # the row is read in packs of its own, once
    r"\bValue<": 2,
    r"\bValue<BCEWithLogitsPosWeight>": 3,
    r"\bForward<BiasDropoutAdd>": 3,
}
# What is computed in float64 for every dtype: the numbers of a step, and sums.
IN_DOUBLE = {"derive_kernel", "sums_kernel", "clip_kernel"}
# Single values, or columns, whose neighbours in memory belong to neighbouring threads.
SINGLE = {
    "join_kernel",
    "divisor_kernel",
    "join_divisor_kernel",
    "derive_kernel",
    "clip_kernel",
    "softmax_columns_kernel",
    "softmax_columns_backward_kernel",
    "cross_entropy_columns_kernel",
    "probability_columns_kernel",
}


def wide(counts: str) -> int:
    """How many accesses are of 16 bytes or more."""
    pairs = (entry.split(":") for entry in counts.split())
    return sum(int(count) for width, count in pairs if int(width) >= 16)


STATES = {
    "SGD<false>": 0,
    "SGD<true>": 1,
    "Adam<false>": 2,
    "Adam<true>": 3,
    "RMSprop<false, false>": 1,
    "RMSprop<true, false>": 2,
    "RMSprop<false, true>": 2,
    "RMSprop<true, true>": 3,
    "Adagrad": 1,
    "Adadelta": 2,
    "Adamax": 2,
    "NAdam": 2,
    "RAdam": 2,
    "Rprop": 2,
    "ASGD": 1,
}


def stored_twice(line: Line) -> int:
    """Of a kernel of an optimizer's step, the stores that stand in its code twice: of bfloat16, where it may round
    stochastically or not, as it is told."""
    op, extended = re.fullmatch(r"step_kernel<(.+), (true|false)>", line["kernel"]).groups()
    _, parameter, state = line["dtype"].split("/")
    if extended == "false":
        return 0
    return (parameter == "bfloat16") + STATES[op] * (state == "bfloat16")


#: Spills that are accepted: (kernel, dtype, architecture) by their beginnings, bytes. Four registers of a row's bookkeeping,
#: stored and read once a row, are what a second block of 512 threads on an SM costs there; one block less would halve the
#: bytes in flight.
ACCEPTED_SPILLS = {("cross_entropy_kernel<CrossEntropy,", "float16", "120"): 16, ("cross_entropy_kernel<CrossEntropy,", "bfloat16", "120"): 16}  # fmt: skip


def spills_too_much(line: Line, arch: str) -> bool:
    accepted = (n for (kernel, dtype, a), n in ACCEPTED_SPILLS.items() if line["kernel"].startswith(kernel) and line["dtype"] == dtype and a == arch)  # fmt: skip
    return int(line[f"spills {arch}"]) > max(accepted, default=0)


def complaints(lines: list[Line]) -> list[str]:
    """Spills, vector loops whose accesses are not 16 bytes wide, and float64 in kernels of other dtypes."""
    found = []
    for line in lines:
        kernel = line["kernel"].partition("<")[0]
        name = f"{line['kernel']} {line['dtype']}"
        if kernel not in PACKS and kernel not in SINGLE:
            found.append(f"{name}: say in tools/cuda_report.py how many packs it loads and stores")
            continue
        sources = ("elementwise", "dropout", "optimizer")
        if line["source"] in sources and kernel not in IN_DOUBLE and "float64" not in line["dtype"]:
            if int(line["float64"]):
                found.append(f"{name}: float64 instructions")
        loads, stores = PACKS.get(kernel, (0, 0))
        loads = max([loads, *(n for made_for, n in INPUTS.items() if re.search(made_for, name))])
        if "summed_kernel" in name and ", 1>" in name:  # which goes down one column
            loads = stores = 0
        for arch in (column.split()[1] for column in line if column.startswith("spills ")):
            if spills_too_much(line, arch):
                found.append(f"{name}: spills {line[f'spills {arch}']} bytes on sm_{arch}")
            # cross_entropy calls what reports a target out of range
            if int(line[f"stack {arch}"]) and line["source"] != "cross_entropy":
                found.append(f"{name}: {line[f'stack {arch}']} bytes of local memory on sm_{arch}")
            has = wide(line[f"loads {arch}"]), wide(line[f"stores {arch}"])
            if has[0] < loads or has[1] < stores:
                found.append(
                    f"{name}: {has} of {(loads, stores)} wide loads and stores on sm_{arch}"
                )
            # All that is stored is loaded, and g.
            if kernel == "step_kernel" and has[0] <= has[1] - stored_twice(line):
                found.append(f"{name}: {has} wide loads and stores on sm_{arch}")
    return found


def main() -> int:
    """Writes the table; 1 where there is something to complain of."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--output", type=Path, default=TABLE)
    parser.add_argument("--all", action="store_true", help="also what has not changed since")
    options = parser.parse_args()
    home = cuda_home()
    if home is None:
        sys.exit(
            "no CUDA toolkit: bin/nvcc and include/cuda_runtime.h under CUDA_HOME, or nvcc on PATH"
        )
    old = [] if options.all else kept(options.output, options.arch, home)
    stale = {source.stem for source in sources()} - {line["source"] for line in old}
    lines = sorted([*old, *make(options.arch, home, stale)], key=key_of)
    write(options.output, lines, home)
    _, lines = read(options.output)
    found = complaints(lines)
    print("\n".join([*found, f"{len(lines)} kernels, {len(found)} complaints: {options.output}"]))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
