"""The three instruction sets of the CPU kernels: the suite's kernel tests pass on each, dropout's mask is the same to
the bit, and no object holds code that the linker could use in place of another's."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulation.build import made_by_setup
from instruction_sets import ISAS, available, need

import fastops

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.mark.parametrize("isa", ISAS)
def test_kernel_tests_pass(isa):
    need(isa)
    if isa.upper() == fastops._C.cpu_capability():
        return  # the process that runs this is that instruction set already
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider",
         str(HERE / "test_values.py"), str(HERE / "test_random.py"), "-k", "not compile and not threads"],
        env={**os.environ, "ATEN_CPU_CAPABILITY": isa}, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) > 100, result.stdout[-500:]


SCRIPT = """
import json, torch, fastops
d = torch.ops.fastops.dropout.default
s = torch.tensor(1234567890123456789)
masks = [d(torch.ones(997, dtype=t), p, s).ne(0).tolist() for t in (torch.float32, torch.float64, torch.bfloat16) for p in (.1, .5)]
masks += [d(torch.ones(3, 5, 7, 11).to(memory_format=torch.channels_last), .5, s).ne(0).flatten().tolist()]
print(json.dumps([fastops._C.cpu_capability(), masks]))
"""


def test_masks_are_the_same_to_the_bit():
    results = {}
    for isa in ISAS:
        if available(isa):
            out = subprocess.run([sys.executable, "-c", SCRIPT], env={**os.environ, "ATEN_CPU_CAPABILITY": isa},
                                 capture_output=True, text=True, check=True)  # fmt: skip
            name, masks = json.loads(out.stdout)
            assert name == isa.upper()
            results[isa] = masks
    assert all(m == results["default"] for m in results.values())


def test_no_symbol_of_one_instruction_set_can_serve_another():
    """Weak functions of the per-instruction-set objects are merged by the linker: each must name its instruction set."""
    if not [*ROOT.glob("build/temp*")]:
        pytest.skip("no build folder: fastops is installed, not built in place")
    assert shutil.which("nm"), "nm (binutils) is needed to check the objects"
    for path in made_by_setup("cpu"):
        isa = path.parts[-5]
        listing = subprocess.run(
            ["nm", "-C", str(path)], capture_output=True, text=True, check=True
        ).stdout
        for line in listing.splitlines():
            kind = re.search(r" ([WVu]) (.+)$", line)
            if kind:
                assert f"::{isa}::" in kind[2], f"{path.name} ({isa}): {kind[2]}"


def test_bad_capability_is_harmless():
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", "import fastops; print(fastops._C.cpu_capability())"],
                         env={**os.environ, "ATEN_CPU_CAPABILITY": "sse9"}, capture_output=True, text=True)  # fmt: skip
    assert out.returncode == 0 and out.stdout.strip() in ("DEFAULT", "AVX2", "AVX512")


def test_the_program_under_the_sanitizers_compiles():
    """`make abuse` runs it, which takes too long for every run of the tests."""
    source = ROOT / "tests" / "sanitize" / "cpu_kernels.cpp"
    include = Path(torch.__file__).parent / "include"
    command = ["g++", "-std=c++20", "-fsyntax-only", "-w", f"-I{include}", "-DCPU_CAPABILITY=AVX2", str(source)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
