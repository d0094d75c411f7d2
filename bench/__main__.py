"""The command: python -m bench [--filter TEXT] [--quick] [--device cpu|cuda] [--json FILE] ...

`python -m bench steps` is another: whole training steps (bench/steps).
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

try:
    import fastops
except ImportError as error:
    print(f"python -m bench: error: {error} (`make build` builds it here)", file=sys.stderr)
    sys.exit(2)

from fastops._core.registry import OPS

from .calls import Skipped, contenders, first_line
from .cases import BOTH, QUICK_BYTES, STEP, Case, all_cases
from .devices import why_not
from .models import MODEL, model_cases
from .report import LEGEND, Row, environment, print_summary, print_tables, write_json
from .timing import make_copy, measure
from .verify import Wrong, verify

FULL_SECONDS, QUICK_SECONDS = 1.5, 0.25


class UsageError(Exception):
    """Arguments that make no sense, said in one line."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = Parser(
        prog="python -m bench",
        description="Verify every op of fastops against torch, then time the two side by side.",
        epilog="`steps` as the first argument times whole training steps instead; exit code: 0 all right, 1 a row is wrong, "
        "2 bad arguments",
    )
    parser.add_argument(
        "--filter",
        metavar="TEXT",
        default="",
        help="only rows with TEXT at the start of a word, as --list prints them",
    )
    parser.add_argument("--list", action="store_true", help="print the rows' names and stop")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"small cases, {QUICK_SECONDS} s a row, torch.compile only if asked for",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--compile",
        choices=("some", "all", "none"),
        nargs="?",
        const="all",
        help="which rows torch.compile is timed in as well (default: some; each takes seconds)",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write JSON lines as well")
    parser.add_argument(
        "--report",
        metavar="FOLDER",
        type=Path,
        help="write bench.jsonl, charts as PNG and index.html there (needs matplotlib)",
    )
    parser.add_argument(
        "--time", metavar="SECONDS", type=float, help=f"a row (default: {FULL_SECONDS})"
    )
    parser.add_argument("--threads", metavar="N", type=int, help="CPU threads (default: torch's)")
    return parser


def check(options: argparse.Namespace) -> None:
    """Refuses what cannot work before anything is measured.

    Raises:
        UsageError: what was given, and what to give instead.
    """
    if options.time is not None and not (options.time > 0 and math.isfinite(options.time)):
        raise UsageError(f"--time {options.time}: give seconds above 0")
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"--threads {options.threads}: give 1 or more")
    if options.json is not None:
        folder = options.json.resolve().parent
        if options.json.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UsageError(f"--json {options.json}: no file can be written there")
    if options.report is not None:
        if options.report.exists() and not options.report.is_dir():
            raise UsageError(f"--report {options.report}: it is a file, not a folder")
        if importlib.util.find_spec("matplotlib") is None:
            raise UsageError("--report draws with matplotlib: pip install matplotlib")
        try:
            options.report.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--report {options.report}: {error.strerror}") from error
        if not os.access(options.report, os.W_OK):
            raise UsageError(f"--report {options.report}: nothing can be written there")
    if reason := why_not(options.device):
        raise UsageError(f"--device {options.device}: {reason}")


def select(options: argparse.Namespace) -> list[Case]:
    """The cases that the options ask for.

    Raises:
        UsageError: there are none.
    """
    cases = [*all_cases(OPS), *model_cases()]
    # At the start of a word: `relu 16` is not in `leaky_relu 16`.
    wanted = re.compile(r"(?<!\w)" + re.escape(options.filter), re.IGNORECASE)
    chosen = [c for c in cases if wanted.search(c.label)]
    if not chosen:
        raise UsageError(f"--filter {options.filter!r}: no row has it, see --list")
    if options.quick:
        chosen = [c for c in chosen if c.floor <= QUICK_BYTES]
        if not chosen:
            raise UsageError(f"--filter {options.filter!r}: --quick leaves these rows out")
    return chosen


def run_case(case: Case, device: str, budget: float, which: str) -> Row:
    """Verifies a case and, if it is right, times it."""
    with_compile = case.kind not in (STEP, MODEL) and (
        which == "all" or (which == "some" and case.compiled)
    )
    try:
        verify(case, device)
        made = contenders(case, device, with_compile)
        with torch.set_grad_enabled(case.mode == BOTH):
            result = measure(made, make_copy(case.floor, device), budget, device)
        return Row(case, "ok", made.notes, result)
    except Wrong as error:
        return Row(case, "WRONG", [str(error)])
    except Skipped as error:
        return Row(case, "skipped", [str(error)])
    except Exception as error:
        return Row(case, "ERROR", [first_line(error)])
    finally:
        fastops.memory.trim()


def run(options: argparse.Namespace) -> int:
    """Does what the options ask for; returns the exit code."""
    check(options)
    cases = select(options)
    if options.list:
        print("\n".join(case.label for case in cases))
        return 0
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    header = environment(options.device)
    width = max(map(len, header))
    print("\n".join(f"{key:<{width}}  {value}" for key, value in header.items()), flush=True)
    budget = options.time or (QUICK_SECONDS if options.quick else FULL_SECONDS)
    which = options.compile or ("none" if options.quick else "some")
    rows = []
    end = "\r" if sys.stderr.isatty() else "\n"
    for at, case in enumerate(cases, 1):
        print(f"[{at}/{len(cases)}] {case.label:<60}", end=end, file=sys.stderr, flush=True)
        rows.append(run_case(case, options.device, budget, which))
        if options.json is not None:  # as they come: a run that is ended leaves what it has
            write_json(options.json, header, rows)
    print_tables(rows)
    print(f"\n{LEGEND}")
    print_summary(rows)
    if options.report is not None:
        from .page import write_page  # matplotlib takes a while to import

        write_json(options.report / "bench.jsonl", header, rows)
        print(f"\n{write_page(options.report, header, [row.as_json() for row in rows])}")
    return int(any(row.status in ("WRONG", "ERROR") for row in rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    0: every row is right, though some may be slow. 1: a row is wrong. 2: bad arguments. 130: Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["steps"]:
            from .steps import command  # its imports are no business of the other command

            return command.main(arguments[1:])
        return run(make_parser().parse_args(arguments))
    except UsageError as error:
        print(f"python -m bench: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
