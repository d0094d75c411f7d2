"""What a run leaves behind: the header, the tables, the list of rows below 1, and JSON lines. Measures nothing."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median

import torch

import fastops
from fastops.doctor import processor

from .cases import Case
from .timing import Measurement, quartiles

MODES = {"forward": "fwd", "forward+backward": "fwd+bwd", "step": "step"}
TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}
LEGEND = """\
ratio    torch's time / ours, in pairs run one after the other: the median against the fastest torch that
         ran, and its quartiles. Slower ones got fewer pairs.
GB/s     the bytes that must move at the least, over our median time
of copy  that over the speed of torch's copy_ into a ready buffer, measured in between, with as many bytes"""


@dataclass
class Row:
    """A case and what came of it: `status` is ok, WRONG, ERROR or skipped; only ok has a measurement."""

    case: Case
    status: str
    notes: list[str] = field(default_factory=list)
    measurement: Measurement | None = None

    @property
    def ratio(self) -> float | None:
        """The median ratio to the fastest torch."""
        m = self.measurement
        return median(m.ratios[m.best]) if m else None

    def as_json(self) -> dict:
        """The row as plain data; times in seconds a call, each as first quartile, median and third."""
        case, m = self.case, self.measurement
        data = {
            "op": case.op,
            "variant": case.variant,
            "kind": case.kind,
            "size": case.size,
            "dtype": str(case.dtype).removeprefix("torch."),
            "mode": case.mode,
            "arguments": dict(case.arguments),
            "bytes": case.floor,
            "status": self.status,
            "notes": self.notes,
        }
        if m:
            data |= {
                "fastops": quartiles(m.ours),
                "torch": {n: quartiles(t) for n, t in m.theirs.items() if n not in m.peers},
                "peers": {n: quartiles(t) for n, t in m.theirs.items() if n in m.peers},
                "ratios": {name: quartiles(ratios) for name, ratios in m.ratios.items()},
                "pairs": {name: len(ratios) for name, ratios in m.ratios.items()},
                "best": m.best,
                "ratio": self.ratio,
                "bytes_per_second": case.floor / median(m.ours),
                "of_copy": median(m.copy) / median(m.ours),
            }
        return data


def commit() -> str:
    """The commit that is measured, and whether files differ from it; "unknown" outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = [
            subprocess.run([*git, *rest], capture_output=True, text=True, check=True).stdout.strip()
            for rest in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found[0] + (" with changes" if found[1] else "")


def environment(device: str) -> dict[str, str]:
    """What the numbers depend on."""
    pool = fastops.memory.pool_info()
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    busy = ": something else is running, do not trust the numbers" if load > cores / 2 else ""
    found = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "CPU": f"{processor()}, {cores} cores, {torch.get_num_threads()} threads",
        "instruction set": f"fastops {fastops._C.cpu_capability()}, "
        f"torch {torch.backends.cpu.get_cpu_capability()}",
        "versions": f"fastops {fastops.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "commit": commit(),
        "pool": f"on, limit {pool['limit'] >> 20} MiB" if pool["enabled"] else "off",
        "load before": f"{load:.1f} on {cores} cores{busy}",
    }
    if device == "cuda":
        found["GPU"] = torch.cuda.get_device_name()
    return found


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    size, unit = next(
        (u for u in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")) if seconds >= u[0]), (1e-9, "ns")
    )
    return f"{short(seconds / size)} {unit}"


def short(value: float) -> str:
    """A ratio or speed in about three digits."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def cells(row: Row, baselines: Iterable[str]) -> list[str]:
    """The row's text, column by column."""
    case, m = row.case, row.measurement
    left = [case.name, case.size, TYPES[case.dtype], MODES[case.mode]]
    if m is None:
        empty = [""] * (len(list(baselines)) + 5)
        return [*left, *empty, f"{row.status}: {'; '.join(row.notes)}"]
    low, middle, high = quartiles(m.ratios[m.best])
    seconds = median(m.ours)
    return [
        *left,
        *(duration(median(m.theirs[b])) if b in m.theirs else "" for b in baselines),
        duration(seconds),
        short(middle),
        f"{short(low)}-{short(high)}",
        short(row.case.floor / seconds / 1e9),
        f"{median(m.copy) / seconds:.0%}",
        "; ".join(row.notes),
    ]


def tables(rows: list[Row]) -> list[tuple[list[str], list[list[str]]]]:
    """Heads and cells of one table for the functions and one for the optimizers, which have other baselines."""
    made = []
    for steps, fallback in ((False, ["eager"]), (True, ["for-loop", "foreach", "fused"])):
        part = [row for row in rows if (row.case.mode == "step") == steps]
        if not part:
            continue
        seen = {name: None for row in part if row.measurement for name in row.measurement.theirs}
        baselines = list(seen) or fallback
        head = ["optimizer" if steps else "op", "size", "type", "pass", *baselines]
        head += ["fastops", "ratio", "quartiles", "GB/s", "of copy", "note"]
        body = [cells(row, baselines) for row in part]
        if not any(line[-1] for line in body):
            head, body = head[:-1], [line[:-1] for line in body]
        made.append((head, body))
    return made


def print_tables(rows: list[Row]) -> None:
    """Prints the tables with rich if it is there, else as plain text."""
    for head, body in tables(rows):
        try:
            print_rich(head, body)
        except ImportError:
            print_plain(head, body)


def print_rich(head: list[str], body: list[list[str]]) -> None:
    """One table by rich, with WRONG and ratios below 1 in red."""
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement as Extent
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for at, name in enumerate(head):
        note = name == "note"
        table.add_column(
            name,
            justify="left" if at < 4 or note else "right",
            no_wrap=not note,
            min_width=9 * note,
        )
    ratio = head.index("ratio")
    for line in body:
        slow = line[ratio] and float(line[ratio]) < 1
        bad = slow or line[-1].startswith(("WRONG", "ERROR"))
        table.add_row(*(Text(cell) for cell in line), style="red" if bad else "")
    console = Console()
    # Into a file rich would assume 80 columns and cut the numbers off.
    unbounded = console.options.update(max_width=1000)
    console.width = max(console.width, Extent.get(console, unbounded, table).maximum)
    console.print(table)


def print_plain(head: list[str], body: list[list[str]]) -> None:
    """One table in columns of their contents' widths; the note is last and may be of any length."""
    columns = [c for c in zip(head, *body, strict=True) if c[0] != "note"]
    widths = [max(map(len, column)) for column in columns]
    print()
    for line in (head, *body):
        text = [
            cell.ljust(width) if at < 4 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=False))
        ]
        print("  ".join([*text, *line[len(widths) :]]).rstrip())
        if line is head:
            print("  ".join("-" * width for width in widths))


def print_summary(rows: list[Row]) -> None:
    """The rows below 1, those that are wrong, and how many of each there are."""
    wrong = [row for row in rows if row.status in ("WRONG", "ERROR")]
    slow = sorted((row for row in rows if row.ratio and row.ratio < 1), key=lambda row: row.ratio)
    timed = sum(row.measurement is not None for row in rows)
    print(f"\n{timed} of {len(rows)} rows timed, {len(slow)} below 1.0, {len(wrong)} wrong")
    for row in slow:
        print(f"  {row.ratio:.3f}  {row.case.label}  (against {row.measurement.best})")
    for row in wrong:
        print(f"  {row.status}  {row.case.label}: {'; '.join(row.notes)}")


def write_json(path: Path, header: dict[str, str], rows: list[Row]) -> None:
    """One JSON object a line, the environment first. The file appears whole or not at all."""
    lines = [{"environment": header}, *(row.as_json() for row in rows)]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file under a temporary name and renames it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
