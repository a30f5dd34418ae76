"""For tests of services: see what was recorded, without a collector.

    def test_a_call_bills_its_tokens(captured_usage):         # a fixture of pytest, there by itself
        client.post("/v1/completions", ...)
        captured_usage.assert_billed("llm.tokens", 3, account="acme")

    with capture_usage() as usage:                            # anywhere else
        client.post("/v1/images", ...)
    assert usage.total("images", account="acme") == 3

A service under test may call `configure()` and `shutdown()` as it always does: inside the block its settings are
checked, and nothing is written to a disk or sent.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Final

from tallymark import conventions, runtime
from tallymark.assembly import Runtime
from tallymark.dimensions import Value
from tallymark.identity import Identity, current_identity, identify
from tallymark.observation import delivery_stats as delivery_stats  # its name here is older than its module
from tallymark.quantities import Exact, add, exact
from tallymark.settings import Settings
from tallymark.streams import attributes_of


class _Any(enum.Enum):
    ANY = enum.auto()

    def __repr__(self) -> str:
        return "ANY"


ANY: Final = _Any.ANY
"""Any account, plan or unit; None means usage without one."""

_IDENTITY: Final = (conventions.ACCOUNT, conventions.PLAN)


@dataclass(frozen=True)
class Usage:
    """The sum of one stream. `attributes` are those on the wire, with account and plan."""

    meter: str
    unit: str
    account: str | None
    plan: str | None
    attributes: Mapping[str, Value]
    quantity: int | Decimal


@dataclass(frozen=True)
class _Wanted:
    """Which usage somebody asks for, and how they would put it."""

    meter: str | None
    account: str | None | _Any
    plan: str | None | _Any
    unit: str | _Any
    attributes: Mapping[str, Value | None]

    def takes(self, usage: Usage) -> bool:
        return (
            self.meter in (None, usage.meter)
            and self.account in (ANY, usage.account)
            and self.plan in (ANY, usage.plan)
            and self.unit in (ANY, usage.unit)
            and all(_same(value, usage.attributes.get(name)) for name, value in self.attributes.items())
        )

    def __str__(self) -> str:
        text = "anything" if self.meter is None else self.meter
        if self.account is None:
            text += " without an account"
        elif self.account is not ANY:
            text += f" to {self.account!r}"
        if self.plan is None:
            text += " without a plan"
        elif self.plan is not ANY:
            text += f" on plan {self.plan!r}"
        if self.attributes:
            text += " with " + ", ".join(f"{name}={value!r}" for name, value in self.attributes.items())
        return text


class Captured:
    """What has been recorded since the block began. It may be read inside the block and after it."""

    def __init__(self, of: Runtime) -> None:
        self._runtime = of
        self._asserted: list[tuple[_Wanted, Exact]] = []

    def __iter__(self) -> Iterator[Usage]:
        for stream, quantity in self._runtime.recorder.sums().items():
            yield Usage(stream.meter, stream.unit, stream.account, stream.plan, attributes_of(stream), quantity)

    def __str__(self) -> str:
        """Everything that was recorded, a line for each stream."""
        return _table(list(self), self.refused())

    def total(
        self,
        meter: str,
        *,
        account: str | None | _Any = ANY,
        plan: str | None | _Any = ANY,
        unit: str | _Any = ANY,
        attributes: Mapping[str, Value | None] | None = None,
    ) -> int | Decimal:
        """The exact sum of a meter; `account`, `plan` and `unit` pick out those alone (None: those without one),
        `attributes` those that have all of these on the wire (None: those that lack it)."""
        return self._sum(_Wanted(meter, account, plan, unit, attributes or {}))

    def assert_billed(
        self,
        meter: str,
        quantity: int | float | Decimal,
        *,
        account: str | _Any = ANY,
        plan: str | None | _Any = ANY,
        unit: str | _Any = ANY,
        attributes: Mapping[str, Value | None] | None = None,
    ) -> None:
        """Fail, showing everything that was recorded, unless exactly `quantity` of the meter is billed.

        Without `account` it is the sum over all accounts. Usage that names none is billed to nobody and never counts;
        `assert_recorded` asks for it. `unit` must be the unit of all of it; the others are as for `total`.
        """
        __tracebackhide__ = True
        self._assert(_Wanted(meter, account, plan, ANY, attributes or {}), quantity, unit, billed=True)

    def assert_recorded(
        self,
        meter: str,
        quantity: int | float | Decimal,
        *,
        account: str | None | _Any = ANY,
        plan: str | None | _Any = ANY,
        unit: str | _Any = ANY,
        attributes: Mapping[str, Value | None] | None = None,
    ) -> None:
        """As `assert_billed`, with usage that names no account; `account=None` asks for that alone."""
        __tracebackhide__ = True
        self._assert(_Wanted(meter, account, plan, ANY, attributes or {}), quantity, unit, billed=False)

    def assert_nothing_else(self) -> None:
        """Fail unless everything recorded is what an assertion before this one has asked for, in the same amount."""
        __tracebackhide__ = True
        found = list(self)
        left = [usage for usage in found if not any(wanted.takes(usage) for wanted, _ in self._asserted)]
        if left:
            raise AssertionError(f"more was recorded than was asserted:\n{_table(left, {})}\n{self._all()}")
        for wanted, quantity in self._asserted:
            if (now := self._sum(wanted)) != quantity:
                raise AssertionError(
                    f"more was recorded after the assertion of {wanted}: {now} instead of {quantity}\n{self._all()}"
                )

    def assert_nothing(self, meter: str | None = None, *, account: str | None | _Any = ANY) -> None:
        """Fail if anything was recorded; of this meter and account alone, where they are given."""
        __tracebackhide__ = True
        wanted = _Wanted(meter, account, ANY, ANY, {})
        if any(wanted.takes(usage) for usage in self):
            raise AssertionError(f"{wanted} was to be recorded in no amount\n{self._all()}")

    @property
    def identity(self) -> Identity:
        """Whom usage would be recorded for here and now: with no account after a call that has cleaned up."""
        return current_identity()

    def refused(self) -> dict[str, int]:
        """Recordings refused for their quantity, by meter."""
        return self._runtime.recorder.refused()

    def _sum(self, wanted: _Wanted) -> Exact:
        total: Exact = 0
        for usage in self:
            if wanted.takes(usage):
                total = add(total, usage.quantity)
        return total

    def _assert(self, wanted: _Wanted, quantity: object, unit: str | _Any, billed: bool) -> None:
        __tracebackhide__ = True
        expected = exact(quantity)
        found = [usage for usage in self if wanted.takes(usage)]
        counted = [usage for usage in found if usage.account is not None] if billed else found
        total: Exact = 0
        for usage in counted:
            total = add(total, usage.quantity)
        verb = "billed" if billed else "recorded"
        problems = []
        if total != expected:
            problems.append(f"{wanted}: {expected} should have been {verb}, {total} was")
            unnamed = replace(wanted, account=None)
            if billed and any(unnamed.takes(usage) for usage in self):
                problems.append("some names no account: nobody was identified where it was recorded")
        units = {usage.unit for usage in counted}
        if unit is not ANY and units - {unit}:
            problems.append(f"{wanted}: the unit should be {unit!r}, it is {' and '.join(map(repr, sorted(units)))}")
        if problems:
            raise AssertionError("\n".join((*problems, self._all())))
        if billed and wanted.account is ANY:
            for account in {usage.account for usage in counted}:
                own = _Wanted(wanted.meter, account, wanted.plan, ANY, wanted.attributes)
                self._asserted.append((own, self._sum(own)))
        else:
            self._asserted.append((wanted, expected))

    def _all(self) -> str:
        return f"recorded in all:\n{self}"

    def not_billed(self) -> dict[str, int]:
        """Calls that their meter's `billable` did not bill, by meter."""
        return self._runtime.recorder.not_billed()


@contextmanager
def capture_usage() -> Iterator[Captured]:
    """Keep the whole process's usage out of the exporter inside the block, and show it.

    Whoever is identified before the block is so inside it; who is identified inside is forgotten at its end. Usage of
    forked children is not seen.
    """
    before = runtime.current()
    capturing = _Capturing(runtime.instruments, before.meters)
    capturing.settings = before.settings
    capturing.enabled = True
    capturing.reporter.silence("unconfigured")
    with runtime.using(capturing), identify():
        yield Captured(capturing)


class _Capturing(Runtime):
    """Records, and neither writes nor sends. What is recorded stays, whatever the service does."""

    def configure(self, settings: Settings) -> None:
        self.settings = settings

    def flush(self, timeout_s: float) -> bool:
        return True

    def shutdown(self, timeout_s: float | None) -> bool:
        self.settings = None
        return True


def _same(expected: object, found: object) -> bool:
    """True and 1 are two values on the wire, though one in Python."""
    return expected == found and isinstance(expected, bool) == isinstance(found, bool)


def _table(found: list[Usage], refused: Mapping[str, int]) -> str:
    rows = [
        (
            usage.meter,
            str(usage.quantity),
            usage.unit,
            "no account" if usage.account is None else f"account={usage.account!r}",
            " ".join(f"{name}={value!r}" for name, value in usage.attributes.items() if name not in _IDENTITY),
            "" if usage.plan is None else f"plan={usage.plan!r}",
        )
        for usage in sorted(found, key=lambda usage: (usage.meter, usage.account or "", str(usage.attributes)))
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
    lines = []
    for meter, quantity, unit, account, attributes, plan in rows:
        columns = (meter.ljust(widths[0]), quantity.rjust(widths[1]), unit.ljust(widths[2]), account.ljust(widths[3]))
        lines.append("  " + "  ".join((*columns, *filter(None, (plan, attributes)))).rstrip())
    lines += [f"  {meter}: {n} recordings refused, for their quantity" for meter, n in sorted(refused.items())]
    return "\n".join(lines) or "  nothing"
