"""The pool: bounded, counted, thread-safe, survives fork; its tensors are ordinary tensors."""

import io
import os
import subprocess
import sys
import threading

import pytest
import torch

import fastops
from fastops import memory
from fastops.functional import relu

MIB = 1 << 20


@pytest.fixture(autouse=True)
def fresh_pool():
    limit = memory.pool_info()["limit"]
    memory.trim()
    yield
    memory.set_limit(limit)
    memory.enable()


def test_memory_is_reused_and_counted():
    x = torch.randn(MIB)  # 4 MiB
    before = memory.pool_info()
    y = relu(x)
    pointer = y.data_ptr()
    assert memory.pool_info()["in_use"] - before["in_use"] >= 4 * MIB
    del y
    assert memory.pool_info()["cached"] >= 4 * MIB
    z = relu(x)
    after = memory.pool_info()
    assert z.data_ptr() == pointer
    assert after["hits"] == before["hits"] + 1
    assert after["misses"] == before["misses"] + 1
    del z
    memory.trim()
    assert memory.pool_info()["cached"] == 0


def test_bounded():
    x = torch.randn(MIB)
    memory.set_limit(9 * MIB)
    held = [relu(x) for _ in range(5)]
    del held
    assert 0 < memory.pool_info()["cached"] <= 9 * MIB
    memory.set_limit(0)
    assert memory.pool_info()["cached"] == 0


def test_off_switch():
    memory.disable()
    before = memory.pool_info()
    y = relu(torch.randn(MIB))
    assert memory.pool_info()["in_use"] == before["in_use"]
    assert not memory.pool_info()["enabled"]
    del y


def test_small_results_are_torchs():
    before = memory.pool_info()["in_use"]
    y = relu(torch.randn(1000))
    assert memory.pool_info()["in_use"] == before
    del y


def test_ordinary_tensor():
    x = torch.randn(MIB)
    y = relu(x)
    assert y.is_contiguous() and y.storage_offset() == 0 and y.untyped_storage().nbytes() == 4 * MIB
    buffer = io.BytesIO()
    torch.save(y, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True), y)
    expected = y.clone()
    y.share_memory_()
    assert y.is_shared() and torch.equal(y, expected)
    z = relu(x)
    z.resize_(2 * MIB)
    assert torch.equal(z[:MIB], expected)
    view = relu(x)[5:]
    assert torch.equal(view, expected[5:])  # a view keeps the memory alive
    assert torch.equal(torch.from_numpy(relu(x).numpy()), expected)


def test_threads():
    x = torch.randn(MIB)
    expected = x.relu()
    errors = []

    def work():
        for _ in range(30):
            if not torch.equal(relu(x), expected):
                errors.append("wrong")

    threads = [threading.Thread(target=work) for _ in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not errors


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork():
    script = """
import os, torch
torch.set_num_threads(1)
from fastops.functional import relu
x = torch.randn(1 << 20); y = relu(x); del y
pid = os.fork()
y = relu(x)
assert torch.equal(y, x.relu())
if pid == 0:
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize("value, enabled", [("0", False), ("2097152", True)])
def test_environment(value, enabled):
    script = "from fastops import memory; i = memory.pool_info(); print(i['enabled'], i['limit'])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True,
                         env={**os.environ, "FASTOPS_CPU_POOL_LIMIT": value}).stdout  # fmt: skip
    assert out.split() == [str(enabled), value]


def test_bad_environment():
    script = "from fastops import memory; memory.pool_info()"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                            env={**os.environ, "FASTOPS_CPU_POOL_LIMIT": "1 GB"})  # fmt: skip
    assert result.returncode != 0 and "number of bytes, got '1 GB'" in result.stderr


def test_show_config():
    text = fastops.show_config()
    for word in ("torch", "CPU kernels", "CUDA kernels", "CPU pool"):
        assert word in text
