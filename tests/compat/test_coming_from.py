"""docs/coming-from.md lists every test, example and notebook of NNI and AutoQNN, each with a test here."""

from __future__ import annotations

import re

import pytest

from tests import ROOT
from tests.compat.coming_from import PAGE, PROJECTS, VERDICTS, rows, written

FOLDER = ROOT / "tests" / "compat"


@pytest.mark.parametrize("project", PROJECTS)
def test_each_row_has_a_verdict_a_reason_and_a_test(project: str) -> None:
    texts = [path.read_text(encoding="utf-8") for path in FOLDER.glob("test_*.py")]
    for row in rows(project):
        assert row.verdict in VERDICTS, row
        assert row.what, row
        assert row.verdict == "runs" or row.why, row
        n_found = sum(len(re.findall(rf"^def {row.test}\(", text, re.MULTILINE)) for text in texts)
        assert n_found == 1, row


def test_the_page_is_written_from_the_rows() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == written(page), "run python -m tests.compat.coming_from"
