"""What is stored, against the tally of what was used: to the unit, each once, and each tenant's apart."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final

import psycopg
from typer.testing import CliRunner

from tallymark_collector.cli.app import app
from tests.delivery.contract.producer import CALLED
from tests.delivery.contract.tally import Tally

_USED: Final = {"points": "usage_point JOIN usage_series USING (account, series, tenant)", "hours": "usage_hourly"}
_LEVELS_SQL: Final = """
SELECT account, meter, (extract(epoch FROM time) * 1000000)::bigint, value FROM usage_levels
WHERE tenant = %s AND account LIKE %s"""
_TRACES: Final = ("usage_stream", "usage_point", "usage_level", "usage_evidence", "usage_quarantine")


@dataclass
class Reckoning:
    """What became of a run. `lost` and `doubled` count what is too small or too large: accounts' meters, accounts'
    levels and calls, producers' totals."""

    lost: int = 0
    doubled: int = 0
    points: int = 0
    problems: list[str] = field(default_factory=list)

    def compare(self, dsn: str, tenant: str, run: str, tally: Tally) -> None:
        """Usage, levels and calls of the tenant's accounts; nothing of them may lie in quarantine."""
        ours = (tenant, f"{run}-%")
        with psycopg.connect(dsn, options="-c search_path=tallymark") as connection:
            for name, source in _USED.items():
                rows = connection.execute(
                    f"SELECT account, meter, sum(quantity), count(*) FROM {source}"
                    " WHERE tenant = %s AND account LIKE %s GROUP BY account, meter",
                    ours,
                ).fetchall()
                self.points += sum(row[3] for row in rows) if name == "points" else 0
                self.equal(f"{name} of tenant {tenant}", {row[:2]: row[2] for row in rows}, tally.used)
            levels = Counter(connection.execute(_LEVELS_SQL, ours).fetchall())
            self.points += levels.total()
            self.equal(f"levels of tenant {tenant}", levels, tally.levels)
            calls = connection.execute(
                "SELECT account, count(*) FROM usage_calls WHERE tenant = %s AND account LIKE %s GROUP BY account", ours
            ).fetchall()
            self.equal(f"calls of tenant {tenant}", dict(calls), tally.calls)
            aside = connection.execute(
                "SELECT reason, detail FROM usage_quarantine WHERE tenant = %s AND (account LIKE %s OR account = '')"
                " LIMIT 3",
                ours,
            ).fetchall()
        self.problems += [f"set aside: {reason}, {detail}" for reason, detail in aside]

    def nothing_else(self, dsn: str, run: str, tenants: Sequence[str]) -> None:
        """The run's accounts are of these tenants alone, and of what thieves sent there is no trace."""
        with psycopg.connect(dsn, options="-c search_path=tallymark") as connection:
            of_others = connection.execute(
                "SELECT DISTINCT tenant, account FROM usage_series WHERE account LIKE %s AND tenant <> ALL(%s)",
                (f"{run}-%", list(tenants)),
            ).fetchall()
            stolen = {
                table: connection.execute(
                    f"SELECT count(*) FROM {table} WHERE account = %s", [f"{run}-stolen"]
                ).fetchone()
                for table in _TRACES
            }
            told = connection.execute(
                "SELECT count(*) FROM usage_producer WHERE instance = %s", [f"{run}-thief"]
            ).fetchone()
        self.problems += [f"usage of {account} is stored as tenant {tenant}'s" for tenant, account in of_others]
        self.problems += [
            f"{count[0]} rows in {table} from somebody without a credential"
            for table, count in {**stolen, "usage_producer": told}.items()
            if count != (0,)
        ]

    def audit(self, dsn: str, tenant: str, tally: Tally) -> None:
        """`tallymark audit` has nothing to say, and calls everything complete that producers have told of."""
        arguments = ["audit", "--database", dsn, "--tenant", tenant, "--tolerance", "0", "--json"]
        done = CliRunner().invoke(app, arguments)
        if done.exit_code not in (0, 1) or not done.stdout:
            self.problems.append(f"the audit ended with {done.exit_code}: {done.output[-500:]} {done.exception}")
            return
        found: dict[str, Any] = json.loads(done.stdout)
        proved = {(one["producer"], one["meter"]): one for one in found["completeness"]}
        said = {key: Decimal(str(one["control"])) for key, one in proved.items()}
        self.equal(f"control totals of tenant {tenant}", said, tally.told)
        shown = {one["account"]: Decimal(str(one["counted"])) for one in found["evidence"] if one["meter"] == CALLED}
        self.equal(f"counts of calls of tenant {tenant}", shown, tally.calls)
        self.problems += [
            f"the audit calls {meter} of {producer} {one['status']}: {one['difference']} of {one['control']}"
            for (producer, meter), one in proved.items()
            if one["status"] != "complete"
        ]
        if not found["clean"] or found["unproved_producers"]:
            differs = {name: found[name] for name in ("differences", "drifts", "overlaps", "unproved_producers")}
            self.problems.append(f"the audit of tenant {tenant} is not clean: {differs}"[:1000])

    def equal(self, what: str, stored: Any, sent: Any) -> None:
        """Compares two tables of numbers by their keys."""
        for key in sorted({*stored, *sent}):
            right, got = sent.get(key, 0), stored.get(key, 0)
            if right != got:
                self.problems.append(f"{what}, {key}: {got} stored, {right} sent")
                self.lost += got < right
                self.doubled += got > right
