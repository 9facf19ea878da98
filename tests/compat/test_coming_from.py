"""docs/coming-from.md lists every test, example and notebook of NNI and AutoQNN, each with a test here."""

from __future__ import annotations

import re

import pytest

from tests import ROOT
from tests.compat.coming_from import PAGE, PROJECTS, VERDICTS, rows, written

FOLDER = ROOT / "tests" / "compat"


@pytest.mark.parametrize("project", PROJECTS)
def test_each_row_has_a_verdict_a_reason_and_a_test(project: str) -> None:
    for there, what, verdict, why, test in rows(project):
        assert verdict in VERDICTS, there
        assert what, there
        assert verdict == "runs" or why, there
        name, _, function = test.partition("::")
        text = (FOLDER / name).read_text(encoding="utf-8")
        assert re.search(rf"^def {function}\(", text, re.MULTILINE), test


def test_the_page_is_written_from_the_rows() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == written(page), "run python -m tests.compat.coming_from"
