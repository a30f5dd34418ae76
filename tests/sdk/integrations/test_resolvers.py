"""What a resolver may be and answer, and what `track` may be: anything else is told, and nothing silently nobody's."""

from __future__ import annotations

import functools
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import pytest
from celery import Celery
from fastapi import Depends, FastAPI, Request
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from tallymark import identify, record, track_usage
from tallymark.decorators import UsageTracker
from tallymark.errors import DeclarationError
from tallymark.identity import Identity
from tallymark.integrations.asgi import UsageMiddleware
from tallymark.integrations.celery import meter_tasks
from tallymark.integrations.grpc import AsyncUsageInterceptor, UsageInterceptor
from tallymark.integrations.serving import Requests
from tallymark.integrations.wsgi import UsageMiddleware as WsgiMiddleware
from tallymark.settings import Settings
from tallymark.testing import Captured
from tests.sdk.handlers import Get
from tests.sdk.integrations.clients import ask, uvicorn_serving

SECRET = "key-of-acme"


def served(found: Any, times: int = 1) -> None:
    requests = Requests[None]("Middleware", lambda about: found, [track_usage("requests")])
    for _ in range(times):
        requests.begin(Get(), None).end()


class Unreadable(Mapping[str, str]):
    def __getitem__(self, name: str) -> str:
        raise OSError

    def __iter__(self) -> Iterator[str]:
        raise OSError

    def __len__(self) -> int:
        raise OSError


@pytest.mark.parametrize(
    ("found", "returned"),
    [
        (SECRET, "a str"),
        ((SECRET, "u"), "a tuple"),
        ([SECRET], "a list"),
        ({SECRET}, "a set"),
        (True, "a bool"),
        (42, "a int"),
        (object(), "a object"),
        ({"account_id": SECRET}, "a dict with none of the three names"),
        ({SECRET: "acme"}, "a dict with none of the three names"),
        (MappingProxyType({"Account": SECRET}), "a mappingproxy with none of the three names"),
    ],
)
def test_what_names_nobody_is_told_and_counted_without_an_account(
    usage: Captured, caplog: pytest.LogCaptureFixture, found: object, returned: str
) -> None:
    served(found, times=3)
    assert {u.account: u.quantity for u in usage} == {None: 3}
    (line,) = caplog.messages
    assert line == (
        f"Middleware: the identify function returned {returned}; it must return an Identity, a mapping with any of "
        "account, user and plan, or None; the request is recorded without an account"
    )
    assert SECRET not in caplog.text  # what it has looked at may be a credential


def test_a_mapping_says_what_it_knows_and_the_rest_is_told(usage: Captured, caplog: pytest.LogCaptureFixture) -> None:
    served({"account": "acme", "plan": "pro", "tier": SECRET, "key": SECRET})
    assert {(u.account, u.plan): u.quantity for u in usage} == {("acme", "pro"): 1}
    (line,) = caplog.messages
    assert "returned a dict with names beside the three (2)" in line
    assert "the others are left out" in line
    assert SECRET not in caplog.text


@pytest.mark.parametrize("found", [None, {}, MappingProxyType({})])
def test_who_is_not_known_yet_is_no_error(usage: Captured, caplog: pytest.LogCaptureFixture, found: Any) -> None:
    requests = Requests[None]("Middleware", lambda about: found, [track_usage("requests")])
    one = requests.begin(Get(), None)
    identify(account="later")
    one.end()
    assert {u.account: u.quantity for u in usage} == {"later": 1}
    assert caplog.messages == []


@pytest.mark.parametrize(
    "found", [Identity("acme", "u"), {"account": "acme", "user": "u"}, MappingProxyType({"account": "acme"})]
)
def test_who_is_known(usage: Captured, caplog: pytest.LogCaptureFixture, found: Any) -> None:
    served(found)
    assert {u.account: u.quantity for u in usage} == {"acme": 1}
    assert caplog.messages == []


def test_a_mapping_that_cannot_be_read_is_one_more_way_to_raise(
    usage: Captured, caplog: pytest.LogCaptureFixture
) -> None:
    served(Unreadable())
    assert {u.account: u.quantity for u in usage} == {None: 1}
    assert "the identify function raised" in caplog.text


def test_an_inner_resolver_that_is_wrong_leaves_nobodys_account_in_force(usage: Captured) -> None:
    outer = Requests[None]("Outer", lambda about: {"account": "outer"}, [track_usage("requests")])
    call = Get()
    one = outer.begin(call, None)
    Requests[None]("Inner", lambda about: "inner", ()).begin(call, None).end()  # type: ignore[arg-type,return-value]
    one.end()
    assert {u.account: u.quantity for u in usage} == {None: 1}


async def look_up(about: object) -> dict[str, str]:
    return {"account": "acme"}


async def steps(about: object) -> AsyncIterator[dict[str, str]]:
    yield {"account": "acme"}


class LookUp:
    async def __call__(self, about: object) -> dict[str, str]:
        return {"account": "acme"}


async def nothing(*_: object) -> None: ...


MAKERS: dict[str, Callable[[Any], object]] = {
    "wsgi": lambda resolver: WsgiMiddleware(lambda environ, start_response: [], identify=resolver),
    "grpc": lambda resolver: UsageInterceptor(identify=resolver),
    "grpc.aio": lambda resolver: AsyncUsageInterceptor(identify=resolver),
    "celery": lambda resolver: meter_tasks(Celery("shop", broker="memory://", set_as_current=False), resolver),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    "resolver", [look_up, steps, LookUp(), functools.partial(look_up)], ids=["function", "steps", "object", "partial"]
)
def test_a_resolver_that_must_be_awaited_is_refused_where_it_is_given(
    make: Callable[[Any], object], resolver: object
) -> None:
    with pytest.raises(DeclarationError, match=r"identify: .*no `async`.*call tallymark.identify\(\) in "):
        make(resolver)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_resolver_that_is_no_function_is_refused(make: Callable[[Any], object]) -> None:
    with pytest.raises(DeclarationError, match="identify: a function is needed, not a dict"):
        make({"account": "acme"})


@pytest.mark.parametrize(
    ("resolver", "wrong"),
    [
        (look_up, "no `async`"),
        (LookUp(), "no `async`"),
        (functools.partial(look_up), "no `async`"),
        ({"account": "acme"}, "a function is needed, not a dict"),
    ],
    ids=["function", "object", "partial", "mapping"],
)
def test_starlettes_requests_are_served_where_the_resolver_is_found_wrong_with_the_first_of_them(
    usage: Captured, caplog: pytest.LogCaptureFixture, resolver: Any, wrong: str
) -> None:
    """Starlette makes its middlewares late: what these raise is every request's 500."""
    usage._runtime.settings = Settings(accepts_baggage=True)
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("served"))])
    app.add_middleware(UsageMiddleware, identify=resolver, track=track_usage("requests"))
    with uvicorn_serving(app) as port:
        for _ in range(3):
            # Nor is the caller's word taken for what the service meant to find out itself.
            assert ask(port, "/", baggage="tallymark.account.id=whoever") == 200
    assert {(u.meter, u.account): u.quantity for u in usage} == {("requests", None): 3}
    told, *more = [line for line in caplog.messages if "identify: " in line]
    assert wrong in told
    assert "requests are recorded without an account" in told
    assert {record.levelname for record in caplog.records if "identify" in record.getMessage()} == {"ERROR"}
    assert more == []


def test_a_coroutine_from_a_plain_function_is_told_and_left_in_order(
    usage: Captured, caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "was never awaited" would be one
        served(look_up(None))
    assert {u.account: u.quantity for u in usage} == {None: 1}
    assert "returned a coroutine" in caplog.text
    assert "call tallymark.identify() in " in caplog.text


@pytest.mark.parametrize("as_middleware", [False, True])
def test_the_way_for_what_has_to_be_awaited(usage: Captured, as_middleware: bool) -> None:
    """A dependency, or a middleware inside Tallymark's."""

    async def whose(request: Request) -> None:
        identify(**await look_up(request))

    app = FastAPI(dependencies=[] if as_middleware else [Depends(whose)])
    app.add_api_route("/", lambda: record("inside"))

    class Inner:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                identify(**await look_up(scope))
            await self.app(scope, receive, send)

    if as_middleware:
        app.add_middleware(Inner)
    app.add_middleware(UsageMiddleware, track=track_usage("requests"))
    with uvicorn_serving(app) as port:
        assert ask(port, "/") == 200
    assert {(u.meter, u.account): u.quantity for u in usage} == {("requests", "acme"): 1, ("inside", "acme"): 1}


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("form", ["one", "list", "tuple", "generator"])
def test_one_tracker_is_taken_as_several_are(usage: Captured, lazily: bool, form: str) -> None:
    def given() -> Any:
        one: UsageTracker = track_usage("requests")
        return {"one": one, "list": [one], "tuple": (one,), "generator": (each for each in [one])}[form]

    requests = Requests[None]("Middleware", None, given if lazily else given())
    for _ in range(3):
        requests.begin(Get(), None).end()
    assert usage.total("requests") == 3


@pytest.mark.parametrize(
    ("track", "given"),
    [("requests", "str"), (["requests"], "str"), ([None], "NoneType"), (7, "int"), (None, "NoneType")],
)
def test_what_is_no_tracker_is_refused_where_it_is_given(track: Any, given: str) -> None:
    with pytest.raises(DeclarationError, match=rf"Middleware: track= takes what track_usage\(\) made.*, not a {given}"):
        Requests[None]("Middleware", None, track)


def test_what_is_no_tracker_is_told_where_it_is_made_later(usage: Captured, caplog: pytest.LogCaptureFixture) -> None:
    requests = Requests[None]("Middleware", None, lambda: ["requests"])  # type: ignore[arg-type,return-value]
    requests.begin(Get(), None).end()
    requests.begin(Get(), None).end()
    assert list(usage) == []
    (line,) = caplog.messages
    assert "requests are not counted" in line
    assert "track_usage()" in line
