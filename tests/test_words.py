"""The words of docstrings and pages: sentences that stand alone, in the field's terms."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

HANGING = ("Of ", "Those ", "Whose ", "For one ", "One for each", "Also ", "Its ", "All of the above")
"""Beginnings of docstrings that hang on the name before them instead of standing alone."""
GONE = {
    "goes on asking": "still follows train() / eval()",
    "harm each option does alone": "per-layer sensitivity",
    "is repaired greedily": "a greedy pass restores the budget",
    "single steps at additions": "differences of one step (LSB) at Add nodes",
    "left alone": "not quantized",
    "of other worlds": "of other libraries",
    "goes on where": "resumes where",
    "without a word": "silently",
    "be followed": "be traced, where torch.fx does it",
    "that can be had": "the smallest possible value",
    "harms least": "of least degradation",
    "least harmful": "of least degradation",
    "is another now": "has changed",
    "nobody needs": "a throw-away copy",
    "weights of now": "the current weights",
    "searched place": "search point",
    "Whose it is": "Sources",
}
"""House words that are gone, with the field's."""
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = sorted((ROOT / "torchquant").rglob("*.py"))


def docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_docstrings_stand_alone(path: Path) -> None:
    for text in docstrings(path):
        assert not text.startswith(HANGING), text
        for word, better in GONE.items():
            assert word not in text, f"'{word}' in {text!r}: say {better}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_speak_the_words_of_the_field(path: Path) -> None:
    text = " ".join(path.read_text(encoding="utf-8").split())
    assert [word for word in GONE if word in text] == []
