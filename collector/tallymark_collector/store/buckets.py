"""Sums by bucket that the collector keeps: how marks become sums, whatever the width.

A refresher locks the keys it took, deletes their marks, and in a later statement sums those buckets anew (the rules
stand in sql/0002_aggregates.sql).
"""

from __future__ import annotations

from dataclasses import dataclass

from tallymark_collector.store.database import Connection
from tallymark_collector.store.locks import lock_keys


@dataclass(frozen=True, slots=True)
class Buckets:
    """A table of sums, and the tables of its marks; all of their names are ours."""

    table: str
    dirty: str
    unaudited: str
    sum_sql: str
    """Inserts the sums of accounts, tenants and buckets."""

    @property
    def take_sql(self) -> str:
        """Keys that have marks, the oldest marks first: a heap is read in the order in which it was written, so that an
        account that never rests cannot keep the others waiting."""
        return f"""
SELECT DISTINCT account, tenant, bucket
FROM (SELECT account, tenant, bucket FROM {self.dirty} LIMIT 20000) oldest
LIMIT %s"""  # noqa: S608 - relations of ours

    @property
    def clean_sql(self) -> str:
        """Deletes the marks of keys; what is made again waits for its audit."""
        return f"""
WITH gone AS (
    DELETE FROM {self.dirty} d
    USING unnest(%s::text[], %s::text[], %s::timestamptz[]) AS k (account, tenant, bucket)
    WHERE d.account = k.account AND d.tenant = k.tenant AND d.bucket = k.bucket
    RETURNING d.bucket, d.account, d.tenant
)
INSERT INTO {self.unaudited} (bucket, account, tenant) SELECT DISTINCT bucket, account, tenant FROM gone"""  # noqa: S608

    @property
    def forget_sql(self) -> str:
        """Deletes the sums of keys."""
        return f"""
DELETE FROM {self.table} b
USING unnest(%s::text[], %s::text[], %s::timestamptz[]) AS k (account, tenant, bucket)
WHERE b.account = k.account AND b.tenant = k.tenant AND b.bucket = k.bucket"""  # noqa: S608 - a relation of ours


async def refresh(connection: Connection, kept: Buckets, limit: int) -> int:
    """Makes up to `limit` account-buckets again that have marks; returns how many. Safe beside writers and refreshers.

    Each statement is one of its own at READ COMMITTED: the sums must see what the deletion saw, and later.
    """
    async with connection.transaction():
        await connection.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
        keys = await (await connection.execute(kept.take_sql, [limit])).fetchall()
        if not keys:
            return 0
        columns = [list(column) for column in zip(*keys, strict=True)]
        await lock_keys(connection, f"tallymark.{kept.table}", columns)
        for statement in (kept.clean_sql, kept.forget_sql, kept.sum_sql):
            await connection.execute(statement, columns)
        return len(keys)
