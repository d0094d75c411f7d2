"""python -m fastops doctor: what is installed, what it can use, and whether it computes what torch computes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from ._core import loader

__all__ = ["Finding", "Section", "examine", "main"]

GOOD, NOTE, WRONG = "ok", "note", "wrong"
MARKS = {GOOD: ("+", "green"), NOTE: ("!", "yellow"), WRONG: ("x", "bold red")}
EXTRAS = {
    "finetune": ("torchvision", "tqdm", "matplotlib", "PIL", "numpy"),
    "integrations": ("transformers", "accelerate", "timm", "lightning", "keras"),
}
SETTINGS = ("ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Finding:
    """One line: `state` is ok, note (works, but know this) or wrong."""

    name: str
    text: str
    state: str = GOOD


@dataclass
class Section:
    """Findings under a title."""

    title: str
    findings: list[Finding] = field(default_factory=list)

    def add(self, name: str, text: str, state: str = GOOD) -> None:
        self.findings.append(Finding(name, text, state))


def versions(version: str) -> Section:
    """fastops, Python, the system, the processor, and what is set in the environment."""
    section = Section("Versions")
    section.add("fastops", f"{version} in {loader.FOLDER}")
    try:
        recorded = importlib.metadata.version("torch-fastops")
        if recorded != version:
            section.add(
                "distribution",
                f"torch-fastops {recorded} is installed, but the code that runs is {version}: another "
                "folder stands before it on sys.path",
                NOTE,
            )
    except importlib.metadata.PackageNotFoundError:
        section.add("distribution", "not installed by pip: a source tree built in place")
    section.add("Python", f"{platform.python_version()} ({sys.executable})")
    section.add("system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    for extra, packages in EXTRAS.items():
        there = [p for p in packages if find_spec(p) is not None]
        absent = [p for p in packages if p not in there]
        text = f"{', '.join(there) or 'none'} found" + (
            f"; {', '.join(absent)} not: pip install torch-fastops[{extra}]" if absent else ""
        )
        section.add(f"[{extra}]", text)
    for name in sorted({*SETTINGS, *(n for n in os.environ if n.startswith("FASTOPS_"))}):
        if name in os.environ:
            section.add(name, repr(os.environ[name]), NOTE)
    return section


def extension(error: ImportError | None) -> Section:
    """The compiled part: the torch it was built for, and whether it loads under the one that runs."""
    section = Section("Extension")
    section.add("torch", torch.__version__)
    if error is not None:
        section.add("fastops._C", str(error), WRONG)
        return section
    from . import _C

    built = _C.torch_version()
    section.add("file", str(_C.__file__))
    if built == torch.__version__:
        section.add("built for", f"torch {built}")
    else:
        text = f"torch {built}; it loads under {torch.__version__}, and one built for that is safer"
        section.add("built for", text, NOTE)
    return section


def available_capabilities() -> list[str]:
    """The instruction sets, of those that the kernels are compiled for, that this processor has."""
    found = ["DEFAULT"]
    if platform.machine() in ("x86_64", "AMD64"):
        found += ["AVX2"] * torch.cpu._is_avx2_supported()
        found += ["AVX512"] * torch.cpu._is_avx512_supported()
    return found


def cpu() -> Section:
    """The instruction set chosen and those available, threads."""
    from . import _C

    section = Section("CPU")
    section.add("processor", processor())
    chosen, available = _C.cpu_capability(), available_capabilities()
    text = f"{chosen}; this processor has {', '.join(available)}"
    if chosen == available[-1]:
        section.add("kernels", text)
    else:
        why = "ATEN_CPU_CAPABILITY says so" if "ATEN_CPU_CAPABILITY" in os.environ else "torch does"
        section.add("kernels", f"{text} (the lower one is taken because {why})", NOTE)
    section.add("threads", f"{torch.get_num_threads()} of {os.cpu_count()} logical processors")
    return section


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def covers(architectures: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether code for `architectures` ("sm_80", "compute_120") runs on a GPU of a compute capability: machine code does
    within its major version, PTX on all that came later."""
    major, minor = capability
    for kind, _, number in (a.partition("_") for a in architectures):
        its_major, its_minor = divmod(int(number), 10)
        if kind == "sm" and its_major == major and its_minor <= minor:
            return True
        if kind == "compute" and (its_major, its_minor) <= capability:
            return True
    return False


def cuda() -> Section:
    """Whether the CUDA kernels are built, for which GPUs, and which are visible."""
    from . import _C

    section = Section("CUDA")
    built = _C.cuda_built()
    file = loader.path()
    architectures = loader.cuda_architectures(file) if built and file else []
    section.add("torch's CUDA", torch.version.cuda or "none: this torch is a CPU build")
    section.add("kernels", f"built for {', '.join(architectures)}" if built else "not built")
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not visible:
        section.add("GPU", "none visible")
    for index in range(visible):
        capability = torch.cuda.get_device_capability(index)
        text = f"{torch.cuda.get_device_name(index)}, compute capability {'.'.join(map(str, capability))}"
        if not built:
            section.add(f"GPU {index}", f"{text}: not used, see kernels", NOTE)
        elif covers(architectures, capability):
            section.add(f"GPU {index}", text)
        else:
            arch = f"{capability[0]}.{capability[1]}"
            text += f": no kernel runs there; build with TORCH_CUDA_ARCH_LIST={arch}"
            section.add(f"GPU {index}", text, WRONG)
    return section


def pool() -> Section:
    """The pool that large CPU results come from."""
    from . import memory

    section = Section("Pool")
    state = memory.pool_info()
    if not state["enabled"]:
        section.add("pool", "off: fastops.memory.enable() switches it on", NOTE)
        return section
    used, idle, limit = (f"{state[key] >> 20} MiB" for key in ("in_use", "cached", "limit"))
    section.add("pool", f"on; {used} in use, {idle} idle of {limit} that may be")
    whose = "all CPU tensors" if state["serves_torch"] else "results of fastops"
    section.add("serves", f"{whose} of 128 KiB and more")
    section.add("served", f"{state['hits']} from idle memory, {state['misses']} from the system")
    return section


def self_check() -> Section:
    """Every op and optimizer beside torch, on the CPU and, where the kernels can run there, on the GPU."""
    from . import _C, selfcheck
    from ._core.by_torch import DISABLED, DISABLED_REASON

    section = Section("Self-check")
    if DISABLED:
        section.add("kernels", f"not checked: {DISABLED_REASON}, and all is torch's own", NOTE)
        return section
    devices = ["cpu"] + ["cuda"] * (_C.cuda_built() and torch.cuda.is_available())
    parts: dict[str, Callable[[str], Iterator[selfcheck.Check]]] = {
        "ops": selfcheck.check_ops,
        "optimizers": selfcheck.check_optimizers,
    }
    for device in devices:
        for part, run in parts.items():
            start = time.perf_counter()
            checks = list(run(device))
            bad = [check for check in checks if check.problem]
            names = len({check.name for check in checks})
            text = f"{len(checks) - len(bad)} of {len(checks)} checks of {names} {part} agree with torch"
            text += f" ({time.perf_counter() - start:.1f} s)"
            section.add(f"{part}, {device}", text, WRONG if bad or not checks else GOOD)
            for check in bad:
                dtype = str(check.dtype).removeprefix("torch.")
                section.add(check.name, f"{dtype} on {device}: {check.problem}", WRONG)
    return section


def examine(error: ImportError | None = None) -> Iterator[Section]:
    """The sections of the report, one by one as they are known. `error`: why the extension does not load, if so."""
    yield versions(_version())
    yield extension(error)
    if error is not None:
        return
    for part in (cpu, cuda, pool, self_check):
        yield part()


def _version() -> str:
    from . import __version__

    return __version__


def show_plain(section: Section) -> None:
    """Prints a section as text."""
    print(f"\n{section.title}")
    width = max(len(finding.name) for finding in section.findings)
    for finding in section.findings:
        print(f"  {MARKS[finding.state][0]} {finding.name:<{width}}  {finding.text}", flush=True)


def show_rich(section: Section) -> None:
    """Prints a section by rich: names in a column, texts folded beside them."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 1, 0, 1), pad_edge=True)
    table.add_column(width=1)
    table.add_column(no_wrap=True, min_width=14)
    table.add_column(overflow="fold")
    for finding in section.findings:
        mark, style = MARKS[finding.state]
        plain = finding.state == GOOD
        table.add_row(
            Text(mark, style),
            Text(finding.name, "dim" if plain else style),
            Text(finding.text, "" if plain else style),
        )
    console = Console()
    console.print(Text(f"\n{section.title}", "bold"))
    console.print(table)


def main(error: ImportError | None = None) -> int:
    """Prints the report and its verdict; returns the exit code: 0 all is well, 1 something is wrong."""
    show = show_rich if find_spec("rich") is not None and sys.stdout.isatty() else show_plain
    findings = []
    for section in examine(error):
        show(section)
        findings += section.findings
    wrong = [finding for finding in findings if finding.state == WRONG]
    if wrong:
        print(f"\nVerdict: {len(wrong)} wrong: {', '.join(finding.name for finding in wrong)}")
        return 1
    notes = sum(finding.state == NOTE for finding in findings)
    print("\nVerdict: all is well" + (f"; {notes} to note, marked !" if notes else ""))
    return 0
