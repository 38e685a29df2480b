"""README and docs/: links lead somewhere, examples run, tables name all that the code has."""

import importlib.util
import re
from pathlib import Path

import pytest

from fastrl.kernels import IMPLEMENTATIONS
from fastrl.train.stages import ALGORITHMS, FAMILIES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NOTEBOOKS = sorted(DOCS.rglob("*.ipynb"))  # test_notebook.py
LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_tables_are_what_the_code_holds():
    spec = importlib.util.spec_from_file_location("tables", DOCS / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    stale = [str(p) for p in PAGES if tables.filled(p.read_text()) != p.read_text()]
    assert not stale, "make tables writes them anew"
    holed = re.sub(r"^\| `seed` .*\n", "", (DOCS / "trainer.md").read_text(), flags=re.MULTILINE)
    assert tables.filled(holed) == (DOCS / "trainer.md").read_text() != holed


def anchors(page: Path) -> set[str]:
    """The slugs of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


@pytest.mark.parametrize(
    "page", [*ROOT.glob("*.md"), *PAGES], ids=lambda p: str(p.relative_to(ROOT))
)
def test_links(page):
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_navigation():
    listed = re.findall(
        r": ([\w/-]+\.(?:md|ipynb))$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE
    )
    assert sorted(listed) == sorted(str(p.relative_to(DOCS)) for p in PAGES + NOTEBOOKS)


def test_tables_name_every_algorithm_family_and_op():
    algorithms = (DOCS / "algorithms.md").read_text()
    rows = set(re.findall(r"^\| `([\w+]+)` \|", algorithms, re.MULTILINE))
    assert set(ALGORITHMS) <= rows
    for family in FAMILIES:
        own = family.__annotations__.keys() & family.model_fields.keys()
        assert own - {"algorithm"} <= rows, family
    index = (DOCS / "index.md").read_text()
    assert set(IMPLEMENTATIONS) <= set(re.findall(r"^\| `(\w+)`", index, re.M))


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted(DOCS.glob("ops/*.md"))], ids=lambda p: p.name
)
def test_examples_run(page):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    names = {}
    for block in blocks:
        if "fastrl.patch" not in block:  # needs another framework's trainer
            exec(compile(block, page.name, "exec"), names)
    assert names
