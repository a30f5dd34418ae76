"""`tallymark.v1.UsageService`: what was used."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

from tallymark.v1.usage_pb2 import QueryUsageRequest, QueryUsageResponse, UsageRow
from tallymark_collector.access import Principal
from tallymark_collector.api import values
from tallymark_collector.api.calls import Method
from tallymark_collector.api.reading import Readers
from tallymark_collector.query.by_aggregation import Billed, usage_as_billed
from tallymark_collector.query.pages import Page
from tallymark_collector.query.status import unattributed
from tallymark_collector.query.usage import columns_of

NAME: Final = "tallymark.v1.UsageService"
PAGE_SIZE: Final = 1_000
MAX_PAGE_SIZE: Final = 10_000


def methods(readers: Readers) -> list[Method[Any]]:
    """The service's methods."""

    async def query(principal: Principal, request: QueryUsageRequest) -> QueryUsageResponse:
        account = request.account or principal.account
        principal.check_read(principal.tenant, account)
        by = [*request.group_by] or ["account", "meter"]
        after = values.page_after(request, parts=len(columns_of(by)))
        page = Page(values.page_size(request.page_size, PAGE_SIZE, MAX_PAGE_SIZE), after)
        start, end = values.instant(request, "start"), values.instant(request, "end")
        as_of = values.instant(request, "as_of")
        meter = request.meter or None
        nameless = None
        async with readers.reading(principal) as connection:
            found = await usage_as_billed(
                connection,
                tenant=principal.tenant,
                by=by,
                start=start,
                end=end,
                account=account,
                meter=meter,
                as_of=as_of,
                page=page,
            )
            if account is None and as_of is None:
                counted = await unattributed(connection, principal.tenant, meter=meter, start=start, end=end)
                nameless = sum(counted.values())
        return _answer(request, found, nameless)

    return [Method("QueryUsage", QueryUsageRequest, query)]


def _answer(request: QueryUsageRequest, found: Billed, nameless: int | None) -> QueryUsageResponse:
    last = found.usage.last
    return QueryUsageResponse(
        rows=[_row(dict(zip(found.usage.columns, row, strict=True))) for row in found.usage.rows],
        next_page_token="" if last is None else values.page_token(request, last),
        remarks=found.remarks,
        unattributed_items=nameless,
    )


def _row(cells: Mapping[str, object]) -> UsageRow:
    quantity = cells["quantity"]
    group = {
        name: value.isoformat().replace("+00:00", "Z") if isinstance(value, datetime) else str(value)
        for name, value in cells.items()
        if value is not None and name not in ("quantity", "points", "aggregation")
    }
    return UsageRow(
        group=group,
        aggregation=str(cells.get("aggregation", "sum")),
        quantity=values.digits(quantity) if isinstance(quantity, Decimal) else None,
        points=cells["points"],  # type: ignore[arg-type]
    )
