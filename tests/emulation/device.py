"""A CUDA device without a GPU: csrc/torch as it was built for CUDA, linked with the emulated kernels, on tensors of device
type CUDA whose memory is this process's. As a pytest plugin it makes the tests marked `cuda` run:

    PYTHONPATH=tests python -m pytest -p emulation.device -m cuda tests/cuda/test_cuda_device.py

Streams, graphs and devices are there in name and in what csrc/torch can see of them: which stream and device a launch went
to, what would have waited for the device, what a graph would replay. Everything runs at once and in order.
"""

import importlib.machinery
import importlib.util
import shutil
import sys
import sysconfig
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from .build import ROOT, kernels, link, made_by_setup, objects


class Missing(RuntimeError):
    """Why there is no such device here."""


def built() -> list[Path]:
    """The objects of fastops._C without its kernels for GPUs, as `make build` left them."""
    if not [*ROOT.glob("build/temp*")]:
        raise Missing("fastops was not built in this folder: run `make build`")
    torchs, loops = made_by_setup("torch"), made_by_setup("cpu")
    (backend,) = (o for o in torchs if o.stem == "backend")
    if b"getCurrentCUDAStream" not in backend.read_bytes():
        raise Missing("fastops was built without CUDA, and so without these paths")
    return [*torchs, *loops]


def toolkit() -> Path:
    """The folder of CUDA's headers: the toolkit's, or those that torch's wheels bring."""
    places = [Path("/usr/local/cuda/include")]
    if nvcc := shutil.which("nvcc"):
        places.append(Path(nvcc).resolve().parents[1] / "include")
    if spec := importlib.util.find_spec("nvidia"):
        for folder in spec.submodule_search_locations or []:
            places += sorted(Path(folder).glob("*/include"))
    for place in places:
        if (place / "cuda_runtime_api.h").exists():
            return place
    raise Missing("there is no cuda_runtime_api.h here")


def library() -> Path:
    """fastops._C and _device, in one file."""
    here = ROOT / "tests" / "emulation"
    site = Path(torch.__file__).parent
    python = [f"-I{site}/include/torch/csrc/api/include", f"-I{sysconfig.get_path('include')}"]
    quiet = ["-O1", "-Wno-psabi", "-Wno-unused-parameter", "-Wno-attributes"]  # in torch's headers
    made = [
        *objects(kernels()),
        *objects([here / "device.cpp"], extra=[*quiet, *python]),
        *objects([here / "stream.cpp"], extra=[*quiet, f"-I{toolkit()}"]),
        *built(),
    ]
    libraries = ["-lc10", "-lc10_cuda", "-ltorch_cpu", "-ltorch", "-ltorch_python", "-fopenmp"]
    return link(
        "device", made, ["-shared", "-Wl,-Bsymbolic-functions", f"-L{site}/lib", *libraries]
    )


def load(name: str, path: Path):
    """A module from a file that holds several."""
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------ torch.cuda


class Stream:
    """A name: what is put on it runs at once."""

    made = 0

    def __init__(self, device=None, priority=0):
        Stream.made += 1
        self.device = torch.device("cuda", index_of(device))
        self.id = Stream.made * 16  # as torch numbers streams that are not its own

    def synchronize(self):
        """Nothing is left to wait for."""

    def wait_stream(self, other):
        """The same."""


class DefaultStream(Stream):
    """Of a device."""

    def __init__(self, device=None):
        self.device = torch.device("cuda", index_of(device))
        self.id = 0


class Event:
    """The clock's time."""

    def __init__(self, enable_timing=False):
        self.time = 0.0

    def record(self, stream=None):
        self.time = time.perf_counter()

    def elapsed_time(self, later):
        return (later.time - self.time) * 1e3

    def synchronize(self):
        """Nothing is left to wait for."""


def index_of(device=None) -> int:
    """The number of a device, or of the current one."""
    if isinstance(device, int):
        return device
    index = torch.device(device).index if device is not None else None
    return DEVICE.current_device() if index is None else index


def exchange_device(index: int) -> int:
    """As torch._C._cuda_exchangeDevice."""
    before = DEVICE.current_device()
    if index >= 0:
        DEVICE.set_device(index)
    return before


@contextmanager
def stream(of: Stream):
    """As torch.cuda.stream."""
    current = exchange_device(of.device.index)
    before = DEVICE.exchange_stream(of.device.index, of.id)
    try:
        yield
    finally:
        DEVICE.exchange_stream(of.device.index, before)
        exchange_device(current)


@contextmanager
def capture(into):
    """As torch.cuda.graph: on a stream of its own."""
    with stream(Stream()):
        into.begin()
        try:
            yield
        finally:
            into.end()


def install() -> None:
    """From here on, torch and fastops have two CUDA devices."""
    global DEVICE
    path = library()
    sys.modules["fastops._C"] = load("fastops._C", path)
    DEVICE = load("_device", path)
    cuda, sync = torch.cuda, DEVICE.set_sync_is_an_error
    cuda._lazy_init = lambda: None
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.device_count = DEVICE.device_count
    cuda.current_device = DEVICE.current_device
    cuda.set_device = lambda device: DEVICE.set_device(index_of(device))
    cuda._exchange_device = cuda._maybe_exchange_device = exchange_device
    cuda.synchronize = lambda device=None: None
    cuda.is_current_stream_capturing = DEVICE.capturing
    cuda.Stream, cuda.stream, cuda.current_stream = Stream, stream, DefaultStream
    cuda.CUDAGraph, cuda.graph = DEVICE.Graph, capture
    cuda.set_sync_debug_mode = lambda mode: sync(mode in (2, "error"))
    cuda.default_generators = (torch.default_generator,) * cuda.device_count()
    cuda.get_device_name = lambda device=None: "this process's memory"
    cuda.Event = Event
    cuda.mem_get_info = lambda device=None: (0, 0)
    cuda._sleep = lambda cycles: None
    DEVICE.install()


def pytest_configure():
    """As a plugin: before anything imports fastops."""
    install()


DEVICE = None
