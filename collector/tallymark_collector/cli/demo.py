"""`tallymark demo`: real traffic through a service and a collector, to invoices."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Final

import typer

from tallymark_collector.cli.arguments import JsonOption
from tallymark_collector.errors import UserError

_EXTRA: Final = frozenset({"aiohttp", "fastapi", "httptools", "starlette", "uvicorn"})
"""What the extra `demo` installs; any other missing module is a bug of ours."""


def demo(
    as_json: JsonOption = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the database and say where it is.")] = False,
    requests: Annotated[int, typer.Option(min=1, help="HTTP requests to make.")] = 20_000,
    accounts: Annotated[int, typer.Option(min=1, help="Accounts that make them.")] = 200,
) -> None:
    """Drive real traffic through an example service and a collector, and show what comes out, proved."""
    try:
        module = import_module("tallymark_collector.demo.run")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA:
            raise
        raise UserError(
            f"the demo needs the package {package!r}, which is not installed: run `pip install 'tallymark[demo]'`"
        ) from None
    raise typer.Exit(module.run(keep=keep, as_json=as_json, requests=requests, accounts=accounts))
