"""csrc/cuda as a library of this process: its rows, calls on torch CPU tensors, and tensors between guard pages."""

import ctypes
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import torch

from .build import ROOT, build, kernels

DTYPES = {
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bfloat16: 15,
}  # c10::ScalarType
ORDERS = [(0, 0), (1, 0), (2, 7)]  # forward, reverse, shuffled by a seed
COUNTERS = "launches blocks threads loads loaded_bytes wide_loads stores stored_bytes wide_stores"
SECTORS = "load_requests store_requests loaded_sectors stored_sectors"
KINDS = ["elementwise", "fused", "gate", "loss", "softmax", "cross_entropy", "dropout", "optimizer"]

POINTER, I64, F64, BOOL, TEXT = (
    ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_bool, ctypes.c_char_p,
)  # fmt: skip


def sources():
    return [*kernels(), ROOT / "tests" / "emulation" / "kernels.cpp"]


@cache
def library() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(build("kernels", sources(), shared=True)))
    lib.run_optimizer_averaged.restype = lib.run_optimizer_extended.restype = (
        lib.run_norm.restype
    ) = TEXT
    lib.optimizer_options.restype = TEXT
    lib.optimizer_counts.restype = BOOL
    lib.numbers_bytes.restype = I64
    lib.scalars_for_step.restype = None
    lib.run_dropout_backward.restype = lib.run_cross_entropy_probability.restype = TEXT
    lib.run_divisor.restype = lib.run_rescale.restype = lib.run_probe.restype = TEXT
    for kind in KINDS:
        getattr(lib, f"{kind}_name").restype = TEXT
        getattr(lib, f"run_{kind}").restype = TEXT
    lib.elementwise_params.restype = lib.loss_params.restype = TEXT
    lib.elementwise_from_output.restype = lib.fused_broadcast.restype = BOOL
    lib.emulation_release.restype = lib.emulation_protect.restype = BOOL
    lib.optimizer_in_double.restype = lib.optimizer_in_float.restype = (
        lib.second_in_float.restype
    ) = BOOL
    lib.workspace_bytes.restype = I64
    lib.emulation_allocate.restype = POINTER
    lib.emulation_allocate.argtypes = [ctypes.c_size_t, ctypes.c_size_t, BOOL]
    lib.emulation_release.argtypes = lib.emulation_protect.argtypes = [POINTER]
    lib.emulation_order.argtypes = [ctypes.c_int, ctypes.c_uint64]
    lib.emulation_multiprocessors(1)  # the smallest grids: loops go round at small sizes
    return lib


def defaults(params: str) -> list[float]:
    """The default values in a row's "float alpha=1.0, float beta=20"."""
    return [float(param.split("=")[1]) for param in params.split(",") if "=" in param]


def rows(kind: str) -> list[SimpleNamespace]:
    """The rows of one table: index and name, and what else the kind has."""
    lib, found = library(), []
    while name := getattr(lib, f"{kind}_name")(ctypes.c_size_t(len(found))):
        index = ctypes.c_size_t(len(found))
        row = SimpleNamespace(kind=kind, index=index, name=name.decode())
        if kind in ("elementwise", "loss"):
            declared = getattr(lib, f"{kind}_params")(index).decode()
            row.params, row.weighted = defaults(declared), "Tensor" in declared
        if kind == "elementwise":
            row.from_output = lib.elementwise_from_output(index)
        if kind == "fused":
            row.broadcast = lib.fused_broadcast(index)
        if kind == "dropout":
            row.inputs = lib.dropout_inputs(index)
        if kind == "optimizer":
            row.states, row.numbers = lib.optimizer_states(index), lib.optimizer_numbers(index)
            row.options = lib.optimizer_options(index).decode().split(", ")
            row.counts = lib.optimizer_counts(index)
        found.append(row)
    return found


class Device:
    """ "Device memory" for one call: every buffer lies between pages that cannot be touched, `offset` elements after a
    16-byte boundary; or, with flush=True, ends right at the page behind it. Leaving the block frees them, and checks that
    nothing beside them was written."""

    def __init__(self, offset=0, flush=False):
        self.offset, self.flush, self.buffers = offset, flush, []

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        whole = [library().emulation_release(buffer) for buffer in self.buffers]
        assert kind or all(whole), "memory beside a buffer was overwritten"

    def empty(self, shape, dtype, offset=None):
        size = torch.empty(0, dtype=dtype).element_size()
        count = torch.Size([shape] if isinstance(shape, int) else shape).numel()
        offset = self.offset if offset is None else offset
        buffer = library().emulation_allocate(count * size, offset * size, self.flush)
        assert buffer, "out of memory"
        self.buffers.append(buffer)
        if not count:
            tensor = torch.empty(0, dtype=dtype)
        else:
            tensor = torch.frombuffer(
                (ctypes.c_char * (count * size)).from_address(buffer), dtype=dtype
            )
        tensor = tensor.view(shape)
        tensor.address = buffer
        return tensor

    def copy(self, tensor, offset=None):
        made = self.empty(tensor.shape, tensor.dtype, offset)
        made.copy_(tensor)
        return made

    def constant(self, tensor, offset=None):
        """A copy that nobody may write to."""
        made = self.copy(tensor, offset)
        assert library().emulation_protect(made.address)
        return made


def address(tensor):
    if tensor is None:
        return POINTER()
    return POINTER(tensor.address if hasattr(tensor, "address") else tensor.data_ptr())


def doubles(values):
    return (F64 * max(len(values), 1))(*values)


class Fault(RuntimeError):
    """What a launcher returned."""


def call(function: str, *arguments):
    error = getattr(library(), function)(*arguments)
    if error:
        raise Fault(error.decode())


@contextmanager
def order(kind, seed):
    library().emulation_order(kind, seed)
    try:
        yield
    finally:
        library().emulation_order(0, 0)


def counters() -> SimpleNamespace:
    """What the emulator counted since this was last called."""
    values = (ctypes.c_uint64 * 9)()
    library().emulation_counters(values)
    return SimpleNamespace(**dict(zip(COUNTERS.split(), values, strict=True)))


def traffic(run) -> SimpleNamespace:
    """The counters of run(), and its 32-byte sectors: those that warps' instructions ask for, and the different ones."""
    values = (ctypes.c_uint64 * 4)()
    counters()
    library().emulation_record(BOOL(True))
    try:
        run()
        library().emulation_sectors(values)
    finally:
        library().emulation_record(BOOL(False))
    return SimpleNamespace(**vars(counters()), **dict(zip(SECTORS.split(), values, strict=True)))
