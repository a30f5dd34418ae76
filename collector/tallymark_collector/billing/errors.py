"""What can go wrong between a catalogue, a period and a quantity.

    BillingError
     ├── CatalogError    the catalogue file cannot be used; `.problems` lists everything that is wrong with it
     ├── CurrencyError   not a currency of ISO 4217 in which an amount can be paid
     ├── PeriodError     the subscription has no such period
     └── UsageError      a quantity that cannot be priced: negative, not a number, out of range

None of them goes away by trying again. A naive datetime is a mistake of the caller's and raises `ValueError`.
"""

from collections.abc import Sequence
from dataclasses import dataclass


class BillingError(Exception):
    """Base of every error that billing raises about its input."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a catalogue file. `line` and `column` count from 1; `field` is "" for the whole file."""

    file: str
    line: int
    column: int
    field: str
    message: str

    def __str__(self) -> str:
        """`plans.yaml:14: plans.pro.charges[1].unit_price: what is wrong and what to do`."""
        field = f"{self.field}: " if self.field else ""
        return f"{self.file}:{self.line}: {field}{self.message}"


class CatalogError(BillingError):
    """A catalogue file that cannot be used. `problems` has at least one entry, in the file's order."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class CurrencyError(BillingError, ValueError):
    """Not a currency of ISO 4217 in which an amount can be paid."""


class PeriodError(BillingError, LookupError):
    """The subscription has no such period."""


class UsageError(BillingError, ValueError):
    """A quantity that cannot be priced. The message names the meter."""
