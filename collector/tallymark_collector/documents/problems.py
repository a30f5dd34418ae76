"""What is wrong with a file that a person wrote."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a file. `line` and `column` count from 1; `field` is "" for the whole file."""

    file: str
    line: int
    column: int
    field: str
    message: str

    def __str__(self) -> str:
        """`plans.yaml:14: plans.pro.charges[1].unit_price: what is wrong and what to do`."""
        field = f"{self.field}: " if self.field else ""
        return f"{self.file}:{self.line}: {field}{self.message}"


class DocumentError(Exception):
    """A file that cannot be used. `problems` has at least one entry, in the file's order."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))
