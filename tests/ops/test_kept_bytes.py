"""What autograd keeps for backward, counted in bytes, against what it keeps for torch's own functions. Inputs
and results are not counted: they are the caller's (torch's l1_loss keeps a difference where ours keeps two inputs, its
hardtanh keeps the input where ours keeps the result)."""

import pytest
import torch
from cases import Case, cases, ids

import fastops.functional as F

pytestmark = pytest.mark.quick

ALL = [
    c
    for c in cases()
    if any(part in c.name for part in ("-lines", "-rows", "-many classes", "-probabilities, many"))
]


def kept(case: Case, function=None) -> int:
    storages = {}

    def pack(t):
        storage = t.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = case(function)  # alive until after the sum: its memory must not be given to another
        assert y.requires_grad
    for t in (y, *case.tensors, *case.kwargs.values()):
        if isinstance(t, torch.Tensor):
            storages.pop(t.untyped_storage().data_ptr(), None)
    return sum(storages.values())


@pytest.mark.parametrize("case", ALL, ids=ids(ALL))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_more_is_kept_than_torch_keeps(case, dtype):
    case = case.to(dtype).leaves()
    assert kept(case) <= kept(case, case.op.reference)


def test_every_op_with_a_reference_is_counted():
    assert {c.op.name for c in ALL} == {c.op.name for c in cases()}


def test_dropout_keeps_its_seed():
    x = torch.randn(4096, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        F.dropout(x, 0.5)
    assert [t.nbytes for t in saved] == [8]


def test_cross_entropy_keeps_its_gradient_and_the_targets():
    x = torch.randn(64, 1000, requires_grad=True)
    t = torch.randint(0, 1000, (64,))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        F.cross_entropy(x, t)
    assert sorted(t.nbytes for t in saved) == [64 * 8, 64 * 1000 * 4]
