"""The committed leaderboard: the page is made from the file, and the file shows what the README says of it."""

from __future__ import annotations

import pytest

from tests import ROOT
from torchquant.runs.compare import Row, markdown, read_leaderboard

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, int, int], Row]:
    found, _, _ = read_leaderboard(DOCS / "leaderboard.json")
    return {(row.scheme, row.weight_bits, row.acts_bits): row for row in found}


def test_the_page_is_made_from_the_results() -> None:
    page = markdown(*read_leaderboard(DOCS / "leaderboard.json"))
    assert page == (DOCS / "leaderboard.md").read_text(encoding="utf-8")


def test_every_width_and_three_seeds_are_there(rows: dict[tuple[str, int, int], Row]) -> None:
    for scheme in (
        "affine",
        "lsq",
        "lsqplus",
        "ewgs",
        "pact",
        "dorefa",
        "esb",
        "apot",
        "tqt",
        "qfmt",
        "vecq",
        "codebook",
    ):
        for weight_bits in (2, 3, 4):
            for acts_bits in (2, 4, 8):
                assert rows[scheme, weight_bits, acts_bits].seeds == 3
    assert all(row.seeds == 3 for row in rows.values())


@pytest.mark.parametrize("scheme", ["lsq", "lsqplus", "ewgs"])
def test_learned_steps_beat_ranges_at_two_bits_by_a_clear_margin(
    scheme: str, rows: dict[tuple[str, int, int], Row]
) -> None:
    learned, ranges = rows[scheme, 2, 2], rows["affine", 2, 2]
    assert learned.accuracy - ranges.accuracy > 0.2
    assert learned.accuracy - ranges.accuracy > 4 * (learned.spread + ranges.spread)
