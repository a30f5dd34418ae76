"""Django: every request, on WSGI and ASGI, also one that no view has answered.

    MIDDLEWARE = ["tallymark.integrations.django.UsageMiddleware", ...]      first, so that it stands around the others
    TALLYMARK_IDENTIFY = "shop.usage.whose"                                  a function of the request
    TALLYMARK_TRACK = "shop.usage.TRACKED"                                   a list of what track_usage() made

Both settings may be left out, and may be the objects themselves. `http.route` is "/" and the route of the URL pattern,
those of `include()` before it. Views, sync and async, may call `tallymark.identify()`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.conf import settings
from django.core.handlers.asgi import ASGIRequest
from django.http import HttpRequest
from django.http.response import HttpResponseBase, StreamingHttpResponse
from django.utils.module_loading import import_string

from tallymark.calls import METHODS, OTHER_METHOD, HttpCall, IncompleteAnswerError
from tallymark.integrations.answers import status_of_answer
from tallymark.integrations.serving import Requests, Served
from tallymark.integrations.wsgi import CALL, CountedInput

GetResponse = Callable[[HttpRequest], Any]


class RequestMiddleware:
    """What `UsageMiddleware` is around one handler, whoever says how requests are served."""

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: GetResponse, requests: Requests[HttpRequest]) -> None:
        self._get_response = get_response
        self._requests = requests
        self._is_async = iscoroutinefunction(get_response)
        if self._is_async:
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        if self._is_async:
            return self._answer_async(request)
        call, served = self._begin(request)
        try:
            response: HttpResponseBase = self._get_response(request)
        except BaseException as error:
            served.end(error)
            raise
        finally:
            self._leave(request, call)
        return response if call is None else call.ending(response, served)

    async def _answer_async(self, request: HttpRequest) -> HttpResponseBase:
        call, served = self._begin(request)
        try:
            response: HttpResponseBase = await self._get_response(request)
        except BaseException as error:
            served.end(error)
            raise
        finally:
            self._leave(request, call)
        return response if call is None else call.ending(response, served)

    def _leave(self, request: HttpRequest, call: DjangoCall | None) -> None:
        if call is not None:
            request.META.pop(CALL, None)  # call and request would keep each other alive

    def _begin(self, request: HttpRequest) -> tuple[DjangoCall | None, Served]:
        around = request.META.get(CALL) or getattr(request, "scope", {}).get(CALL)
        if isinstance(around, HttpCall):
            around.routed = lambda: route_template(request)
            return None, self._requests.begin(around, request)
        call = request.META[CALL] = DjangoCall(request)  # found by another one inside
        return call, self._requests.begin(call, request)


class UsageMiddleware(RequestMiddleware):
    """A middleware for sync and async handlers alike. Where `wsgi.UsageMiddleware` or `asgi.UsageMiddleware` stands
    around the whole application, this one tells it the route, and adds what it identifies and tracks.

    `TALLYMARK_IDENTIFY` is called with the request (its body unread, nobody logged in yet) and returns whom it is for:
    an `Identity`, a mapping with any of account, user and plan, or None when that is not known yet. It must not block.
    """

    def __init__(self, get_response: GetResponse) -> None:
        identify, track = _setting("TALLYMARK_IDENTIFY"), _setting("TALLYMARK_TRACK") or ()
        super().__init__(get_response, Requests("UsageMiddleware", identify, track))


class DjangoCall(HttpCall):
    """A request as Django sees it: what a server does to the answer's body afterwards is not counted."""

    __slots__ = ("_error", "_finished", "_method", "_request")

    def __init__(self, request: HttpRequest) -> None:
        super().__init__()
        self.request_bytes = 0
        self.response_bytes: int = 0
        self._request = request
        method = request.method
        self._method = method if method in METHODS else OTHER_METHOD
        self._finished = False
        self._error: BaseException | None = None
        stream: Any = getattr(request, "_stream", None)
        if stream is None:
            pass
        elif isinstance(request, ASGIRequest):  # Django has received all of it before it makes the request
            self.request_bytes = stream.seek(0, 2)
            stream.seek(0)
        else:
            cast(Any, request)._stream = CountedInput(stream, self)

    def header(self, name: str) -> str | None:
        return self._request.headers.get(name) or None

    def ending(self, response: HttpResponseBase, served: Served) -> HttpResponseBase:
        """The same response; the call ends when the server closes it."""
        self.sent_status = response.status_code
        if isinstance(response, StreamingHttpResponse):
            content: Any = response.streaming_content
            counted: Any = self._counted_async if response.is_async else self._counted
            response.streaming_content = counted(content, served)
        response.close = _Closing(self, response, served)  # type: ignore[method-assign]
        return response

    def closed(self, response: HttpResponseBase) -> None:
        """The server has closed the response."""
        if not isinstance(response, StreamingHttpResponse):
            self._sent(cast(Any, response).content)
            self._finished = True

    def failed(self, error: BaseException) -> None:
        """Closing it raised."""
        self._error = error

    def end_of_answer(self) -> BaseException | None:
        """How the answer has ended, if not well."""
        return self._error or (None if self._finished or self._is_without_body() else IncompleteAnswerError())

    def _is_without_body(self) -> bool:
        return self._method == "HEAD" or self.sent_status in (204, 304)

    def _sent(self, part: bytes) -> None:
        if not self._is_without_body():  # servers leave it out
            self.response_bytes += len(part)

    def _counted(self, parts: Iterator[bytes], served: Served) -> Iterator[bytes]:
        with self._noting_errors(served):
            for part in parts:
                self._sent(part)
                yield part

    async def _counted_async(self, parts: AsyncIterator[bytes], served: Served) -> AsyncIterator[bytes]:
        with self._noting_errors(served):
            async for part in parts:
                self._sent(part)
                yield part

    @contextmanager
    def _noting_errors(self, served: Served) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if isinstance(error, Exception):
                self._error = error
            served.answered(self.end_of_answer())
            raise
        self._finished = True

    def method(self) -> str | None:
        return self._method

    def route(self) -> str | None:
        return route_template(self._request)

    def status_of(self, result: object, arguments: Mapping[str, object]) -> int | None:
        return status_of_answer(result)

    def status_of_error(self, error: Exception) -> int | None:
        """Django, a middleware or a handler of the service's own makes an answer of any exception."""
        return None


class _Closing:
    """A response's `close`, with which its call ends. Django's ASGI handler does not call it where sending the answer
    has raised, nor does Werkzeug where the client has reset the connection: then the call ends when nobody holds the
    response any more."""

    def __init__(self, call: DjangoCall, response: HttpResponseBase, served: Served) -> None:
        self._call = call
        self._response = response
        self._close = response.close
        self._served = served

    def __call__(self) -> None:
        self._call.closed(self._response)
        try:
            self._close()
        except BaseException as error:
            self._call.failed(error)
            raise
        finally:
            self._served.end(self._call.end_of_answer())

    def __del__(self) -> None:
        self._served.answered(self._call.end_of_answer())


def route_template(request: HttpRequest) -> str | None:
    """The route of the URL pattern that matched; None where none did."""
    route = getattr(request.resolver_match, "route", None)
    return None if route is None else "/" + route.removeprefix("^").removeprefix("/")


def _setting(name: str) -> Any:
    value = getattr(settings, name, None)
    return import_string(value) if isinstance(value, str) else value
