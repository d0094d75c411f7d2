"""The pool: bounded, counted, thread-safe, survives fork; its tensors are ordinary tensors."""

import io
import os
import subprocess
import sys
import threading

import pytest
import torch
from control_groups import GIB, MIB, limit_files
from torch.profiler import ProfilerActivity, profile

import fastops
from fastops import _C, memory
from fastops.functional import relu


@pytest.fixture(autouse=True)
def fresh_pool():
    limit = memory.pool_info()["limit"]
    memory.trim()
    yield
    _C.pool_read_limits_below("")
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


def test_a_smaller_result_takes_part_of_an_idle_block_and_neighbors_join_again():
    x = torch.randn(MIB)
    y = relu(x)  # 4 MiB
    address, before = y.data_ptr(), memory.pool_info()
    del y
    first, second = relu(x[: MIB // 4]), relu(x[: MIB // 2])
    assert (first.data_ptr(), second.data_ptr()) == (address, address + MIB)
    assert memory.pool_info()["misses"] == before["misses"]
    assert memory.pool_info()["cached"] == MIB
    del first, second
    whole = relu(x)
    assert whole.data_ptr() == address
    assert memory.pool_info()["misses"] == before["misses"]


def test_the_smallest_block_that_fits_is_taken():
    x = torch.randn(MIB)
    blocks = [relu(x[: n * MIB // 4]) for n in (4, 1, 2, 1, 3, 1)]  # MiB, one beside another
    addresses = [b.data_ptr() for b in blocks]
    del blocks[4], blocks[2], blocks[0]
    assert relu(x[: MIB // 2]).data_ptr() == addresses[2]
    assert relu(x[: MIB // 2 + 1]).data_ptr() == addresses[4]


def test_what_is_held_stays_near_the_most_that_was_in_use_lately():
    x = torch.randn(16 * MIB)
    big = relu(x)  # 64 MiB
    del big
    assert memory.pool_info()["cached"] == 64 * MIB
    for _ in range(2000):  # MiB; a peak is forgotten after sixteen times its size
        small = relu(x[: MIB // 4])
    info = memory.pool_info()
    assert info["in_use"] + info["cached"] < 3 * MIB  # two of them were in use at once
    del small


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "group, top",
    [
        ("/", "/"),  # a container with a namespace of its own
        ("/job", "/"),
        ("/docker/1234", "/docker/1234"),  # without one: the host's name, mounted as the top
        ("/docker/1234/job", "/docker/1234"),
        ("/../../elsewhere", "/"),
    ],
)
def test_the_limit_is_the_control_groups(tmp_path, version, group, top):
    files = {"group": "/", "top": "/"} if ".." in group else {"group": group, "top": top}
    limit_files(tmp_path, version, GIB, **files)
    if ".." in group:
        cgroup = tmp_path / "proc/self/cgroup"
        cgroup.write_text(cgroup.read_text().replace(":/\n", f":{group}\n"))
    _C.pool_read_limits_below(str(tmp_path))
    assert memory.pool_info()["limit"] == GIB // 8


@pytest.mark.parametrize("version", [1, 2])
def test_a_group_above_limits_too(tmp_path, version):
    place = limit_files(tmp_path, version, GIB, group="/slice/job")
    limit = "memory.max" if version == 2 else "memory.limit_in_bytes"
    (place.parent / limit).write_text(f"{GIB // 2}\n")
    _C.pool_read_limits_below(str(tmp_path))
    assert memory.pool_info()["limit"] == GIB // 16


@pytest.mark.parametrize("version", [1, 2])
def test_without_a_limit_it_is_the_machines_memory(tmp_path, version):
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8
    limit_files(tmp_path, version, "max" if version == 2 else "9223372036854771712")
    _C.pool_read_limits_below(str(tmp_path))
    assert memory.pool_info()["limit"] == machine
    _C.pool_read_limits_below(str(tmp_path / "nothing there"))
    assert memory.pool_info()["limit"] == machine


@pytest.mark.parametrize("version", [1, 2])
def test_idle_memory_is_given_back_near_the_groups_limit(tmp_path, version):
    files = dict(version=version, limit=2 * GIB)
    limit_files(tmp_path, **files, usage=GIB)
    _C.pool_read_limits_below(str(tmp_path))
    x = torch.randn(16 * MIB)

    def idle_after_more():
        y = relu(x)
        del y
        # asks for part of what is idle, so that nothing else makes it shrink
        y = [relu(x[: 8 * MIB]) for _ in range(4)]
        del y
        return memory.pool_info()["cached"]

    assert idle_after_more() >= 64 * MIB
    limit_files(tmp_path, **files, usage=2 * GIB, inactive=GIB)  # page cache is no pressure
    assert idle_after_more() >= 64 * MIB
    limit_files(tmp_path, **files, usage=2 * GIB - 8 * MIB)
    before = memory.pool_info()["misses"]
    held = [relu(x[: 4 * MIB]) for _ in range(5)]
    assert memory.pool_info()["cached"] == 0 and memory.pool_info()["misses"] > before
    del held


def peak(tmp_path, switch):
    """The most memory, in MiB, and what is idle after results of many sizes in a group of 1 GiB."""
    limit_files(tmp_path, 2, GIB)
    script = f"""
import resource, torch
from fastops import _C, memory
from fastops.functional import relu
_C.pool_read_limits_below({str(tmp_path)!r})
{switch}
for n in range(36):
    relu(torch.empty(int(4 * 32 ** (n / 35)) << 18))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10, memory.pool_info()["cached"] >> 20)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return map(int, done.stdout.split())


def test_many_sizes_in_a_small_group(tmp_path):
    theirs, none = peak(tmp_path, "memory.disable()")
    ours, idle = peak(tmp_path, "")
    assert none == 0
    assert idle <= 128
    assert ours <= theirs + 128


def test_the_profiler_sees_what_the_pool_gives_and_takes():
    x = torch.randn(MIB)
    sizes = []
    for function in (relu, torch.relu):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            y = function(x)
            del y
        events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
        sizes.append([e.nbytes() for e in events])
    assert sizes[0] == sizes[1] == [4 * MIB, -4 * MIB]


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
