"""`make gpu` and `python -m bench --device cuda` without a GPU, and the report with commands that need none."""

import subprocess
import sys

import pytest
import torch
from cases import NO_CUDA

import bench.__main__
import bench.devices
import fastops
from tools import gpu

CPU_ONLY = pytest.mark.skipif(NO_CUDA is None, reason="there is a GPU")


@CPU_ONLY
@pytest.mark.parametrize("command", [["tools/gpu.py"], ["-m", "bench", "--device", "cuda"]])
def test_without_a_gpu_one_line_says_so(command):
    done = subprocess.run([sys.executable, *command], cwd=gpu.ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and NO_CUDA in done.stderr


def test_why_not(monkeypatch):
    assert bench.devices.why_not("cpu") is None
    monkeypatch.setattr(torch.version, "cuda", None)
    assert bench.devices.why_not("cuda") == "this torch is a CPU build"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.devices.why_not("cuda") == "torch sees no GPU here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fastops._C, "cuda_built", lambda: False)
    assert bench.devices.why_not("cuda") == "fastops was built without its CUDA kernels"
    monkeypatch.setattr(fastops._C, "cuda_built", lambda: True)
    assert bench.devices.why_not("cuda") is None


def test_a_report_has_every_step(tmp_path):
    todo = [
        gpu.Step("Long", [sys.executable, "-c", "print(*range(10_000), sep='\\n')"]),
        gpu.Step("Wrong", [sys.executable, "-c", "raise SystemExit('that went wrong')"]),
        gpu.Step("After", [sys.executable, "-c", "print('still run')"]),
    ]
    path = tmp_path / "new" / "gpu-2020-01-01-0000.md"
    assert not gpu.write(path, todo, ["a machine"])
    text = path.read_text()
    assert text.startswith("# fastops on a GPU, 2020-01-01-0000\n\n```\na machine\n```")
    assert "\n9999\n" in text and "\n5000\n" not in text
    assert "that went wrong" in text and "exit code 1 after" in text and "still run" in text
    assert gpu.write(path, todo[2:], [])


def test_steps_are_commands_that_exist(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/usr/bin/{name}")
    titles = [step.title for step in gpu.steps(tmp_path / "out.jsonl")]
    assert titles[0] == "Tests" and titles[-1] == "Benchmark" and len(titles) == 6
    *_, benchmark = gpu.steps(tmp_path / "out.jsonl")
    options = bench.__main__.make_parser().parse_args(list(benchmark.command[3:]))
    assert options.device == "cuda" and options.json == tmp_path / "out.jsonl"
    chosen = gpu.steps(tmp_path)[1].command
    pytest_arguments = chosen[chosen.index("pytest") + 1 :]
    collected = subprocess.run([sys.executable, "-m", "pytest", *pytest_arguments, "--collect-only"], cwd=gpu.ROOT, capture_output=True, text=True)  # fmt: skip
    assert collected.returncode == 0 and "test_optimizers_are_torchs" in collected.stdout
