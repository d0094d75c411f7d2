"""tools/digest.py: the same bits have the same digest in another process, and other bits, dtypes or strides have not."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tools import digest

pytestmark = pytest.mark.quick


def written(path, *options):
    command = [sys.executable, "tools/digest.py", "write", path, *options]
    done = subprocess.run(command, cwd=digest.ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


def test_two_processes_agree(tmp_path, capsys):
    a, b = (written(tmp_path / name, "--filter", "relu_dropout p=0.3 7x13") for name in "ab")
    assert a == b
    parts = {name.rsplit(" ", 1)[1] for name in a["digests"]}
    assert parts >= {"value", "forward", "backward"}
    assert digest.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    name = next(iter(b["digests"]))
    b["digests"][name] = "0" * 64
    (tmp_path / "b").write_text(json.dumps(b))
    assert digest.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert name in capsys.readouterr().out
    (tmp_path / "b").write_text(json.dumps({**b, "capability": "another"}))
    assert digest.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2


def test_a_bit_a_dtype_and_an_order_are_seen():
    x = torch.arange(1.0, 7.0).reshape(2, 3)
    other = x.clone()
    other.view(torch.int32)[1, 2] ^= 1
    different = [x, other, x.double(), x.t().contiguous().t(), x.reshape(3, 2), -x, x * 0, -x * 0]
    assert len({digest.digest(v) for v in different}) == len(different)
    assert digest.digest(x) == digest.digest(x.clone())


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_steps_are_cases(name):
    import fastops

    found = [case for case, _ in digest.steps(fastops.optim) if case.startswith(f"{name} ")]
    assert any("stochastic" in case for case in found) and any("max_grad_norm" in case for case in found)  # fmt: skip
