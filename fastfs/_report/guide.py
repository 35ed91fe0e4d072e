"""The paragraphs of the guide, and which of them is about a column, an alert rule, a reason or a sign.

``guide.md`` holds the text. The comment below each heading says what the paragraph is about. ``scripts/guide.py``
copies the text to ``docs/guide.md``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files

__all__ = ["Guide", "Paragraph", "source"]

_ANY = "*"


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of the guide.

    Attributes:
        anchor: its name in links.
        title: heading.
        text: in Markdown, without the heading.
        about: kind -> what it is about, see :meth:`Guide.about`.
    """

    anchor: str
    title: str
    text: str
    about: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Guide:
    """All paragraphs, in their order."""

    paragraphs: tuple[Paragraph, ...]

    @classmethod
    def read(cls) -> Guide:
        """Returns the guide of this version."""
        return cls(tuple(map(_parsed, re.split(r"^## ", source(), flags=re.MULTILINE)[1:])))

    def about(self, kind: str, name: str) -> Paragraph | None:
        """Returns the paragraph about something.

        Args:
            kind: ``columns``, ``alerts`` (the name of a rule), ``reasons`` (why a row is not valid), or ``signs``.
            name: what it is about. Reasons are found by their beginning, and rules of which there are several
                (``large update 2``) by their name without the number.

        Returns:
            The paragraph; None if the guide has none, for example for a rule or a column of the user.
        """
        name = re.sub(r" \d+$", "", name) if kind == "alerts" else name
        for one in self.paragraphs:
            names = one.about.get(kind, ())
            if name in names or (kind == "reasons" and name.startswith(names)):
                return one
        return next((one for one in self.paragraphs if _ANY in one.about.get(kind, ())), None)


def source() -> str:
    """Returns the text of all paragraphs, with their comments."""
    return (files("fastfs._report") / "guide.md").read_text(encoding="utf-8")


def _parsed(part: str) -> Paragraph:
    title, comment, text = part.split("\n", 2)
    found = re.fullmatch(r"<!-- (.*) -->", comment)
    if found is None:
        raise ValueError(f"guide.md: {title}: expected a comment that says what it is about, got {comment!r}")
    pairs = (each.split(": ", 1) for each in found[1].split("; "))
    about = {kind: tuple(names.split(", ")) for kind, names in pairs}
    return Paragraph(re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-"), title, text.strip(), about)
