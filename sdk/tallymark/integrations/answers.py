"""What a handler's result says of the answer's status, by the classes of the frameworks themselves.

Results of other kinds have a `status_code` too: the answer of an HTTP client, a model that the service returns as JSON.
"""

from __future__ import annotations

import sys
from typing import Final

from tallymark.calls import status_of

_ANSWERS: Final = (
    ("starlette.responses", "Response"),
    ("litestar.response.base", "Response"),
    ("litestar.response.base", "ASGIResponse"),
    ("django.http.response", "HttpResponseBase"),
    ("werkzeug.sansio.response", "Response"),
    ("webob.response", "Response"),
    ("bottle", "BaseResponse"),
)


def is_a(value: object, module: str, name: str) -> bool:
    """Whether `value` is of a class that may not even have been imported."""
    known = getattr(sys.modules.get(module), name, None)
    return isinstance(known, type) and isinstance(value, known)


def status_of_answer(result: object) -> int | None:
    """The status of a framework's response object; None for anything else."""
    if not hasattr(result, "status_code"):
        return None
    return status_of(result) if any(is_a(result, *answer) for answer in _ANSWERS) else None
