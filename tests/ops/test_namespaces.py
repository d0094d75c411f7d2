"""One import is enough: names that fastops lacks are torch's own."""

import importlib

import pytest
import torch

import fastops

NAMESPACES = {
    "functional": (torch.nn.functional, ["linear", "conv2d", "scaled_dot_product_attention"]),
    "nn": (torch.nn, ["Linear", "Module", "Sequential", "utils"]),
    "optim": (torch.optim, ["lr_scheduler", "Optimizer", "LBFGS", "swa_utils"]),
}


@pytest.mark.parametrize("name", NAMESPACES)
def test_what_is_not_here_is_torchs(name):
    ours = importlib.import_module(f"fastops.{name}")
    theirs, some = NAMESPACES[name]
    for each in some:
        assert getattr(ours, each) is getattr(theirs, each)
        assert each in dir(ours)
    for each in dir(theirs):
        if not each.startswith("_"):
            assert hasattr(ours, each) and each in dir(ours), each
    for each in ours.__all__:
        assert getattr(ours, each).__module__.startswith("fastops"), each
    assert not set(some) & set(ours.__all__)  # not by `import *`


@pytest.mark.parametrize("name", NAMESPACES)
def test_what_neither_has_is_named(name):
    ours = importlib.import_module(f"fastops.{name}")
    with pytest.raises(AttributeError, match=f"neither fastops.{name} nor torch.* has 'no_such'"):
        ours.no_such  # noqa: B018
    with pytest.raises(ImportError):
        exec(f"from fastops.{name} import no_such")


def test_no_module_hides_a_function():
    """`fastops.functional.softmax` is the function, and the name of no module."""
    for package in (fastops.functional, fastops.nn, fastops):
        public = {n for n in package.__all__ if callable(getattr(package, n))}
        for name in public:
            with pytest.raises(ModuleNotFoundError):
                importlib.import_module(f"{package.__name__}.{name}")
