"""HTML that is escaped by construction: whatever is not `Markup` already is text, and text cannot become a tag."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Final

_VOID: Final = frozenset({"meta", "img", "input", "br", "link"})
_UNSEEN: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
"""Control characters, marks that turn the direction of writing, halves of surrogate pairs, which no file can hold."""


class Markup(str):
    """Text that is HTML. Joining it to a plain text gives a plain text, which is escaped again where it is used."""

    __slots__ = ()


def escape(text: object) -> Markup:
    """`text` as a reader sees it; characters that cannot be seen become a replacement character."""
    return text if isinstance(text, Markup) else Markup(html.escape(_UNSEEN.sub("\ufffd", str(text)), quote=True))


def join(parts: Iterable[object]) -> Markup:
    """The parts one after another; None is nothing."""
    return Markup("".join(escape(part) for part in parts if part is not None))


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """`<name ...>children</name>`. Keywords: `class_` is `class`, `_` is `-`; None and False leave an attribute out."""
    start = [name]
    for key, value in attributes.items():
        written = key.rstrip("_").replace("_", "-")
        if value is True:
            start.append(written)
        elif value is not None and value is not False:
            start.append(f'{written}="{escape(value)}"')
    opening = f"<{' '.join(start)}>"
    return Markup(opening) if name in _VOID else Markup(f"{opening}{join(children)}</{name}>")
