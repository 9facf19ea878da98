"""How Sphinx builds the documentation site: `make docs`. docs/decisions/0060 says why Sphinx."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torchquant
from docs.site_pages import FOLDERS, write_pages
from docs.site_pages.docstrings import to_rst
from docs.site_pages.repository import lead_into_site

project = "torchquant"
release = torchquant.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns = ["_build", "site_pages"]
html_theme = "furo"
html_title = "torchquant"
html_show_copyright = False
html_copy_source = False

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

nb_execution_mode = "force"
nb_execution_timeout = 60  # seconds for a cell
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 100
suppress_warnings = ["config.cache", "myst.header"]


def _to_rst(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = to_rst("\n".join(lines)).splitlines()


def _lead_into_site(app: Sphinx, page: str, source: list[str]) -> None:
    if (ROOT / "docs" / f"{page}.md").is_file() and not page.startswith(FOLDERS):
        source[0] = lead_into_site(source[0], f"docs/{page}.md", f"{page}.md")


def setup(app: Sphinx) -> None:
    """Write the generated pages before any page is read, and let docstrings be translated."""
    write_pages(Path(app.srcdir))
    app.connect("source-read", _lead_into_site)
    app.connect("autodoc-process-docstring", _to_rst)
