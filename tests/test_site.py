"""The documentation site: what `make docs` builds from, checked without building it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from docs.site_pages import reference, repository
from tests import ROOT
from tests.test_docs import runnable_blocks
from tests.test_exports import MOVED, PUBLIC
from torchquant.errors import ConfigError
from torchquant.ptq import PTQ
from torchquant.quantizers import make_quantizer

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
OTHERS = (ROOT / "docs" / "coming-from-others.md").read_text(encoding="utf-8")


def test_every_public_name_is_in_the_reference() -> None:
    shown = {package for packages in reference.TASKS.values() for package in packages}
    assert shown - set(PUBLIC) == set()
    assert set(PUBLIC) - shown - set(MOVED) == {"torchquant.compat.autoqnn"} - shown
    pages = "".join(reference.pages().values())
    for address in shown:
        assert [name for name in PUBLIC[address] if f"{address}.{name}" not in pages] == []


def test_the_readme_is_short_and_shows_an_example_with_its_output() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 250
    assert runnable_blocks(text)[0][2] is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#|\{)([^)#\s]+)", page.read_text(encoding="utf-8"))
    made = ("catalogue/", "reference/", "repository/")
    assert [t for t in targets if not t.startswith(made) and not (page.parent / t).exists()] == []


def test_links_lead_into_the_site() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8") + "[a](docs/ptq.md) [b](CHANGELOG.md)"
    moved = repository.lead_into_site(text, "CONTRIBUTING.md", "repository/contributing.md")
    assert "[a](../ptq.md) [b](changelog.md)" in moved


def test_there_are_six_tutorials_without_stored_results() -> None:
    assert len(TUTORIALS) == 6
    for path in TUTORIALS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code"), path.name


def test_what_users_of_other_libraries_are_told_exists() -> None:
    stages = {
        s for line in OTHERS.splitlines() if "stage" in line for s in re.findall("`([a-z_]+)`", line.split("|")[2])
    }
    assert stages - set(PTQ) - {"smooth"} == set()
    for spec in set(re.findall(r'": "([a-z][a-z0-9_]*:[0-9][^"{} ]*)"', OTHERS)):
        try:
            make_quantizer(spec)
        except ConfigError:
            make_quantizer(spec, "output")
