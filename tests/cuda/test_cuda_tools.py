"""`make gpu` and `python -m bench --device cuda` without a GPU, and the report with commands that need none."""

import functools
import os
import subprocess
import sys
import types

import pytest
import torch
from cases import NO_CUDA

import bench.__main__
import bench.calls
import bench.cases
import bench.devices
import bench.peers
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


def test_a_report_says_what_the_machine_is():
    assert any(fastops.__version__ in text and "CPU kernels" in text for text in gpu.machine())


def test_a_step_that_hangs_is_ended_and_the_next_one_runs(tmp_path):
    """The child of a step holds its output open, too."""
    hang = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '1000'])"
    todo = [
        gpu.Step("Hangs", [sys.executable, "-c", hang], 3),
        gpu.Step("After", [sys.executable, "-c", "print('still run')"]),
    ]
    assert not gpu.write(tmp_path / "gpu-x.md", todo, [])
    text = (tmp_path / "gpu-x.md").read_text()
    assert "ended at its limit of 3 s" in text and "begun" in text and "still run" in text


def test_results_are_written_as_they_come(tmp_path):
    """The second step sees what the first one left, and its own first line."""
    path = tmp_path / "gpu-x.md"
    look = (
        "import pathlib; print('second', flush=True); "
        f"text = pathlib.Path({str(path)!r}).read_text(); "
        f"log = pathlib.Path({str(path.with_suffix('.log'))!r}); "
        "assert 'exit code 0' in text and 'first' in text; "
        "[0 for _ in iter(lambda: 'second' in log.read_text(), True)]"
    )
    todo = [gpu.Step("A", [sys.executable, "-c", "print('first')"]), gpu.Step("B", [sys.executable, "-c", look], 100)]  # fmt: skip
    assert gpu.write(path, todo, [])


def test_steps_are_commands_that_exist(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/usr/bin/{name}")
    titles = [step.title for step in gpu.steps(tmp_path / "out.jsonl")]
    assert titles[0] == "Tests" and titles[-1] == "Benchmark" and len(titles) == 6
    *_, benchmark = gpu.steps(tmp_path / "out.jsonl")
    options = bench.__main__.make_parser().parse_args(list(benchmark.command[3:]))
    assert options.device == "cuda" and options.json == tmp_path / "out.jsonl"
    chosen = gpu.steps(tmp_path)[1].command
    pytest_arguments = chosen[chosen.index("pytest") + 1 :]
    # Without a GPU they are not collected: under the emulated one they are.
    command = [sys.executable, "-m", "pytest", "-p", "emulation.device", *pytest_arguments, "--collect-only"]  # fmt: skip
    collected = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(gpu.ROOT / "tests")})  # fmt: skip
    assert collected.returncode == 0 and "test_optimizers_are_torchs" in collected.stdout


def test_peers_are_timed_where_they_are_installed(monkeypatch):
    """apex, Liger and quack as stand-ins: each is called with the case's tensors, copies of them, and becomes a column."""
    cases = {case.label: case for case in bench.cases.all_cases(bench.calls.OPS)}
    case = cases["cross_entropy 128x1000 float32 forward+backward"]
    assert bench.peers.functions(case, "cuda") == {} and bench.peers.functions(case, "cpu") == {}
    seen = []

    def liger(input, target):
        seen.append(input.data_ptr())
        return torch.nn.functional.cross_entropy(input, target)

    def quack(input, target, reduction):
        assert reduction == "mean"
        return torch.nn.functional.cross_entropy(input, target)

    class Apex(torch.autograd.Function):
        @staticmethod
        def forward(ctx, input, target, smoothing, padding, half_to_float):
            raise RuntimeError("apex was built for another torch")

    modules = {
        "liger_kernel.transformers.functional": {"liger_cross_entropy": liger},
        "quack.cross_entropy": {"cross_entropy": quack},
        "quack.softmax": {"softmax": lambda x: x.softmax(-1)},
        "apex.contrib.xentropy": {"SoftmaxCrossEntropyLoss": Apex},
        "apex.optimizers": {"FusedAdam": functools.partial(_FusedAdam, torch.optim.AdamW)},
    }
    monkeypatch.setattr(bench.peers, "installed", lambda module: module in modules)
    monkeypatch.setattr(bench.peers, "import_module", lambda m: types.SimpleNamespace(**modules[m]))
    monkeypatch.setattr(
        bench.peers, "functions", functools.partial(_on_cuda, bench.peers.functions)
    )
    monkeypatch.setattr(bench.peers, "makers", functools.partial(_on_cuda, bench.peers.makers))
    made = bench.calls.contenders(case, "cpu", False)
    assert {"liger", "quack"} == set(made.peers) and len(made.notes) == 1
    assert "apex was built for another torch" in made.notes[0]
    assert torch.equal(made.peers["liger"](), made.theirs["eager"]()) and len(set(seen)) == 1
    softmax = cases["softmax 128x1024 float32 forward"]
    made = bench.calls.contenders(softmax, "cpu", False)
    assert torch.equal(made.peers["quack"](), made.theirs["eager"]())
    made = bench.calls.contenders(cases["AdamW 300x1024 float32 step"], "cpu", False)
    assert made.notes == []
    made.peers["apex"]()
    assert list(made.peers) == ["apex"]


def _on_cuda(function, case, device):
    return function(case, "cuda")


def _FusedAdam(cls, params, adam_w_mode, **options):
    assert adam_w_mode and options == {"lr": 1e-3, "weight_decay": 1e-2}
    return cls(params, **options)
