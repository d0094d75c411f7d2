"""Under autocast every op gives the dtype that torch gives on that device. The lists differ: torch's CPU autocast leaves
softmax in bfloat16, its CUDA autocast does not."""

import pytest
import torch
from cases import FAST, cases
from torch._subclasses.fake_tensor import FakeTensorMode

ONE_EACH = [
    c for c in {(c.op.name, tuple(c.kwargs.items()).__repr__()): c for c in cases()}.values()
    if c.tensors[0].dim() > 1 or c.op.kind == "elementwise"
]  # fmt: skip
DTYPES = [torch.float64, FAST, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes_on_the_cpu(autocast, dtype):
    for case in ONE_EACH:
        case = case.to(dtype).leaves()
        with torch.autocast("cpu", dtype=autocast):
            ours, theirs = case(), case(case.op.reference)
        assert ours.dtype == theirs.dtype, case.name
        ours.sum().backward()
        assert case.tensors[0].grad.dtype == dtype


@pytest.fixture
def cuda_autocast():
    """Autocast on CUDA for tensors without values, which need no device."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.float16)
    yield
    torch.set_autocast_enabled("cuda", False)
    torch.clear_autocast_cache()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_on_cuda(cuda_autocast, dtype):
    """With tensors that have no values, so that no device is needed."""
    for case in ONE_EACH:
        if case.op.name == "binary_cross_entropy":
            continue  # torch refuses it there
        with FakeTensorMode():
            shapes = [torch.empty(t.shape, dtype=dtype if t.is_floating_point() else t.dtype, device="cuda") for t in case.tensors]  # fmt: skip
            kwargs = {
                k: torch.empty(v.shape, dtype=dtype, device="cuda") if isinstance(v, torch.Tensor) else v
                for k, v in case.kwargs.items()
            }  # fmt: skip
            ours = case.op.function(*shapes, **kwargs)
            theirs = case.op.reference(*shapes, **kwargs)
        assert ours.dtype == theirs.dtype, case.name


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_a_dtype_that_is_asked_for_wins(cuda_autocast, name):
    op = next(c.op for c in ONE_EACH if c.op.name == name)
    with FakeTensorMode():
        x = torch.empty(3, 4, dtype=torch.float16, device="cuda")
        for dtype in DTYPES:
            assert op.function(x, 1, dtype=dtype).dtype == dtype
            assert op.reference(x, 1, dtype=dtype).dtype == dtype
