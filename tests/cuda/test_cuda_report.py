"""bench/cuda_report.csv, the committed table of what nvcc made of the kernels, is complete, free of spills and narrow
accesses, and of these sources. Nothing is compiled here: `make cuda-report` does that, and ends with 1 on the same
complaints."""

from collections import Counter

import pytest
from emulation.library import rows

from fastops._core.registry import has_slope
from tools import cuda_report

MADE, LINES = cuda_report.read()
STALE = sorted(name for name, value in cuda_report.digests().items() if MADE.get(name) != value)


def test_the_table_is_of_these_sources():
    if STALE and cuda_report.cuda_home() is None:
        pytest.skip(f"{STALE} have changed since the table was made, and there is no nvcc here")
    assert not STALE, "csrc has changed: run `make cuda-report`, which compiles what has"


def test_nothing_is_wrong_with_any_kernel():
    assert cuda_report.complaints(LINES) == []


def test_every_architecture_is_in_the_table():
    assert {c.split()[1] for c in LINES[0] if c.startswith("spills")} == set(cuda_report.LIMITS)
    assert all(all(line[f"registers {arch}"] for arch in cuda_report.LIMITS) for line in LINES)


def test_every_op_is_in_the_table():
    if STALE:
        pytest.skip(f"{STALE} have changed since the table was made")
    found = Counter(line["kernel"].partition("<")[0] for line in LINES)
    losses = len(rows("loss")) - 1  # without "sum"
    slopes = sum(has_slope(row.name) for row in rows("loss"))
    expected = {
        # Activations: forward, backward, second. Losses: values, each first derivative, all second ones.
        # What is fused with an addition; dropouts, and the backward of the one that its output tells;
        # a saved gradient times a factor. All for each dtype.
        "elementwise_kernel": 4
        * (
            3 * len(rows("elementwise"))
            + 4 * losses
            + slopes
            + sum(1 + row.broadcast for row in rows("fused"))
            + 4 * len(rows("gate"))  # forward, backward, tangent, second
            + len(rows("dropout"))
            + 1
            + 1
        ),
        "chunk_kernel": 4 * (len(rows("loss")) + slopes),
        # Dtypes of parameters and states; each also extended (rounding, numbers of the device).
        "step_kernel": sum(2 * (7 if row.states else 4) for row in rows("optimizer")),
        "derive_kernel": 2 * len(rows("optimizer")),
        # Teams of 32, 128 and 512 threads that hold a row, or two, and blocks that do not; for one row
        # teams of 1024, which have no registers for float64.
        "softmax_kernel": (4 * 4 + 3) * len(rows("softmax")),
        "softmax_backward_kernel": 4 * 4 * len(rows("softmax")),
        "probability_kernel": 4 * 4 * len(rows("cross_entropy")),
        "cross_entropy_kernel": (4 * 4 + 3) * len(rows("cross_entropy")),
        "strided_kernel": 2 * 4 * len(rows("dropout")),  # indices of 32 and 64 bits
        # of packs, of single columns; dtypes
        "summed_kernel": 2 * 4 * (1 + sum(row.broadcast for row in rows("fused"))),
    }
    assert {name: found[name] for name in expected} == expected


def test_only_what_has_changed_is_compiled_again(tmp_path, monkeypatch):
    if (home := cuda_report.cuda_home()) is None:
        pytest.skip("there is no nvcc here")
    table = tmp_path / "table.csv"
    cuda_report.write(table, LINES, home)
    every = [*cuda_report.LIMITS]
    assert cuda_report.kept(table, every, home) == LINES
    assert cuda_report.kept(table, ["90"], home) == []
    table.write_text(table.read_text().replace(" elementwise=", " elementwise=0"))
    left = cuda_report.kept(table, every, home)
    assert left and left == [line for line in LINES if line["source"] != "elementwise"]
    monkeypatch.setattr(cuda_report, "release", lambda home: "99.0")
    assert cuda_report.kept(table, every, home) == []


def test_a_source_is_made_from_what_it_includes():
    made = {
        path.name for path in cuda_report.made_from(cuda_report.ROOT / "csrc/cuda/optimizer.cu")
    }
    assert {"optimizer.cu", "optimizers.h", "math.h", "launch.cuh", "pack.cuh"} <= made
    assert not made & {"softmax.h", "cross_entropy.cu", "losses.h"}


# ---------------------------------------------------------------------------------------------- the checks


@pytest.mark.parametrize(
    "kernel, column, value, complaint",
    [
        ("elementwise_kernel<Backward<Mish>", "spills 90", "8", "spills 8 bytes on sm_90"),
        (
            "elementwise_kernel<Backward<Mish>",
            "loads 80",
            "16:1 4:8",
            "wide loads and stores on sm_80",
        ),
        ("step_kernel<Adam", "stores 100", "4:12", "wide loads and stores on sm_100"),
        ("step_kernel<Adam", "loads 100", "16:3 4:12", "wide loads and stores on sm_100"),
        ("cross_entropy_kernel", "loads 120", "4:12", "wide loads and stores on sm_120"),
        ("elementwise_kernel<Forward<Dropout>", "float64", "2", "float64 instructions"),
        ("strided_kernel", "stack 90", "32", "32 bytes of local memory on sm_90"),
    ],
)
def test_a_worse_kernel_is_complained_of(kernel, column, value, complaint):
    line = next(
        line for line in LINES if line["kernel"].startswith(kernel) and line["dtype"] != "float64"
    )
    found = cuda_report.complaints([line | {column: value}])
    assert found and all(complaint in each for each in found)


def test_widths_are_read_from_sass_and_ptx():
    sass = "//-----\n.text.k:\n LDG.E.128 R4, [R2]\n LDG.E.U16 R3\n LDG.E R2\n STG.E.128.STRONG.SM [R2]\n STG.E.64 [R3]\n STL [R1], R2\n"
    ptx = ".visible .entry k(\n.param .u64 p\n)\n{\nld.global.nc.v4.b32 {a}, [p];\nld.global.u16 b;\nst.global.wb.v2.b64 [p];\n}\n"
    assert cuda_report.widths_of_sass(sass) == {"k": ({16: 1, 2: 1, 4: 1}, {16: 1, 8: 1})}
    assert cuda_report.widths_of_ptx(ptx) == {"k": ({16: 1, 2: 1}, {16: 1})}


def test_occupancy():
    """Registers, shared memory and the number of threads as limits, computed by hand."""
    limits = cuda_report.LIMITS["80"]
    assert cuda_report.occupancy(limits, 256, 32, 0) == 100
    assert cuda_report.occupancy(limits, 256, 33, 0) == 75  # 40 registers a thread: 6 blocks of 8
    assert cuda_report.occupancy(limits, 512, 128, 0) == 25
    assert cuda_report.occupancy(limits, 256, 32, 40 << 10) == 50  # 4 blocks of 41 KB
