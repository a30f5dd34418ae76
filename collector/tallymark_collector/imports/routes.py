"""Paths to routes. A path is no route: one with an id in it would make a series of usage of every id."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final

OTHER: Final = "_other"

_PLACE: Final = re.compile(r"(\{[^{}/]*\}|\*\*|\*)")


def pattern(template: str) -> re.Pattern[str]:
    """What a template stands for: `{name}` and `*` for one segment (or a part of it), `**` for any rest.

    A final slash makes no difference. Raises ValueError where the template is none.
    """
    if not template.startswith("/"):
        raise ValueError(f"{template!r} must begin with /")
    if "?" in template or "#" in template:
        raise ValueError(f"{template!r} must have no query: queries are cut off before")
    text = ""
    for piece in _PLACE.split(template.rstrip("/")):
        if not _PLACE.fullmatch(piece):
            if "{" in piece or "}" in piece:
                raise ValueError(f"{template!r} has a brace that is not part of {{name}}")
            text += re.escape(piece)
        else:
            text += ".*" if piece == "**" else "[^/]+"
    if text.count(".*") > 1:
        raise ValueError(f"{template!r} may have ** once")
    return re.compile(text + "/?", re.DOTALL)


def router(routes: Sequence[tuple[str, str]], otherwise: str) -> Callable[[str], str | None]:
    """From a path to its route: the first (match, route) whose match fits it. `otherwise`: none, other, path."""
    known = [(pattern(match), route) for match, route in routes]

    def route_of(path: str) -> str | None:
        for fits, route in known:
            if fits.fullmatch(path):
                return route
        return {"none": None, "other": OTHER, "path": path}[otherwise]

    return route_of
