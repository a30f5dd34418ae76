"""A small Django site, with every kind of view."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

from django.core.exceptions import PermissionDenied
from django.http import FileResponse, Http404, HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import include, path, re_path
from django.utils.decorators import method_decorator
from django.views import View

from tallymark import identify, measure, track_usage

calls = track_usage("calls")
TRACKED = [
    track_usage("requests"),
    track_usage("egress", measure.response_bytes),
    track_usage("ingress", measure.request_bytes),
]


def whose(request: HttpRequest) -> dict[str, str] | None:
    account = request.headers.get("account")
    return None if account is None else {"account": account}


@calls
def read(request: HttpRequest, thing: int) -> HttpResponse:
    identify(user="sync")
    if thing == 404:
        raise Http404
    if thing == 403:
        raise PermissionDenied
    if thing == 500:
        raise ZeroDivisionError
    return JsonResponse({"thing": thing, "sent": len(request.body)}, status=201 if thing == 201 else 200)


@calls
async def read_async(request: HttpRequest, thing: str) -> HttpResponse:
    await asyncio.sleep(0)
    identify(account="async-owner")
    if thing == "500":
        raise LookupError
    return HttpResponse("x", status=202)


def identifying(request: HttpRequest) -> HttpResponse:
    identify(account="view-owner")
    return HttpResponse("x")


@track_usage("chunks", measure.items)
def chunks() -> Iterator[bytes]:
    yield from (b"x" * 100 for _ in range(3))


@track_usage("chunks", measure.items)
async def chunks_async() -> AsyncIterator[bytes]:
    for _ in range(3):
        await asyncio.sleep(0)
        yield b"y" * 100


async def endless() -> AsyncIterator[bytes]:
    while True:
        await asyncio.sleep(0.001)
        yield b"z" * 10_000


def stream(request: HttpRequest) -> StreamingHttpResponse:
    identify(account="stream-owner")
    return StreamingHttpResponse(chunks(), status=206)


async def stream_async(request: HttpRequest) -> StreamingHttpResponse:
    identify(account="stream-owner")
    return StreamingHttpResponse(chunks_async())


async def forever(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(endless())


async def breaks() -> AsyncIterator[bytes]:
    yield b"y" * 100
    raise ArithmeticError


def breaking(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(breaks())


def file(request: HttpRequest) -> FileResponse:
    return FileResponse(open(__file__, "rb"))  # noqa: PTH123


class Parent(View):
    @calls
    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse("parent")


class Child(Parent):
    @calls
    def get(self, request: HttpRequest) -> HttpResponse:
        return super().get(request)


@method_decorator(track_usage("calls"), name="dispatch")
class Dispatched(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse("dispatched")


class AsyncView(View):
    @calls
    async def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse("async")


inner: list[Any] = [
    path("things/<int:thing>/", read),
    re_path(r"^async/(?P<thing>\w+)$", read_async),
    path("identifying", identifying),
]
urlpatterns = [
    path("child", Child.as_view()),
    path("v1/", include(inner)),
    path("dispatched", Dispatched.as_view()),
    path("async-view", AsyncView.as_view()),
    path("stream", stream),
    path("stream-async", stream_async),
    path("forever", forever),
    path("breaking", breaking),
    path("file", file),
]
