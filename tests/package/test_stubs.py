"""fastops/_C.pyi says what the extension has: neither less, nor more, nor another signature."""

import ast

import pytest

from tools import stubs

with_mypy = pytest.mark.integration("mypy")


def test_signatures_are_the_extensions():
    """Which stubtest cannot see: C++ functions have them in their docstrings only."""
    written = ast.dump(ast.parse(stubs.STUB.read_text()))
    assert written == ast.dump(ast.parse(stubs.stub())), "`make stubs` writes the file anew"


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
