"""torch's CPU tensors from the pool: begun and ended at any time, ordinary in every way, bounded."""

import copy
import gc
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from control_groups import GIB, MIB, limit_files
from models import losses, network
from torch.profiler import ProfilerActivity, profile

from fastops import _C, memory


@pytest.fixture(autouse=True)
def fresh_pool():
    limit = memory.pool_info()["limit"]
    gc.collect()  # what other tests left in cycles would be freed while this one counts
    memory.trim()
    yield
    memory.stop_serving()
    memory.set_limit(limit)
    _C.pool_read_limits_below("")
    memory.enable()
    memory.trim()


def in_use():
    return memory.pool_info()["in_use"]


def python(script, **environment):
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        cwd=Path(__file__).parents[2],
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_serves_counts_and_stops():
    before = in_use()
    with memory.serve_torch():
        assert memory.pool_info()["serves_torch"]
        large, small = torch.ones(MIB), torch.ones(1000)
        assert in_use() - before == 4 * MIB
        hits = memory.pool_info()["hits"]
        address = large.data_ptr()
        del large
        assert torch.empty(MIB).data_ptr() == address
        assert memory.pool_info()["hits"] == hits + 1
        memory.disable()
        other = torch.ones(MIB)
        assert in_use() == before
        memory.enable()
    assert not memory.pool_info()["serves_torch"]
    other = torch.ones(MIB)
    assert in_use() == before
    del small, other


def test_a_block_inside_another_does_not_stop_it():
    with memory.serve_torch():
        with memory.serve_torch():
            pass
        assert memory.pool_info()["serves_torch"]
    assert not memory.pool_info()["serves_torch"]
    memory.serve_torch()
    memory.serve_torch()
    memory.stop_serving()
    assert not memory.pool_info()["serves_torch"]
    memory.stop_serving()


def test_an_exception_ends_it():
    with pytest.raises(ValueError, match="mine"), memory.serve_torch():
        raise ValueError("mine")
    assert not memory.pool_info()["serves_torch"]


def test_tensors_of_both_kinds_outlive_the_change():
    before = in_use()
    theirs = torch.arange(MIB)
    memory.serve_torch()
    ours = torch.arange(MIB)
    more_of_theirs = theirs[5:]
    memory.stop_serving()
    assert torch.equal(ours, theirs)
    ours.resize_(2 * MIB)[MIB:] = 1  # its storage asks the allocator that it was made by
    assert torch.equal(ours[:MIB], theirs) and in_use() == before
    memory.serve_torch()
    del theirs
    assert torch.equal(more_of_theirs, ours[5:MIB])
    memory.stop_serving()
    del ours, more_of_theirs
    for _ in range(20):  # again and again, with some left over each time
        left = []
        memory.serve_torch()
        left += [torch.ones(MIB), torch.ones(10)]
        memory.stop_serving()
        left += [torch.ones(MIB), torch.ones(10)]
        assert all(bool((t == 1).all()) for t in left)
    del left
    assert in_use() == before


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")
def test_raw_memory_of_onednn_outlives_the_change():
    """oneDNN asks for raw memory and frees it through whichever allocator is torch's by then."""
    before = in_use()
    values = [torch.full((n,), 3.0) for n in (10, MIB)]
    made = [v.to_mkldnn() for v in values]
    memory.serve_torch()
    made += [v.to_mkldnn() for v in values]
    assert in_use() > before
    memory.stop_serving()
    made += [v.to_mkldnn() for v in values]
    for _ in range(2):
        for m, v in zip(made, values * 3, strict=True):
            assert torch.equal(m.to_dense(), v)
        (memory.stop_serving if memory.pool_info()["serves_torch"] else memory.serve_torch)()
    memory.stop_serving()
    del m, made[2:4]
    assert in_use() == before
    memory.serve_torch()
    del made
    memory.stop_serving()
    assert in_use() == before


def test_training_is_the_same():
    batches = [8, 8, 3, 8]
    expected = losses(batches)
    with memory.serve_torch():
        assert losses(batches) == expected


def test_ordinary_tensors():
    with memory.serve_torch():
        x = torch.randn(MIB)
        expected = x.tolist()
        buffer = io.BytesIO()
        torch.save(x, buffer)
        buffer.seek(0)
        assert torch.load(buffer, weights_only=True).tolist() == expected
        assert pickle.loads(pickle.dumps(x)).tolist() == expected
        assert copy.deepcopy(x).tolist() == expected
        assert torch.from_numpy(x.numpy()).data_ptr() == x.data_ptr()
        assert torch.from_numpy(np.array(x.numpy())).tolist() == expected
        lazy = torch._lazy_clone(x)
        lazy += 0
        assert lazy.tolist() == expected
        view = x[1000:]
        y = x.clone().resize_(3 * MIB)
        assert y[:MIB].tolist() == expected
        y.untyped_storage().resize_(4 * MIB)
        y.resize_(MIB)
        assert y.tolist() == expected
        y.untyped_storage().resize_(0)
        shared = x.clone().share_memory_()
        assert shared.is_shared() and shared.tolist() == expected
        del x
        assert view.tolist() == expected[1000:]
        assert torch.zeros(MIB).sum() == 0


def test_sizes_around_the_smallest_and_none():
    with memory.serve_torch():
        for n in (0, 1, (128 << 10) - 1, 128 << 10, (128 << 10) + 1, MIB + 4095):
            before = in_use()
            x = torch.full((n,), 7, dtype=torch.uint8)
            assert (in_use() > before) == (n >= 128 << 10)
            assert x.data_ptr() % 64 == 0 and int((x == 7).sum()) == n


def test_too_much_is_an_error_as_torchs_is():
    with memory.serve_torch():
        before = memory.pool_info()
        with pytest.raises(RuntimeError, match="not enough memory: you tried to allocate"):
            torch.empty(1 << 50)
        after = memory.pool_info()
        assert after["in_use"] == before["in_use"] and after["misses"] == before["misses"]
        assert torch.ones(MIB).sum() == MIB


def test_profiled_as_torchs():
    def sizes():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            x = torch.ones(MIB)
            y = x + 1
            del x, y
        events = seen.profiler.kineto_results.events()
        return [e.nbytes() for e in events if e.name() == "[memory]"]

    expected = sizes()
    assert 4 * MIB in expected and -4 * MIB in expected
    with memory.serve_torch():
        assert sizes() == expected


def test_threads_give_back_what_others_took():
    before = in_use()
    wrong = []
    with memory.serve_torch():
        taken = [[] for _ in range(4)]

        def work(k):
            generator = torch.Generator().manual_seed(k)
            for i in range(200):
                n = int(torch.randint(1000, MIB, (1,), generator=generator))
                taken[(k + i) % 4].append(torch.full((n,), n, dtype=torch.int32))
                if len(taken[k]) > 3:
                    t = taken[k].pop(0)
                    if not bool((t == t.numel()).all()):
                        wrong.append(t.numel())
                if i % 50 == k:
                    memory.trim()

        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert not wrong
        assert all(bool((t == t.numel()).all()) for list_ in taken for t in list_)
        del taken[:]
    assert in_use() == before


def test_switched_while_others_allocate():
    stop, wrong = threading.Event(), []

    def work():
        while not stop.is_set():
            t = torch.full((MIB // 8,), 5)
            m = t.float().to_mkldnn()
            if not bool((t == 5).all()) or m.to_dense()[-1] != 5:
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    [t.start() for t in threads]
    for _ in range(300):
        memory.serve_torch()
        memory.stop_serving()
    stop.set()
    [t.join() for t in threads]
    assert not wrong


class Pictures(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, k):
        return torch.full((MIB // 4,), float(k))


@pytest.mark.parametrize("start", sorted(set(multiprocessing.get_all_start_methods()) & {"fork", "spawn"}))  # fmt: skip
def test_data_loader_workers(start):
    with memory.serve_torch():
        held = torch.ones(MIB)
        idle = torch.ones(4 * MIB)
        del idle
        loader = torch.utils.data.DataLoader(
            Pictures(), batch_size=3, num_workers=2, multiprocessing_context=start
        )
        for _ in range(2):
            seen = torch.cat([batch[:, ::1000] for batch in loader])
            assert torch.equal(seen[:, 0], torch.arange(12.0)) and torch.equal(seen[:, 0], seen[:, -1])  # fmt: skip
        assert held.sum() == MIB


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_while_threads_allocate():
    python("""
import os, threading, torch
from fastops import memory
torch.set_num_threads(1)
memory.serve_torch()
held = torch.ones(1 << 20)
stop = threading.Event()
def work():
    while not stop.is_set():
        torch.ones(1 << 18)
threads = [threading.Thread(target=work) for _ in range(3)]
[t.start() for t in threads]
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        fine = memory.pool_info()["cached"] == 0 and held.sum() == 1 << 20
        fine = fine and torch.ones(1 << 20).sum() == 1 << 20
        held.zero_()
        os._exit(0 if fine else 1)
    assert os.waitpid(pid, 0)[1] == 0 and held.sum() == 1 << 20
stop.set()
""")


@pytest.mark.parametrize("value, expected", [("1", "True"), ("0", "False"), ("", "False")])
def test_environment(value, expected):
    script = "import fastops; print(fastops.memory.pool_info()['serves_torch'])"
    assert python(script, FASTOPS_SERVE_TORCH=value).split() == [expected]


def test_compiled():
    def f(x):
        return (x.sin() * 2 + x.cos()).relu() @ x

    x = torch.randn(512, 512)
    expected = torch.compile(f)(x)
    torch._dynamo.reset()
    with memory.serve_torch():
        compiled = torch.compile(f)
        for _ in range(3):
            assert torch.equal(compiled(x), expected)
    assert torch.equal(compiled(x), expected)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_pinned_memory_is_cudas():
    with memory.serve_torch():
        before = in_use()
        pinned = torch.ones(MIB, pin_memory=True)
        assert pinned.is_pinned() and in_use() == before
        x = torch.ones(MIB)
        assert x.pin_memory().is_pinned() and torch.equal(x.pin_memory().cuda().cpu(), x)


def test_limit_is_half_of_the_memory_while_it_serves(tmp_path):
    limit_files(tmp_path, 2, GIB)
    _C.pool_read_limits_below(str(tmp_path))
    with memory.serve_torch():
        assert memory.pool_info()["limit"] == GIB // 2
    assert memory.pool_info()["limit"] == GIB // 8
    memory.set_limit(MIB)
    with memory.serve_torch():
        assert memory.pool_info()["limit"] == MIB


def test_given_back_near_the_groups_limit(tmp_path):
    limit_files(tmp_path, 2, 2 * GIB, usage=2 * GIB - MIB)
    with memory.serve_torch():
        _C.pool_read_limits_below(str(tmp_path))
        del [torch.ones(32 * MIB)][:]
        assert memory.pool_info()["cached"] == 128 * MIB
        held = [torch.ones(4 * MIB) for _ in range(5)]
        assert memory.pool_info()["cached"] == 0
        del held


def test_idle_memory_in_pieces_is_used():
    """No piece is large enough for what is asked, and yet the pool holds no more than was in use. In a process of its own:
    how much may be idle depends on what was in use before."""
    python("""
import torch
from fastops import memory

MIB = 1 << 20
with memory.serve_torch():
    before = memory.pool_info()["in_use"]
    blocks = [torch.ones(MIB) for _ in range(32)]
    values = [torch.full((MIB,), k) for k in range(4)]
    del blocks[::2]
    large = torch.full((12 * MIB,), 3.0)  # 48 MiB where 64 MiB are idle in pieces of 4
    info = memory.pool_info()
    assert info["in_use"] - before == (16 * 4 + 4 * 8 + 48) * MIB, info
    assert info["cached"] <= 20 * MIB, info
    assert bool((large == 3).all())
    assert all(bool((b == 1).all()) for b in blocks)
    assert all(bool((v == k).all()) for k, v in enumerate(values))
""")


def test_what_is_held_is_what_was_in_use_at_the_peak():
    """Every few steps another size: what the pool holds stays within a 64th of the most in use."""
    net = network()
    most = held = 0

    def look(*_):
        nonlocal most, held
        info = memory.pool_info()
        most = max(most, info["peak"])
        held = max(held, info["in_use"] + info["cached"])

    for module in net.modules():
        module.register_forward_hook(look)
        module.register_full_backward_hook(look)
    with memory.serve_torch():
        losses([8, 5, 13, 32, 32, 7, 32, 20], net)
        look()
    assert memory.pool_info()["hits"] > 0
    assert held <= most * (1 + 1 / 64)


def test_soak():
    """Changing batch sizes: in the end the process has the memory that it had after some steps."""
    out = python("""
import sys, torch
sys.path.insert(0, "tests")
torch.set_num_threads(1)
from fastops import memory
from models import losses, network
def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
memory.serve_torch()
net, sizes = network(), [4, 9, 2, 16, 7, 16, 1, 12, 5, 16]
losses(sizes * 5, net)
after_50 = held()
losses(sizes * 25, net)
print(after_50, held())
""")
    after_50, after_300 = map(int, out.split())
    assert after_300 <= after_50 * 1.03 + 4
