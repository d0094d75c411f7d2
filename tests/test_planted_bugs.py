"""Every kind of bug that the CUDA emulator is there for, planted in a small kernel: each must be reported, and the same
kernel without it must not. See tests/emulation/planted_bugs.cpp for the kernels."""

import re

import pytest
from emulation.build import ROOT, VARIANTS, build, run

RACE = "ThreadSanitizer: data race"
NAN = "^NaN in the result"
FAULT = "invalid access at .*: block .* thread"
ASAN = "AddressSanitizer"
CONFIGURATION = "bad launch configuration: "

# bug -> {build: what it reports}. "*" stands for every build that is not named.
BUGS = {
    "missing_syncthreads": {"tsan": RACE, "plain": NAN, "ucontext": NAN, "asan": NAN},
    "missing_second_syncthreads": {"tsan": RACE},
    "missing_syncwarp": {"tsan": RACE, "plain": NAN, "ucontext": NAN, "asan": NAN},
    "shuffle_as_barrier": {"tsan": RACE},
    "cross_block_race": {"tsan": RACE},
    "missing_atomic": {"tsan": RACE},
    "divergent_barrier": {"*": "divergent barrier: block .* thread .* is at .*planted_bugs.cpp:"},
    "barrier_after_return": {"*": "__syncthreads is waited at but .* returned"},
    "deadlock": {"*": "deadlock: block .* waits at a warp operation"},
    "mask_without_caller": {"*": "mask 0000ffff, which lacks its caller, block .* thread .16,0,0"},
    "mask_with_returned_lane": {"*": "mask ffffffff names lane 16, which has returned"},
    "mask_beyond_block": {"*": "mask ffffffff names lane 16, which the block does not have"},
    "shuffle_from_outside": {"*": "shuffles from lane 16, which is not in its mask 0000ffff"},
    "different_operations": {"*": "lanes of one warp meet in different operations"},
    "load_past_end": {"*": "out-of-bounds load of 4 bytes, 4 bytes after a buffer of 148"},
    "store_past_end": {"*": "out-of-bounds store of 4 bytes, 4 bytes after a buffer of 148"},
    "pack_over_tail": {"*": "out-of-bounds load of 16 bytes, 12 bytes after a buffer of 148"},
    "raw_load_past_end": {"plain": FAULT, "ucontext": FAULT, "asan": ASAN, "tsan": "SEGV"},
    "raw_load_before_start": {"plain": FAULT, "ucontext": FAULT, "asan": ASAN, "tsan": "SEGV"},
    "raw_store_past_end": {"plain": FAULT, "ucontext": FAULT, "asan": ASAN, "tsan": "SEGV"},
    "store_beside": {
        "plain": "memory beside a buffer was overwritten",
        "ucontext": "memory beside a buffer was overwritten",
        "asan": ASAN,
    },
    "misaligned_pack": {"*": "misaligned load of 16 bytes"},
    "raw_misaligned_pack": {"asan": "misaligned address .* for type 'const struct Pack'"},
    "shared_past_end": {
        "plain": FAULT,
        "ucontext": FAULT,
        "asan": "index 64 out of bounds",
        "tsan": "SEGV",
    },
    "uninitialised_shared": {"*": NAN},
    "too_many_threads": {"*": CONFIGURATION + "more than 1024 threads"},
    "empty_grid": {"*": CONFIGURATION + "an empty grid"},
    "too_many_parameters": {"*": CONFIGURATION + "more than 32764 bytes"},
}
CASES = [
    (bug, variant, reports.get(variant, reports.get("*")))
    for bug, reports in BUGS.items()
    for variant in VARIANTS
]


def case_id(value):
    return value if value in BUGS or value in VARIANTS else ""


@pytest.fixture(scope="module")
def program():
    source = ROOT / "tests" / "emulation" / "planted_bugs.cpp"
    return {variant: build("planted_bugs", [source], variant) for variant in VARIANTS}


@pytest.mark.parametrize("bug, variant, report", [c for c in CASES if c[2]], ids=case_id)
def test_bug_is_reported(program, bug, variant, report):
    status, output = run(program[variant], bug, "planted")
    assert re.search(report, output, re.MULTILINE), output
    assert status != 0


@pytest.mark.parametrize("bug, variant, report", CASES, ids=case_id)
def test_nothing_is_reported_without_it(program, bug, variant, report):
    assert run(program[variant], bug, "clean") == (0, "nothing found\n")


def test_every_bug_has_a_kernel(program):
    """A name that planted_bugs.cpp does not know would be "clean" for the wrong reason."""
    status, output = run(program["plain"], "no_such_bug", "planted")
    assert (status, output) == (64, "no such bug\n")
