"""What the tests of decorated handlers share."""

from __future__ import annotations

from typing import Any

from tallymark.calls import HttpCall
from tallymark.testing import Captured

HTTP = {"http.request.method": "GET", "http.route": "/v1/{id}"}


class Answer:
    def __init__(self, status_code: object) -> None:
        self.status_code = status_code


class HTTPError(Exception):
    def __init__(self, status_code: int) -> None:
        self.status_code = status_code


class Get(HttpCall):
    def method(self) -> str:
        return "GET"

    def route(self) -> str:
        return "/v1/{id}"

    def default_status(self) -> int:
        return 201


def only(usage: Captured) -> dict[str, Any]:
    """The attributes of the one stream that was recorded, without its account."""
    (one,) = usage
    return {k: v for k, v in one.attributes.items() if k != "tallymark.account.id"}


def errors(usage: Captured) -> dict[object, object]:
    """Quantities by `error.type`, of all that was recorded."""
    found: dict[object, object] = {}
    for one in usage:
        key = one.attributes.get("error.type")
        found[key] = found.get(key, 0) + one.quantity  # type: ignore[operator]
    return found
