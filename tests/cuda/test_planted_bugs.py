"""Every kind of bug that the CUDA emulator is there for, planted in a small kernel: each must be reported, and the same
kernel without it must not. See tests/emulation/planted_bugs.cpp for the kernels."""

import re

import pytest
from emulation.build import ROOT, VARIANTS, build, run

pytestmark = pytest.mark.slow

ORDER = "^the result depends on the order of threads"
RACE = "ThreadSanitizer: data race"
NAN = "^NaN in the result"
FAULT = "invalid access at .*: block .* thread"
ASAN = "AddressSanitizer"
TSAN = "ThreadSanitizer: (SEGV|stack-overflow) on"  # the latter where the page is near a stack
CONFIGURATION = "bad launch configuration: "

# bug -> {build: what it reports}. "*" stands for every build that is not named.
BUGS = {
    "missing_syncthreads": {"tsan": RACE, "plain": NAN, "ucontext": NAN, "asan": NAN},
    "missing_second_syncthreads": {"tsan": RACE},
    "missing_syncwarp": {"tsan": RACE, "plain": NAN, "ucontext": NAN, "asan": NAN},
    "wrong_scope": {"tsan": RACE, "plain": NAN, "ucontext": NAN, "asan": NAN},
    "last_writer_wins": {"tsan": RACE, "plain": ORDER, "ucontext": ORDER, "asan": ORDER},
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
    "raw_load_past_end": {"plain": FAULT, "ucontext": FAULT, "asan": ASAN, "tsan": TSAN},
    "raw_load_before_start": {"plain": FAULT, "ucontext": FAULT, "asan": ASAN, "tsan": TSAN},
    "raw_store_past_end": {"plain": FAULT, "ucontext": FAULT, "asan": ASAN, "tsan": TSAN},
    "store_beside": {
        "plain": "memory beside a buffer was overwritten",
        "ucontext": "memory beside a buffer was overwritten",
        "asan": ASAN,
    },
    "tail_left_out": {"*": NAN},
    "uninitialised_global": {"*": NAN},
    "store_to_input": {"*": "store of 4 bytes to a constant buffer: block .* thread .36,0,0"},
    "raw_store_to_input": {"plain": FAULT, "ucontext": FAULT, "asan": ASAN, "tsan": TSAN},
    "index_overflow": {"asan": "signed integer overflow: 32 . 67108864"},
    "too_much_shared": {"*": "more than 48 KB of static shared memory"},
    "misaligned_pack": {"*": "misaligned load of 16 bytes"},
    "raw_misaligned_pack": {"asan": "misaligned address .* for type 'const struct Pack'"},
    "shared_past_end": {
        "plain": FAULT,
        "ucontext": FAULT,
        "asan": "index 64 out of bounds",
        "tsan": TSAN,
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
