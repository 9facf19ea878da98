"""Write HTML elements, in which every text is escaped unless it is `Html` already."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from html import escape
from typing import Any

VOID = ("img", "br", "meta")
"""Elements without an end tag."""


class Html(str):
    """Text that is HTML already, as `element` returns it."""


def element(name: str, /, *children: object, **attributes: object) -> Html:
    """Return an element with its children, which are escaped unless they are `Html`, and its attributes.

    An attribute that is None or False is left out; the underscores of its name are hyphens, one at its end is dropped.

    >>> element("p", "a < b", element("b", "c"), class_="x", data_value=1, hidden=True, title=None)
    '<p class="x" data-value="1" hidden>a &lt; b<b>c</b></p>'
    """
    given = [(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items()]
    opened = "".join(
        f" {key}" if value is True else f' {key}="{escape(str(value))}"'
        for key, value in given
        if value is not None and value is not False
    )
    return Html(f"<{name}{opened}>" + ("" if name in VOID else f"{joined(children)}</{name}>"))


def joined(children: Iterable[object]) -> Html:
    """Return the children one after the other, escaped unless they are `Html`.

    >>> joined(["<", element("br")])
    '&lt;<br>'
    """
    return Html("".join(child if isinstance(child, Html) else escape(str(child)) for child in children))


def with_code(text: str) -> Html:
    """Return escaped text in which a part between backticks is code.

    >>> with_code("run `a < b` again")
    'run <code>a &lt; b</code> again'
    """
    parts = re.split("`([^`]*)`", text)
    return joined(element("code", part) if i % 2 else part for i, part in enumerate(parts))


def data_script(value: Any, **attributes: object) -> Html:
    """Return a script element that holds data as JSON, which no text in it can end early.

    >>> data_script("</script>")
    '<script type="application/json">"\\\\u003c/script>"</script>'
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return element("script", Html(text), type="application/json", **attributes)
