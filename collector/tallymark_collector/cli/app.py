"""The commands, and what every error becomes: one sentence for a person's mistake, a traceback for ours."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Annotated, Any, Final, NoReturn

import psycopg
import typer
from typer.core import TyperGroup

from tallymark_collector.billing.errors import BillingError
from tallymark_collector.cli import (
    audit,
    check,
    database,
    demo,
    health,
    imports,
    invoice,
    meters,
    output,
    plans,
    quarantine,
    serve,
    tenants,
    tokens,
    usage,
)
from tallymark_collector.documents.problems import DocumentError
from tallymark_collector.errors import PermanentError, TransientError

STATUSES: Final = """\
Exit status: 0 done; 1 something was found (a difference, a bad plans file, pending migrations);
2 wrong option, file or setting, nothing was done; 3 the database is not available, try again; 130 interrupted."""

_BROKEN_PIPE: Final = 141
"""What a shell reports of a program that SIGPIPE ended."""


class Commands(TyperGroup):
    """The root of the commands, where every error of theirs passes."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command. Raises typer.Exit for every error that a person can do something about."""
        try:
            try:
                return super().invoke(ctx)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            # Whoever read has left; what is still buffered must not fail again when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(_BROKEN_PIPE) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except DocumentError as error:
            for problem in error.problems:
                output.fail(str(problem))
            raise typer.Exit(1) from None
        except (PermanentError, BillingError) as error:
            _end(str(error), 2)
        except TransientError as error:
            _end(f"{error}; nothing was changed, try again", 3)
        except psycopg.errors.InsufficientPrivilege as error:
            _end(f"the database user may not do this ({error}): use another user, or have the right granted", 2)
        except Exception as error:
            # Wrong options. Typer draws a box around these, which folds paths and is no line for a log. Where its
            # class of errors lives has changed between versions of Typer; this method is what they have in common.
            explain = getattr(error, "format_message", None)
            if explain is None:
                raise
            if not explain():
                raise typer.Exit(2) from None  # no command was named: its help has been shown
            context = getattr(error, "ctx", None)
            help_ = f"; see `{context.command_path} --help`" if context is not None else ""
            _end(f"{explain().rstrip('.')}{help_}", 2)


def _end(sentence: str, status: int) -> NoReturn:
    output.fail(sentence)
    raise typer.Exit(status) from None


app = typer.Typer(
    name="tallymark",
    cls=Commands,
    help="Meter the use of an API with OpenTelemetry and turn it into money that can be proved.",
    epilog=STATUSES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        output.say(f"tallymark {version('tallymark')}")
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Meter the use of an API with OpenTelemetry and turn it into money that can be proved."""


app.command()(serve.serve)
app.command()(demo.demo)
app.command(name="import")(imports.import_)
app.command()(usage.usage)
app.command()(invoice.invoice)
app.add_typer(plans.commands, name="plans")
app.add_typer(meters.commands, name="meters")
app.add_typer(tokens.commands, name="tokens")
app.add_typer(tenants.commands, name="tenants")
app.command()(check.check)
app.command()(audit.audit)
app.add_typer(quarantine.commands, name="quarantine")
app.command()(database.migrate)
app.command()(database.status)
app.command()(health.health)


def run() -> int:
    """Runs the command line of this process and returns its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A name that the terminal's encoding lacks is shown as its escape instead of ending the command.
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="tallymark")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0
