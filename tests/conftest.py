"""What every test runs under: fixtures of several folders, and a cache of compiled code for each instruction set."""

import getpass
import os
import tempfile
from pathlib import Path

import pytest
import torch

# torch.compile's cache does not look at ATEN_CPU_CAPABILITY: code that was compiled under one value is wrong under another
# (seen with torch 2.14.1 and torch's functions alone). So each value has a cache of its own.
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    cache = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}_{capability}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))


@pytest.fixture(scope="module")
def one_thread():
    """For tests on small tensors and images: more threads gain nothing there and wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
