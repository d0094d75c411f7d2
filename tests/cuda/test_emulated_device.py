"""csrc/torch's CUDA paths, and the tests marked cuda, run on a device made of this process's memory (emulation/device.py),
in processes of their own: the extension there is the emulated one, and torch.cuda answers for that device."""

import os
import re
import subprocess
import sys

import pytest
from emulation import device
from emulation.build import ROOT

pytestmark = pytest.mark.slow

# What only a GPU can answer for: an assertion that ends its process, and 12 GB of its memory.
NOT_HERE = ["test_a_target_out_of_range_stops_the_device", "test_beyond_31_bits"]


@pytest.fixture(scope="module", autouse=True)
def built():
    try:
        device.library()
    except device.Missing as reason:
        pytest.skip(str(reason))


def run(*arguments):
    """python on the emulated device, on one thread; (exit code, output)."""
    path = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    return done.returncode, done.stdout + done.stderr


def run_tests(*arguments):
    return run("-m", "pytest", "-p", "emulation.device", "-p", "no:cacheprovider", *arguments)


def test_the_tests_marked_cuda_pass():
    chosen = " and ".join(f"not {name}" for name in NOT_HERE)
    files = ["tests/cuda/test_cuda_device.py", "tests/cuda/test_optim_cuda.py"]
    status, output = run_tests("-m", "cuda", "-k", chosen, *files)
    assert status == 0, output[-4000:]
    assert " passed" in output


def test_where_launches_go():
    status, output = run_tests("tests/cuda/checks_of_device.py")
    assert status == 0, output[-4000:]


def test_bench_runs():
    """Every row is verified against torch and timed, in the way of CUDA; the figures say nothing."""
    program = (
        "import sys, emulation.device as device; device.install(); import bench.__main__ as bench; "
        "options = ['--device', 'cuda', '--quick', '--time', '0.01', '--filter']; "
        "rows = ['cross_entropy 128x1000', 'dropout 128x1024', 'Adam 300x1024']; "
        "sys.exit(max(bench.main([*options, each]) for each in rows))"
    )
    status, output = run("-c", program)
    assert status == 0, output[-4000:]
    assert re.findall(r"(\d+) of (\d+) rows timed", output) == [("2", "2"), ("2", "2"), ("1", "1")]
