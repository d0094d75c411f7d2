"""The repository itself: lines and pins that no linter checks, and that what documents and CI name is there."""

import re
from pathlib import Path

import pytest

import fastops

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][\w-]*):", MAKEFILE, re.M))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def cpp_files():
    endings = {".cpp", ".h", ".cu", ".cuh"}
    found = [p for d in ("csrc", "tests") for p in (ROOT / d).rglob("*") if p.suffix in endings]
    assert len(found) > 30
    return found


def test_lines_of_cpp_have_100_columns():
    """clang-format leaves a long string or name as it is."""
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in cpp_files()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 100
    ]
    assert long == []


def test_every_tool_has_one_version():
    pins = dict(re.findall(r"([\w-]+)==([\d.]+)", re.search(r"^LINTERS := (.*)$", MAKEFILE, re.M)[1]))  # fmt: skip
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    found = dict(re.findall(r"repo: \S+?/(?:mirrors-)?([\w-]+?)(?:-pre-commit)?\n\s+rev: v([\d.]+)", hooks))  # fmt: skip
    assert found == pins


def test_the_citation_is_of_this_version():
    assert f"\nversion: {fastops.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_ci_runs_make_targets_alone(path):
    steps = re.findall(r"^\s*(?:- )?run: (.*)$", path.read_text(), re.M)
    assert steps
    for step in steps:
        assert re.fullmatch(r"make [\w-]+( [A-Z]+=.*)?", step), step
        assert step.split()[1] in TARGETS, step


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_commands_of_make_that_are_shown_exist(name):
    shown = set(re.findall(r"(?:`|^    )make ([a-z][\w-]*)", (ROOT / name).read_text(), re.M))
    assert shown and shown <= TARGETS


def test_tests_share_modules_and_not_each_other():
    """What two files need lies beside the folders; and as pytest imports files by name alone, no two have one name."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    tests = [p for p in files if p.name.startswith("test_")]
    assert len(tests) > 40 and len({p.name for p in tests}) == len(tests)
    for path in files:
        assert not re.search(r"^\s*(?:from|import) test_", path.read_text(), re.M), path
    assert not [p for p in tests if p.parent == ROOT / "tests"], "tests belong in a folder"
