from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tallymark.assembly import Runtime
from tallymark.settings import Settings
from tallymark.testing import Captured, capture_usage
from tests.sdk.fake_collector import FakeCollector
from tests.sdk.integrations.clients import PATIENCE_S


@pytest.fixture
def usage(fresh: Runtime) -> Iterator[Captured]:
    with capture_usage() as captured:
        yield captured


@pytest.fixture
def configured(fresh: Runtime, collector: FakeCollector, settings: Callable[..., Settings]) -> Runtime:
    """Sends nothing by itself, and waits long at the end."""
    fresh.configure(settings(collector.endpoint, interval_s=86_400.0, shutdown_timeout_s=PATIENCE_S))
    return fresh
