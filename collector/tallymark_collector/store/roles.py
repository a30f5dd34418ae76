"""What each role of a database may do: the owner migrates, the writer serves, readers read the public views, and an
account's own reader reads what is that account's.

The owner is whoever ran the first `migrate`. The others are roles that somebody has made (`CREATE ROLE … LOGIN`):
their passwords are no business of ours. `grant` gives them what stands below and takes back what does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from psycopg import sql

from tallymark_collector.errors import UserError
from tallymark_collector.store.database import SCHEMA, Connection
from tallymark_collector.store.engines.capabilities import state

_READ: Final = ("SELECT",)
_ADD: Final = ("SELECT", "INSERT")
_REPLACE: Final = ("SELECT", "INSERT", "DELETE")

WRITER: Final[Mapping[str, tuple[str, ...]]] = {
    # What was used is only ever added to: whoever takes over a collector cannot change or remove what it recorded.
    "usage_point": _ADD,
    "usage_sample": _ADD,
    "usage_level": _ADD,
    "usage_evidence": _ADD,
    "usage_producer": _ADD,
    "usage_control": _ADD,
    "usage_closed": _ADD,
    "usage_evidence_count": _ADD,
    "usage_quarantine": _ADD,
    # What was refused stays refused for a collector: only people settle it (docs/quarantine.md).
    "quarantine_action": _READ,
    "usage_quarantine_open": _READ,
    "usage_quarantine_history": _READ,
    "usage_series": _ADD,
    # Locking a row (FOR NO KEY UPDATE) takes the right to update some column; these only say when it was added.
    "usage_source": (*_ADD, "UPDATE (recorded_at)"),
    "usage_source_stream": (*_ADD, "UPDATE (recorded_at)"),
    "usage_stream": (*_ADD, "UPDATE (recorded_at)"),
    # The cache is forgotten and made again; periods that have not ended follow the time zone data.
    "usage_hour": _REPLACE,
    "usage_day": _REPLACE,
    "usage_dirty": _REPLACE,
    "usage_day_dirty": _REPLACE,
    "billing_period": _REPLACE,
    # What was made again waits for its audit; taking such a row (FOR UPDATE) takes the right to update some column.
    "usage_unaudited": (*_REPLACE, "UPDATE (bucket)"),
    "usage_day_unaudited": (*_REPLACE, "UPDATE (bucket)"),
    "audit_finding": _ADD,
    # How far a file was read goes on with it, and a renamed file is called by its new name.
    "usage_import_source": _ADD,
    "usage_import_file": (*_ADD, "UPDATE (path, bytes, lines, digest, updated_at)"),
    "usage_import_line": _ADD,
    "usage_import_mapping": _ADD,
    # The trigger on usage_dirty reads it as whoever writes. Only who drops points says that they are gone: the owner.
    "usage_kept": _READ,
    "usage_edge": (),
    # Prices and customers are changed by `tallymark plans apply`, as the owner.
    "subscription": _READ,
    "plan_version": _READ,
    # Invoices are finalised by people (docs/invoices.md): whoever takes over a collector can make none.
    "invoice_document": _READ,
    "invoices": _READ,
    "invoice_lines": _READ,
    "invoice_days": _READ,
    # Who serves knows a token when it sees one, and can make none.
    "tenant": _READ,
    "credential": _READ,
    "migration": _READ,
    "usage_hour_current": _READ,
    "usage_day_marked": _READ,
    "usage_day_current": _READ,
    "usage_hourly": _READ,
    "usage_daily": _READ,
    "usage_by_period": _READ,
    "usage_by_period_aggregated": _READ,
    "usage_levels": _READ,
    "usage_calls": _READ,
    "usage_lines": _READ,
    # Who reads which account's usage is said by the owner.
    "account_reader": (),
    "own_usage_hourly": (),
    "own_usage_daily": (),
    "own_usage_by_period": (),
    "own_usage_levels": (),
    "own_usage_calls": (),
}
"""Privileges by relation. Every relation of the schema stands here, with () where the writer has no business in it."""

NATIVE: Final[Mapping[str, tuple[str, ...]]] = {"usage_hour": _READ, "usage_day": _READ}
"""The same for what is another relation where the database keeps hours and days itself: continuous aggregates, which
nobody but their owner can make again."""

READER: Final = (
    "usage_hourly",
    "usage_daily",
    "usage_by_period",
    "usage_by_period_aggregated",
    "usage_levels",
    "usage_calls",
    "usage_lines",
    "usage_quarantine_open",
    "usage_quarantine_history",
    "invoices",
    "invoice_lines",
    "invoice_days",
)
"""The public views. They read the tables with their owner's rights: a reader needs none on a table."""

OWN: Final = ("own_usage_hourly", "own_usage_daily", "own_usage_by_period", "own_usage_levels", "own_usage_calls")
"""What an account's own reader reads: of that account alone."""

OWN_FUNCTIONS: Final = ("own_usage_aggregated(timestamptz, timestamptz)",)

FUNCTIONS: Final = ("usage_aggregated(text, text, timestamptz, timestamptz, jsonb)",)
"""What writers and readers may call. A view's functions are called with the rights of who reads the view."""

WRITER_FUNCTIONS: Final = (
    *FUNCTIONS,
    "invoice_points(text, text, timestamptz, timestamptz, timestamptz)",
    "invoice_levels(text, text, timestamptz, timestamptz, timestamptz)",
)

_STANDING_SQL: Final = """
SELECT r.rolname = pg_get_userbyid(n.nspowner), pg_has_role(r.oid, n.nspowner, 'MEMBER'),
       pg_has_role(current_user, n.nspowner, 'USAGE')
FROM pg_roles r, pg_namespace n WHERE r.rolname = %s AND n.nspname = %s"""

# A privilege on a column counts for the table: has_any_column_privilege says so for both.
_MISSING_SQL: Final = """
SELECT relation, string_agg(privilege, ', ' ORDER BY privilege)
FROM unnest(%s::text[], %s::text[]) AS needed (relation, privilege)
WHERE NOT CASE privilege
    WHEN 'UPDATE' THEN has_any_column_privilege(relation, privilege)
    ELSE has_table_privilege(relation, privilege) END
GROUP BY relation ORDER BY relation"""


_UNCALLABLE_SQL: Final = """
SELECT function, 'EXECUTE' FROM unnest(%s::text[]) AS needed (function)
WHERE NOT has_function_privilege(function, 'EXECUTE') ORDER BY function"""


class AccountReader(NamedTuple):
    """Who reads one account's usage and nothing else."""

    role: str
    tenant: str
    account: str


async def grant(
    connection: Connection,
    *,
    writer: str | None = None,
    reader: str | None = None,
    account_reader: AccountReader | None = None,
) -> None:
    """Gives the roles exactly what they need in a migrated database; again is fine. Raises UserError.

    The connection must be in a transaction, as the schema's owner.
    """
    named = [role for role in (writer, reader, account_reader and account_reader.role) if role is not None]
    for role in named:
        if named.count(role) > 1:
            raise UserError(
                f"the role {role!r} cannot be both: writer, reader and an account's reader are roles of their own"
            )
    if writer is not None:
        await _only(connection, writer, await privileges(connection), WRITER_FUNCTIONS)
        await _allow_temporary_tables(connection, writer)
    if reader is not None:
        await _only(connection, reader, dict.fromkeys(READER, _READ), FUNCTIONS)
    if account_reader is not None:
        await _only(connection, account_reader.role, dict.fromkeys(OWN, _READ), OWN_FUNCTIONS)
        await connection.execute("INSERT INTO account_reader VALUES (%s, %s, %s)", account_reader)
        await _check_nothing_else(connection, account_reader.role)


async def privileges(connection: Connection) -> Mapping[str, tuple[str, ...]]:
    """What the writer needs in this database, by relation."""
    return {**WRITER, **NATIVE} if (await state(connection)).continuous_aggregates else WRITER


async def owns(connection: Connection) -> bool:
    """True if the connection's user owns the schema (as a member of the owner's role, too) or may make it."""
    row = await (
        await connection.execute(
            """SELECT coalesce((SELECT pg_has_role(nspowner, 'USAGE') FROM pg_namespace WHERE nspname = %s),
                               has_database_privilege(current_database(), 'CREATE'))""",
            [SCHEMA],
        )
    ).fetchone()
    return row is not None and bool(row[0])


async def check_writer(connection: Connection) -> None:
    """Raises UserError where the connection's user cannot do what `serve` does."""
    relations = (await privileges(connection)).items()
    needed = [(f"{SCHEMA}.{name}", each.split(" ")[0]) for name, several in relations for each in several]
    columns = [list(column) for column in zip(*needed, strict=True)]
    missing = await (await connection.execute(_MISSING_SQL, columns)).fetchall()
    missing += await (
        await connection.execute(_UNCALLABLE_SQL, [[f"{SCHEMA}.{each}" for each in WRITER_FUNCTIONS]])
    ).fetchall()
    if missing:
        user = connection.info.user
        lacks = "; ".join(f"{privileges} on {relation}" for relation, privileges in missing)
        raise UserError(
            f"the database user {user!r} lacks {lacks}: as the schema's owner, run `tallymark migrate --writer {user}`"
        )


async def _only(
    connection: Connection, role: str, privileges: Mapping[str, tuple[str, ...]], functions: Sequence[str]
) -> None:
    await _check(connection, role)
    await connection.execute("DELETE FROM account_reader WHERE role = %s", [role])
    name, schema = sql.Identifier(role), sql.Identifier(SCHEMA)
    # What an earlier version needed goes, columns included: revoking a table's privilege revokes its columns' too.
    await connection.execute(sql.SQL("REVOKE ALL ON ALL TABLES IN SCHEMA {} FROM {}").format(schema, name))
    await connection.execute(sql.SQL("REVOKE ALL ON ALL FUNCTIONS IN SCHEMA {} FROM {}").format(schema, name))
    await connection.execute(sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(schema, name))
    for relation, several in privileges.items():
        if several:
            await connection.execute(
                sql.SQL("GRANT {} ON {} TO {}").format(
                    sql.SQL(", ".join(several)),  # the privileges that stand above
                    sql.Identifier(SCHEMA, relation),
                    name,
                )
            )
    for function in functions:
        await connection.execute(
            sql.SQL("GRANT EXECUTE ON FUNCTION {}.{} TO {}").format(schema, sql.SQL(function), name)
        )


_ELSE_SQL: Final = """
SELECT format('read %%s', c.relname) FROM pg_class c
WHERE c.relnamespace = %(schema)s::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
  AND c.relname <> ALL (%(views)s) AND has_any_column_privilege(%(role)s, c.oid, 'SELECT')
UNION ALL
SELECT format('call %%s', p.proname) FROM pg_proc p
WHERE p.pronamespace = %(schema)s::regnamespace AND p.prorettype <> 'trigger'::regtype
  AND p.oid <> ALL (%(functions)s::regprocedure[]) AND has_function_privilege(%(role)s, p.oid, 'EXECUTE')
LIMIT 1"""


async def _check_nothing_else(connection: Connection, role: str) -> None:
    """Raises UserError where the role may see more: through PUBLIC, or a role that it is a member of."""
    wanted = {
        "schema": SCHEMA,
        "role": role,
        "views": list(OWN),
        "functions": [f"{SCHEMA}.{function}" for function in OWN_FUNCTIONS],
    }
    row = await (await connection.execute(_ELSE_SQL, wanted)).fetchone()
    if row is not None:
        raise UserError(
            f"the role {role!r} may also {row[0]}, which has every account's usage, as PUBLIC or as a member of another"
            " role: take that away, or name a role that is a member of none"
        )


async def _check(connection: Connection, role: str) -> None:
    row = await (await connection.execute(_STANDING_SQL, [role, SCHEMA])).fetchone()
    if row is None:
        raise UserError(
            f"there is no role {role!r}: make it first, e.g. CREATE ROLE {_quoted(role)} LOGIN PASSWORD '…'"
        )
    owns, is_member, may_grant = row
    if owns or is_member:
        why = "owns the schema" if owns else "is a superuser or a member of the role that owns the schema"
        raise UserError(f"the role {role!r} {why} and may do everything already: name another role")
    if not may_grant:
        raise UserError(
            f"the database user {connection.info.user!r} does not own the schema {SCHEMA} and cannot grant rights in"
            " it: run this as the owner"
        )


async def _allow_temporary_tables(connection: Connection, writer: str) -> None:
    """A batch with duplicates is compared in a temporary table. PUBLIC may make them unless somebody took that away."""
    row = await (
        await connection.execute(
            "SELECT current_database(), has_database_privilege(%s, current_database(), 'TEMPORARY')", [writer]
        )
    ).fetchone()
    if row is None or row[1]:
        return
    statement = sql.SQL("GRANT TEMPORARY ON DATABASE {} TO {}")
    await connection.execute(statement.format(sql.Identifier(row[0]), sql.Identifier(writer)))
    row = await (
        await connection.execute("SELECT has_database_privilege(%s, current_database(), 'TEMPORARY')", [writer])
    ).fetchone()
    if row is None or not row[0]:
        raise UserError(
            f"the role {writer!r} may not make temporary tables in this database: as the database's owner, run"
            f" GRANT TEMPORARY ON DATABASE … TO {_quoted(writer)}"
        )


def _quoted(role: str) -> str:
    return '"' + role.replace('"', '""') + '"'
