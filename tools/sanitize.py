"""Runs every kernel of csrc/cuda on the emulator under the compiler's sanitizers: `make sanitize`.

AddressSanitizer with UndefinedBehaviorSanitizer, ThreadSanitizer, and the portable fibers (ucontext) that the emulator
has where it knows no processor's registers. Every dtype; sizes and layouts are those of tests/emulation/every_kernel.cpp.
One compiler at a time; ends with 1 where anything is reported.
"""

import argparse
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("MAX_JOBS", "1")

from emulation.build import every_kernel, run  # noqa: E402

VARIANTS = {
    "asan": "AddressSanitizer and UndefinedBehaviorSanitizer",
    "tsan": "ThreadSanitizer",
    "ucontext": "portable fibers",
}


def main() -> int:
    """A line for each variant, and what was reported."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    failed = False
    for variant in parser.parse_args().variant:
        program = every_kernel(variant)
        start = time.perf_counter()
        status, output = run(program, "4", timeout=1800)
        found = status != 0 or output != "nothing found\n"
        failed |= found
        verdict = output.rstrip() if found else "nothing found"
        print(f"{VARIANTS[variant]} ({time.perf_counter() - start:.0f} s): {verdict}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
