"""What went wrong, told at the end of a long run: the end of the output is all that most people see of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

MAX_TOLD: Final = 2_000
"""Characters of what was wrong with one run."""
TAIL_LINES: Final = 20
_TAIL_BYTES: Final = 200 * TAIL_LINES


def tail(path: Path) -> list[str]:
    """The last lines of a log; none of one that is not there."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return text.splitlines()[-TAIL_LINES:]


def told(title: str, problems: Iterable[str], again: str, logs: Mapping[str, Sequence[str]] | None = None) -> list[str]:
    """Lines: what failed, what was wrong, the command that repeats it, the ends of the logs by their names."""
    text = "\n".join(problems)
    if len(text) > MAX_TOLD:
        text = f"{text[:MAX_TOLD]}… ({len(text) - MAX_TOLD:,} characters more)"
    lines = ["", f"FAILED: {title}", *(f"  {line}" for line in text.splitlines()), f"  again: {again}"]
    for name, log in (logs or {}).items():
        lines.append(f"  {name}, its last lines:" if log else f"  {name} has written nothing")
        lines += [f"    {line}" for line in log]
    return lines
