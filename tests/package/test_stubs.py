"""The stubs say what is made at import: neither less, nor more, nor another signature."""

import ast
import re
import subprocess
import sys

import pytest

from tools import stubs

with_mypy = pytest.mark.integration("mypy")


@pytest.mark.parametrize("file", stubs.STUBS, ids=lambda f: str(f.relative_to(stubs.ROOT)))
def test_signatures_are_what_is_there(file):
    """For the extension stubtest cannot see them: C++ functions have them in their docstrings only."""
    text = stubs.STUBS[file]()
    known = {n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    assert known

    def content(text):
        """Without imports, which ruff sorts."""
        tree = ast.parse(text)
        tree.body = [n for n in tree.body if not isinstance(n, ast.Import | ast.ImportFrom)]
        return ast.dump(tree)

    assert content(file.read_text()) == content(text), "`make stubs` writes the file anew"


@with_mypy
def test_type_checkers_see_what_is_made_at_import(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import torch\nimport fastops.autograd\nimport fastops.functional as F\nimport fastops.nn\n"
        "import fastops.optim\n"
        "y: torch.Tensor = F.gelu(fastops.nn.ReLU(inplace=True)(torch.ones(2)))\n"
        "z: torch.Tensor = fastops.autograd.LeakyReLUFunction.apply(y, 0.1)\n"
        "optimizer = fastops.optim.AdamW([y], lr=1e-3, ema_decay=0.9)\n"
        "fastops.autograd.ReLUFunction.apply('text')  # error: arg-type\n"
        "fastops.nn.ReLU(nothing=1)  # error: call-arg\n"
        "fastops.optim.SGD([y], nothing=1)  # error: call-arg\n"
    )
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--follow-imports=silent", str(program)]  # fmt: skip
    done = subprocess.run(command, cwd=stubs.ROOT, capture_output=True, text=True)
    found = [tuple(re.search(r":(\d+): error: .*\[([\w-]+)\]", line).groups()) for line in done.stdout.splitlines() if ": error:" in line]  # fmt: skip
    assert found == [("9", "arg-type"), ("10", "call-arg"), ("11", "call-arg")], done.stdout


@with_mypy
def test_stubtest_agrees():
    done = stubs.stubtest()
    assert done.returncode == 0, done.stdout + done.stderr


@with_mypy
def test_stubtest_sees_what_is_missing_and_what_is_not_there(tmp_path, monkeypatch):
    text = stubs.STUB.read_text()
    for old, new in (("def mish(", "def mash("), ("    def step(", "    def stop(")):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "fastops").mkdir()
    for file in stubs.STUB.parent.iterdir():
        if file.name != "_C.pyi":
            (tmp_path / "fastops" / file.name).symlink_to(file)
    (tmp_path / "fastops" / "_C.pyi").write_text(text)
    monkeypatch.setattr(stubs, "ROOT", tmp_path)
    done = stubs.stubtest()
    assert done.returncode == 1
    for says in (
        "mash is not present at runtime", "mish is not present in stub",
        "OptimizerStepper.stop is not present at runtime", "OptimizerStepper.step is not present in stub",
    ):  # fmt: skip
        assert says in done.stdout, done.stdout
