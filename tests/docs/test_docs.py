"""The README and the site under docs: pages, links and figures are there, snippets run, the reference is whole, and the site
builds without a warning."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastops

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
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
    [p for p in (*PAGES, "../README.md") if snippets(p) and p not in NEEDS],
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


def test_the_readme_is_short_and_its_quick_start_is_run():
    assert len(README.splitlines()) <= 150
    (start,) = snippets("../README.md")
    assert len(start.splitlines()) == 12
    for name in ("serve_torch(", "patch(", "cross_entropy(", "optim.AdamW(", "max_grad_norm="):
        assert name in start
    assert any("../README.md" in group for group in GROUPS if isinstance(group, list))


def test_figures_of_the_readme_are_measured():
    """What the README says of speed is what the tables of docs/benchmarks.md say, which also say how it was measured."""
    lines = re.findall(r"^\| (.*) \|$", (DOCS / "benchmarks.md").read_text(), re.M)
    table = {row[0]: row[1:] for row in (line.split(" | ") for line in lines)}

    def both(op: str, size: str) -> list[str]:
        """Forward + backward of an op at a size."""
        sizes, _, ratios = table[op]
        return [ratios.split(" / ")[sizes.split(", ").index(size)].rstrip("c")]

    steps = [table[name][k].split()[0] for name in ("Adam", "AdamW", "SGD") for k in (0, 1)]
    claims = {
        r"gelu is ([\d.]+) times": both("gelu", "16M"),
        r"relu ([\d.]+) times": both("relu", "16M"),
        r"32,000 classes it is ([\d.]+) times": both("cross_entropy", "512x32000"),
        r"AdamW\s+is ([\d.]+) times": [table["AdamW"][2].split()[0]],
        r"([\d.]+) to ([\d.]+) times as fast on ResNet-18 and ResNet-50": [min(steps), max(steps)],
        r"relu, forward and backward, is\s+([\d.]+) times": both("relu", "16"),
    }
    said = re.search(r"^## When it helps.*?\n(.*?)^## ", README, re.M | re.S)[1]
    for claim, figures in claims.items():
        found = re.search(claim, said)
        assert found and list(found.groups()) == figures, claim
    assert len(re.findall(r"[\d.]+ times", said)) == len(claims)


def headings(path: Path) -> set[str]:
    """The anchors of a page, as GitHub and mkdocs make them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\s-]", "", t).strip().lower().replace(" ", "-") for t in titles}


PROSE = ["README.md", "CONTRIBUTING.md", *(f"docs/{page}" for page in PAGES)]


@pytest.mark.parametrize("name", PROSE)
def test_links_lead_somewhere(name):
    path = ROOT / name
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        if name.startswith("docs/"):  # the site has no other files
            assert DOCS in (target, *target.parents), link
        if anchor and not anchor.startswith("fastops."):  # those are of the reference
            assert anchor in headings(target), link


def test_the_overviews_name_every_function_and_optimizer():
    text = (DOCS / "api/functional.md").read_text()
    table = re.search(r"^\| kind \|.*\n(?:\|.*\n)+", text, re.M)[0]
    assert sorted(re.findall(r"`(\w+)`", table)) == sorted(fastops.functional.__all__)
    optimizers = {n for n in fastops.optim.__all__ if n != "param_groups"}
    assert len(optimizers) == 11
    named = set(re.findall(r"^\| `(\w+)` \|", (DOCS / "api/optim.md").read_text(), re.M))
    assert named == optimizers
    assert all(re.search(rf"\b{name}\b", README) for name in optimizers)


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
