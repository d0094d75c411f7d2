"""The site under docs: its pages are there, its snippets run, its reference is whole, and it builds without a warning."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NAV = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
PAGES = re.findall(r": (\S+\.md)$", NAV, re.M)
NEEDS = {
    "finetuning.md": ["torchvision"],
    "api/finetune.md": ["torchvision"],
    "integrations.md": ["transformers", "accelerate", "lightning", "timm"],
}

INCLUDED = {"integrations": ["fsdp2.py"], "training": ["pytorch_primer.py", "keras_primer.py"]}


def snippets(page: str) -> list[str]:
    """The Python that stands at the left margin: what is indented is an example with a test of its own."""
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.M | re.S)


def test_pages_are_those_of_the_nav():
    assert sorted(PAGES) == sorted(str(p.relative_to(DOCS).as_posix()) for p in DOCS.rglob("*.md"))


GROUPS = [
    *(pytest.param([p], marks=pytest.mark.integration(*names)) for p, names in NEEDS.items()),
    [p for p in PAGES if snippets(p) and p not in NEEDS],
]


@pytest.mark.parametrize("pages", GROUPS, ids=lambda pages: pages[0])
def test_snippets_run(pages, tmp_path):
    """The snippets of a page are one program; pages without needs of their own share a process, and no names."""
    programs = {page: "\n".join(snippets(page)) for page in pages}
    assert all(programs.values())
    code = f"for page, text in {programs!r}.items(): exec(compile(text, page, 'exec'), {{'__name__': '__main__'}})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_formula_that_is_shown_is_the_source():
    shown = re.search(r"^```cpp\n(.*?)^```$", (DOCS / "architecture.md").read_text(), re.M | re.S)
    assert shown and shown[1] in (ROOT / "csrc/formulas/activations.h").read_text()


@pytest.mark.integration("mkdocs", "mkdocstrings", "material")
def test_site_builds_without_a_warning_and_has_every_function(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"],
        capture_output=True, text=True, timeout=300, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("functional", "nn", "autograd"):
        page = (tmp_path / "site/api" / name / "index.html").read_text()
        public = importlib.import_module(f"fastops.{name}").__all__
        assert [n for n in public if f'id="fastops.{name}.{n}"' not in page] == []
    for html in (tmp_path / "site").rglob("*.html"):
        assert ":func:`" not in html.read_text(), html
    for page, examples in INCLUDED.items():
        text = (tmp_path / "site" / page / "index.html").read_text()
        for example in examples:
            defined = re.findall(r"^def (\w+)", (DOCS / "examples" / example).read_text(), re.M)
            assert defined and not [name for name in defined if name not in text], example
