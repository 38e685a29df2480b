"""Losses and advantages beside TRL's own code and verl's formulas, as docs/conformance.md says."""

from pathlib import Path

import conformance_policy  # noqa: F401
import conformance_preference  # noqa: F401
import conformance_verl  # noqa: F401
import pytest
from conformance_data import CASES, VERL, difference

PAGE = Path(__file__).parent.parent / "docs" / "conformance.md"


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_trl(name):
    pytest.importorskip("trl")
    value, gradient = difference(CASES[name], seeds=3)
    assert value < 1e-6 and gradient < 1e-6


@pytest.mark.parametrize("name", VERL)
def test_agrees_with_verls_formula(name):
    value, gradient = difference(VERL[name], seeds=3)
    assert value < 1e-6 and gradient < 1e-6


@pytest.mark.skipif(not PAGE.exists(), reason="the docs are not part of a wheel")
def test_the_page_lists_every_case():
    page = PAGE.read_text()
    missing = [name for name in (*CASES, *VERL) if f"| {name} |" not in page]
    assert not missing
