"""Notebooks in docs/: what they show comes from running them as they are, and they still run."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOKS = sorted(DOCS.rglob("*.ipynb"))
SHORT = """
warm_start_steps, steps, prompts_per_step, group_size = 2, 2, 4, 4
head = {"tokens": 8, "hidden": 32, "vocabulary": 1000}
"""

pages = pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda p: p.name)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def assigned(source):
    return {
        node.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def shown(notebook):
    """The texts of all outputs."""
    for cell in code_cells(notebook):
        for output in cell.outputs:
            yield output.get("text", "")
            yield from (v for k, v in output.get("data", {}).items() if k.startswith("text/"))


@pages
def test_outputs_are_of_one_whole_run(page):
    notebook = nbformat.read(page, 4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    for text in shown(notebook):
        assert not re.search(r"(?<![\w.])/(tmp|home|work|root|usr|var|opt)/", text), text
        assert "\x1b" not in text, text
    assert notebook.metadata == {"language_info": {"name": "python"}}, "make notebooks"


@pages
def test_links(page):
    for cell in nbformat.read(page, 4).cells:
        if cell.cell_type == "markdown":
            for link in re.findall(r"\]\(([^)\s#]+)", cell.source):
                assert "://" in link or (page.parent / link).exists(), link


@pages
def test_runs(page, tmp_path):
    """As it is, but with a few small steps."""
    notebook = nbformat.read(page, 4)
    tagged = [c for c in code_cells(notebook) if "parameters" in c.metadata.get("tags", ())]
    assert len(tagged) == 1
    assert assigned(SHORT) == assigned(tagged[0].source)
    tagged[0].source += SHORT
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()  # raises where a cell does
    assert all(cell.execution_count for cell in code_cells(notebook))
