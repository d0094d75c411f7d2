"""What is no tensor: torch's TypeError, from functions, modules and autograd.Functions alike."""

import inspect

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastops.autograd
import fastops.functional
import fastops.nn
from fastops._core.registry import COMPOSED, KERNELS, OPS

PUBLIC = {**{n: op.function for n, op in OPS.items()}, **COMPOSED}
X = torch.ones(2, 3)


def tensor_parameters(function):
    """Names of the parameters that are tensors, with whether None is one of their values."""
    found = inspect.signature(function).parameters.values()
    return {p.name: "None" in str(p.annotation) for p in found if str(p.annotation) in ("Tensor", "Tensor | None")}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PUBLIC))
@pytest.mark.parametrize("value", [3, 2.5, "text", [1.0], numpy.ones(2)], ids=lambda v: type(v).__name__)  # fmt: skip
def test_a_function_names_the_argument(name, value):
    function = PUBLIC[name]
    required = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    special = {"bias": X[0], "lam": 0.5}
    good = {n: special.get(n, X) for n in required}
    tensors = tensor_parameters(function)
    for position, argument in enumerate(required, 1):
        if argument not in tensors:
            continue
        kind = "numpy.ndarray" if isinstance(value, numpy.ndarray) else type(value).__name__
        says = rf"{name}\(\): argument '{argument}' \(position {position}\) must be Tensor, not {kind}$"
        with pytest.raises(TypeError, match=says):
            function(**{**good, argument: value})
        with pytest.raises(TypeError, match=says):
            function(*{**good, argument: value}.values())


def test_the_words_are_torchs():
    for value in (3, None, numpy.ones(2), "text"):
        with pytest.raises(TypeError) as theirs:
            F.gelu(value)
        with pytest.raises(TypeError) as ours:
            fastops.functional.gelu(value)
        assert str(ours.value) == str(theirs.value)


def test_other_type_errors_are_left():
    with pytest.raises(TypeError, match="unexpected keyword"):
        fastops.functional.mse_loss(X, X, none=1)
    with pytest.raises(TypeError) as caught:
        fastops.functional.leaky_relu(X, "steep")
    assert "must be Tensor" not in str(caught.value)


@pytest.mark.parametrize("row", [r for r, (k, _) in KERNELS.items() if k in ("elementwise", "softmax", "loss")])  # fmt: skip
def test_an_autograd_function_names_the_argument(row):
    if row == "sum":
        return
    function = getattr(fastops.autograd, fastops.autograd.class_name(row))
    says = r"\.apply\(\): argument 'input' \(position 1\) must be Tensor, not int"
    with pytest.raises(TypeError, match=says):
        function.apply(3, *([X, 0] if KERNELS[row][0] == "loss" else [0]))


@pytest.mark.parametrize("cls", fastops.nn.MODULES.values(), ids=lambda c: c.__name__)
def test_a_module_names_the_argument(cls):
    if cls is fastops.nn.NLLLoss:  # torch's own
        return
    given = {
        "Softmax2d": {},
        "Softmax": {"dim": 1},
        "BatchNorm": {"num_features": 3},
        "Norm": {"normalized_shape": 3},
    }
    module = cls(**next((a for word, a in given.items() if word in cls.__name__), {}))
    arguments = [3, X] if "Loss" in cls.__name__ else [3]
    with pytest.raises(TypeError, match=r"argument 'input' \(position 1\) must be Tensor, not int"):
        module(*arguments)
    assert isinstance(X, Tensor)
