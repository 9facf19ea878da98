"""Turn the docstrings of the package, plain sentences with `code` and `>>>` examples, into reStructuredText."""

from __future__ import annotations

import re

EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)
CODE = re.compile(r"`+([^`]+)`+")
MARKUP = re.compile(r"[*|\\]|(?<=\w)_(?!\w)")
BULLET = re.compile(r"^( *)([*-]) (?=\S)", re.MULTILINE)


def to_rst(docstring: str) -> str:
    r"""Keep examples, mark code as code, and escape what would be markup in reStructuredText.

    >>> print(to_rst("Return |x| * `y`.\n* one\n\n>>> 2 * 3\n6"))
    Return \|x\| \* ``y``.
    <BLANKLINE>
    * one
    <BLANKLINE>
    >>> 2 * 3
    6
    """
    parts, end = [], 0
    for example in EXAMPLE.finditer(docstring):
        parts += [_text(docstring[end : example.start()]), example[0]]
        end = example.end()
    return "".join([*parts, _text(docstring[end:])])


def _text(text: str) -> str:
    bullets = BULLET.sub("\\1\0 ", text)
    pieces = CODE.split(bullets)
    pieces[0::2] = [MARKUP.sub(r"\\\g<0>", piece) for piece in pieces[0::2]]
    pieces[1::2] = [f"``{' '.join(piece.split())}``" for piece in pieces[1::2]]
    pieces[2::2] = [f"\\\\ {piece}" if piece[:1].isalnum() else piece for piece in pieces[2::2]]
    return re.sub(r"(?<=[^\n])\n( *)\0 ", "\n\n\\1\0 ", "".join(pieces)).replace("\0", "*")
