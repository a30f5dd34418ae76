from __future__ import annotations

from collections.abc import Iterator

import pytest

from tallymark.assembly import Runtime
from tallymark.testing import Captured, capture_usage


@pytest.fixture
def usage(fresh: Runtime) -> Iterator[Captured]:
    with capture_usage() as captured:
        yield captured
