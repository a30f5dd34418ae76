"""A runtime for a benchmark: a journal on the disk, as in a service, and a collector that takes everything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Final

from tallymark import runtime
from tallymark.assembly import Runtime
from tallymark.settings import Settings

ATTRIBUTES: Final = {
    "http.request.method": "GET",
    "http.route": "/items/{id}",
    "http.response.status_code": 200,
}
"""With account and plan, the five that counts are compared by."""


@contextmanager
def metered(endpoint: str = "http://127.0.0.1:9", interval_s: float = 3600.0) -> Iterator[Runtime]:
    """Usage of the whole process goes to it inside the block. The endpoint is asked only when an interval ends."""
    own = runtime.new_runtime(meters=runtime.current().meters)
    with TemporaryDirectory(prefix="tallymark-bench-") as folder, runtime.using(own):
        own.configure(Settings(endpoint=endpoint, interval_s=interval_s, state_dir=folder))
        yield own
        own.shutdown(5.0 if interval_s < 3600 else 0)
