"""The pytest plugin: the fixture `captured_usage`.

A module of its own beside the package, because pytest imports its plugins before it starts to measure coverage, in
every run of everybody who has Tallymark installed: Tallymark itself is not imported before a test asks for it.
`-p no:tallymark` leaves it out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tallymark.testing import Captured


@pytest.fixture
def captured_usage() -> Iterator[Captured]:
    """What Tallymark has recorded since the test began: `captured_usage.assert_billed("tokens", 3, account="acme")`.

    Nothing is sent or written. The test begins with nobody identified, and whom it identifies is forgotten after it.
    """
    from tallymark import identify
    from tallymark.testing import capture_usage

    with identify(account=None, user=None, plan=None), capture_usage() as captured:
        yield captured
