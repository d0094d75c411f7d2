"""The architecture: what may include what, one formula once, and that the table is what everything is made from."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastops
from fastops import functional
from fastops._core.registry import COMPOSED, KERNELS, OPS, overload

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"


def files(folder: str, *endings: str) -> list[Path]:
    found = [p for p in sorted((CSRC / folder).iterdir()) if p.suffix in endings]
    assert found
    return found


def includes(path: Path) -> list[str]:
    return re.findall(r"^\s*#\s*include\s+[<\"]([^>\"]+)[>\"]", path.read_text(), re.M)


def test_formulas_know_nothing_but_the_vocabulary():
    known = {"../math.h", *(path.name for path in files("formulas", ".h"))}
    for path in files("formulas", ".h"):
        assert includes(path) and set(includes(path)) <= known, path.name
        assert not re.search(
            r"\b(for|while|Vectorized|blockIdx|Tensor)\b *\(", path.read_text()
        ) or path.name in {
            "philox.h"  # its ten rounds
        }, path.name


def test_cpu_loops_know_no_torch():
    for path in files("cpu", ".h", ".cpp"):
        for name in includes(path):
            assert not name.startswith(("torch/", "ATen/ops", "ATen/core")), (path.name, name)
            assert name not in ("vector", "string", "functional"), (path.name, name)


def test_cuda_kernels_know_no_torch():
    for path in files("cuda", ".cu", ".cuh"):
        for name in includes(path):
            assert not name.startswith(("torch/", "ATen/")), (path.name, name)


def test_torch_layer_names_no_elementwise_op():
    """Kinds of many rows are registered from the table: their files name none."""
    for kind, name in (
        ("elementwise", "elementwise.cpp"),
        ("fused", "fused.cpp"),
        ("loss", "loss.cpp"),
    ):
        text = (CSRC / "torch" / name).read_text()
        for row in (r for r, (k, _) in KERNELS.items() if k == kind and r != "sum"):
            assert f'"{row}' not in text, (name, row)


def test_files_pair_up():
    cpu = {p.stem for p in files("cpu", ".cpp")}
    assert cpu == {p.stem for p in files("cuda", ".cu")}
    assert cpu <= {p.stem for p in files("kernels", ".h")}
    kinds = cpu - {"optimizer", "gradient_norm"}  # in csrc/torch a folder
    kinds -= {"softmax"}  # in cross_entropy's file there
    assert kinds <= {p.stem for p in files("torch", ".cpp")} and files("torch/optimizer", ".cpp")


def test_every_public_function_is_in_the_table():
    assert sorted(functional.__all__) == sorted(OPS.keys() | COMPOSED.keys())
    for name, op in OPS.items():
        assert op.function is getattr(functional, name)
        for row in op.kernels:
            assert row in KERNELS


def test_every_kernel_is_public():
    used = {row for op in OPS.values() for row in op.kernels}
    assert used == {r for r, (kind, _) in KERNELS.items() if kind != "optimizer" and r != "sum"}


@pytest.mark.parametrize("name", sorted(OPS))
def test_docstring_and_signature(name):
    op = OPS[name]
    doc = inspect.getdoc(op.function)
    assert doc and "torch.nn.functional" in doc and "Example" in doc
    try:
        theirs = inspect.signature(op.reference)
    except ValueError:  # a builtin
        return
    ours = list(op.signature.parameters.values())
    for mine, other in zip(ours, theirs.parameters.values()):  # noqa: B905  ours may add keywords
        assert (mine.name, mine.default) == (other.name, other.default), name
    assert len(ours) >= len(theirs.parameters)


@pytest.mark.parametrize("name", sorted(COMPOSED))
def test_docstring_of_composed_functions(name):
    assert COMPOSED[name] is getattr(functional, name)
    assert "Raises:" in (doc := inspect.getdoc(COMPOSED[name])) or "torch.nn.functional" in doc


@pytest.mark.parametrize("row", [r for r, (kind, _) in KERNELS.items() if kind == "elementwise"])
def test_schema_has_the_formulas_parameters(row):
    arguments = overload(row)._schema.arguments[1:]
    assert [(a.name, a.default_value) for a in arguments] == fastops._core.registry.parameters_of(
        row
    )


def test_every_function_has_a_function_class_and_all_names_exist():
    for module in (
        fastops,
        fastops.autograd,
        fastops.functional,
        fastops.nn,
        fastops.optim,
        fastops.memory,
    ):
        for name in module.__all__:
            assert hasattr(module, name), (module.__name__, name)
    for row, (kind, _) in KERNELS.items():
        if kind != "optimizer" and row != "sum":
            function = getattr(fastops.autograd, fastops.autograd.class_name(row))
            assert issubclass(function, torch.autograd.Function)


def test_version_is_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastops.__version__)
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert 'version = { attr = "fastops.__version__" }' in pyproject
    assert fastops.__version__ not in pyproject + (ROOT / "setup.py").read_text()
    assert f"## {fastops.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_a_wheel_holds_every_package():
    from setuptools import find_namespace_packages

    text = (ROOT / "pyproject.toml").read_text()
    (listed,) = re.findall(r"^packages = \[(.*?)\]", text, re.M | re.S)
    packages = re.findall(r'"([\w.]+)"', listed)
    found = find_namespace_packages(str(ROOT), include=["fastops*"], exclude=["*__pycache__*"])
    assert sorted(packages) == sorted(found)
    for folder in {p.parent for p in (ROOT / "fastops").rglob("*.pyi")}:  # and every stub
        package = ".".join(folder.relative_to(ROOT).parts)
        assert re.search(rf'^"?{re.escape(package)}"? = \[.*"\*\.pyi"', text, re.M), package


def test_no_private_words():
    """No path of a developer's machine, no registry host."""
    pattern = re.compile(
        r"/work/|/root/|/home/\w|pypi\.org|https?://[\w.]*(?:artifactory|nexus|proxy)"
    )
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("*.toml"),
        *ROOT.glob("csrc/**/*.*"),
        *ROOT.glob("fastops/**/*.py"),
    ]:
        if path.is_file() and path.suffix not in {".so", ".npz", ".png", ".pt"}:
            assert not pattern.search(path.read_text(errors="ignore")), path


def test_import_does_not_import_the_compiler():
    """torch._dynamo doubles the time that `import torch` takes; what it needs of us is told when it is imported."""
    script = "import sys, fastops; assert 'torch._dynamo' not in sys.modules; import torch._dynamo"
    subprocess.run([sys.executable, "-c", script], check=True)
