"""python -m fastops doctor: what it says of a build that is well, of one that is not, and of one that does not load."""

import os
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastops
from fastops import doctor, selfcheck
from fastops.__main__ import main
from fastops._core import by_torch, loader
from fastops._core.registry import OPS

SUFFIX = loader.EXTENSION_SUFFIXES[0]


def findings(section):
    return {finding.name: finding for finding in section.findings}


def test_all_is_well(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for expected in (fastops.__version__, torch.__version__, fastops._C.cpu_capability(), "Verdict: all is well"):  # fmt: skip
        assert expected in out
    assert "agree with torch" in out
    assert not [line for line in out.splitlines() if line.startswith("  x ")]


def test_a_check_of_torch_beside_torch_is_not_called_one(monkeypatch):
    monkeypatch.setattr(by_torch, "DISABLED", True)
    (said,) = doctor.self_check().findings
    assert said.state == doctor.NOTE and said.text.startswith("not checked: FASTOPS_DISABLE is set")


def test_every_op_and_optimizer_is_checked():
    ops = list(selfcheck.check_ops())
    assert {check.name for check in ops} >= OPS.keys()
    assert [check for check in ops if check.problem] == []
    steps = list(selfcheck.check_optimizers())
    ours = {
        name
        for name, cls in vars(fastops.optim).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
    }
    assert {check.name for check in steps} == ours
    assert [check for check in steps if check.problem] == []


class ForgetsTheMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.relu()

    @staticmethod
    def backward(ctx, dy):
        return dy


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("relu", lambda input: input.relu() * 1.01, "value"),
        ("relu", lambda input: ForgetsTheMask.apply(input), "gradient of input"),
        ("relu", lambda input: input.relu().double(), "float64"),
        ("dropout", lambda input, p: input * 1, "keeps 1.00"),
        ("mse_loss", lambda input, target: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_wrong_op_is_said_and_counts(monkeypatch, capsys, name, wrong, says):
    def only(device):
        monkeypatch.setitem(OPS, name, replace(OPS[name], function=wrong))
        return [
            selfcheck._verdict(name, torch.float32, device, selfcheck.check_op, OPS[name], torch.float32, device)
        ]  # fmt: skip

    monkeypatch.setattr(selfcheck, "check_ops", only)
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert says in out and "Verdict: 2 wrong: ops, cpu, " + name in out


class HastyAdam(torch.optim.Adam):
    def __init__(self, params, lr, **options):
        super().__init__(params, lr=lr * 1.01, **options)


def test_a_wrong_optimizer_is_said(monkeypatch):
    monkeypatch.setattr(fastops.optim, "Adam", HastyAdam)
    bad = {check.name: check.problem for check in selfcheck.check_optimizers() if check.problem}
    assert bad.keys() == {"Adam"} and "parameters" in bad["Adam"]


# ---------------------------------------------------------------------------------------------- what does not load


def broken_package(folder: Path, contents: bytes | None, suffix: str = SUFFIX) -> None:
    """A copy of the package whose extension is `contents`."""
    source = Path(fastops.__file__).parent
    shutil.copytree(
        source, folder / "fastops", ignore=shutil.ignore_patterns("*.so", "assets", "__pycache__")
    )
    if contents is not None:
        (folder / "fastops" / f"_C{suffix}").write_bytes(contents)


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("contents", "suffix", "says"),
    [
        (
            b"\x7fELF fastops built for torch 2.9.1+cpu\n",
            SUFFIX,
            f"was built for torch 2.9.1+cpu, this is torch {torch.__version__}; build it again",
        ),
        (b"\x7fELF cut short", SUFFIX, "is damaged, or no build of fastops"),
        (b"", SUFFIX, "is damaged, or no build of fastops"),
        (None, SUFFIX, "there is none in"),
        (b"", ".cpython-38-x86_64-linux-gnu.so", "only _C.cpython-38-x86_64-linux-gnu.so"),
    ],
)
def test_an_extension_that_does_not_load_is_a_sentence(tmp_path, contents, suffix, says):
    broken_package(tmp_path, contents, suffix)
    done = python(tmp_path, "-m", "fastops", "doctor")
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    assert says in done.stdout and "Verdict: 1 wrong: fastops._C" in done.stdout
    if contents == b"":
        return
    done = python(tmp_path, "-c", "import fastops")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fastops._C") and says in last


def test_a_build_for_another_minor_version_is_refused_though_it_loads(monkeypatch):
    monkeypatch.setattr(fastops._C, "torch_version", lambda: "2.9.1")
    monkeypatch.setattr(loader, "built_for", lambda file: "2.9.1")
    with pytest.raises(ImportError, match=r"built for torch 2\.9\.1, this is torch 2\.14\.1"):
        loader.load("2.14.1")
    assert loader.load("2.9.0+cpu") is fastops._C


def test_a_build_for_another_patch_version_is_a_note(monkeypatch):
    monkeypatch.setattr(fastops._C, "torch_version", lambda: "2.14.99")
    assert findings(doctor.extension(None))["built for"].state == doctor.NOTE


def test_the_file_says_what_it_was_built_for():
    assert loader.built_for(loader.path()) == fastops._C.torch_version()


# ---------------------------------------------------------------------------------------------- the machine


def fat_binary(*entries: tuple[int, int]) -> bytes:
    body = b"".join(
        struct.pack("<HHIQIIHHI", kind, 0x101, 64, 16, 0, 0, 0, 0, arch).ljust(64, b"\0")
        + b"c" * 16
        for kind, arch in entries
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_architectures_are_read_from_the_file(tmp_path):
    file = tmp_path / "_C.so"
    file.write_bytes(b"abc" + fat_binary((2, 80), (2, 120), (1, 120)) + b"\0" * 99 + fat_binary((2, 80)))  # fmt: skip
    assert loader.cuda_architectures(file) == ["sm_80", "compute_120", "sm_120"]
    file.write_bytes(fat_binary((2, 80))[:20])
    assert loader.cuda_architectures(file) == []


def test_cuda_kernels_of_this_build_name_their_architectures():
    assert bool(loader.cuda_architectures(loader.path())) == fastops._C.cuda_built()


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((8, 0), True), ((8, 9), True), ((7, 5), False), ((9, 0), True), ((10, 3), False), ((12, 1), True), ((13, 0), True)],
)  # fmt: skip
def test_which_gpus_are_covered(capability, runs):
    assert doctor.covers(["sm_80", "sm_90", "sm_120", "compute_120"], capability) == runs


def test_a_gpu_without_kernels_is_wrong(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (6, 1))
    monkeypatch.setattr(fastops._C, "cuda_built", lambda: True)
    monkeypatch.setattr(loader, "cuda_architectures", lambda file: ["sm_80"])
    found = findings(doctor.cuda())["GPU 0"]
    assert found.state == doctor.WRONG and "TORCH_CUDA_ARCH_LIST=6.1" in found.text


def test_a_lower_instruction_set_and_a_pool_that_is_off_are_notes(monkeypatch):
    monkeypatch.setattr(fastops._C, "cpu_capability", lambda: "lower")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert findings(doctor.cpu())["kernels"].state == doctor.NOTE
    fastops.memory.disable()
    try:
        assert findings(doctor.pool())["pool"].state == doctor.NOTE
    finally:
        fastops.memory.enable()


def test_rich_and_plain_say_the_same(monkeypatch, capsys):
    pytest.importorskip("rich", reason="rich is not installed: doctor prints plain text")
    section = doctor.Section("Title", [doctor.Finding("name", "text"), doctor.Finding("b", "c", doctor.WRONG)])  # fmt: skip
    doctor.show_plain(section)
    plain = capsys.readouterr().out.split()
    doctor.show_rich(section)
    assert capsys.readouterr().out.split() == plain == ["Title", "+", "name", "text", "x", "b", "c"]
