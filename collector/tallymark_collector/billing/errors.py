"""What can go wrong between a catalogue, a period and a quantity.

    BillingError
     ├── CatalogError    the catalogue file cannot be used; `.problems` lists everything that is wrong with it
     ├── CurrencyError   not a currency of ISO 4217 in which an amount can be paid
     ├── PeriodError     the subscription has no such period
     └── UsageError      a quantity that cannot be priced: negative, not a number, out of range

None of them goes away by trying again. A naive datetime is a mistake of the caller's and raises `ValueError`.
"""

from tallymark_collector.documents.problems import DocumentError


class BillingError(Exception):
    """Base of every error that billing raises about its input."""


class CatalogError(DocumentError, BillingError):
    """A catalogue file that cannot be used. `problems` has at least one entry, in the file's order."""


class CurrencyError(BillingError, ValueError):
    """Not a currency of ISO 4217 in which an amount can be paid."""


class PeriodError(BillingError, LookupError):
    """The subscription has no such period."""


class UsageError(BillingError, ValueError):
    """A quantity that cannot be priced. The message names the meter."""
