"""What every test runs under: fixtures of several folders, and a cache of compiled code for each instruction set."""

import getpass
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

# torch.compile's cache does not look at ATEN_CPU_CAPABILITY: code that was compiled under one value is wrong under another
# (seen with torch 2.14.1 and torch's functions alone). So each value has a cache of its own.
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    cache = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}_{capability}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))

# `make integrations` sets this: there, a package that is missing fails the tests that need it.
ALL_PACKAGES = os.environ.get("FASTOPS_INTEGRATIONS", "") not in ("", "0")
NOT_HERE = pytest.StashKey[dict[str, int]]()


def missing(item):
    """What a test needs that this machine lacks, in words; None where it lacks nothing."""
    from bench.devices import (
        why_not,  # which imports fastops, after the emulated device is installed
    )

    if item.get_closest_marker("cuda") and (reason := why_not("cuda")):
        return f"a GPU ({reason})"
    for marker in item.iter_markers("integration"):
        absent = [name for name in marker.args if find_spec(name) is None]
        if absent and not ALL_PACKAGES:
            return ", ".join(absent)
    return None


def pytest_collection_modifyitems(config, items):
    """Leaves out the tests that need a GPU or a package that is not here, so that a skip which is shown says something."""
    kept, counts = [], config.stash.setdefault(NOT_HERE, {})
    for item in items:
        if need := missing(item):
            counts[need] = counts.get(need, 0) + 1
        else:
            kept.append(item)
    items[:] = kept


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["not here"] = session.config.stash.get(NOT_HERE, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Every process of pytest-xdist collects the same."""
    node.config.stash[NOT_HERE] = getattr(node, "workeroutput", {}).get("not here", {})


def pytest_terminal_summary(terminalreporter, config):
    for need, count in sorted(config.stash.get(NOT_HERE, {}).items()):
        terminalreporter.write_line(f"{count} tests not collected, for lack of {need}")


@pytest.fixture(scope="module")
def one_thread():
    """For tests on small tensors and images: more threads gain nothing there and wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
