"""What makes one line unreadable. It is that line's affair: it goes to the rejects, and the import goes on."""

from __future__ import annotations


class LineFault(ValueError):  # noqa: N818 - named for what is wrong with the line
    """The line cannot be billed as it stands; the text says why, for a person who mends it."""


class TooOld(LineFault):
    """The line is older than what is taken."""


class LineSkipped(Exception):  # noqa: N818 - not an error: the mapping asks for it
    """The mapping leaves this line out."""
