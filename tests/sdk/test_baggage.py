"""The account travels with a request from service to service: exactly, and only where both sides want it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import baggage, propagate
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tallymark import configure, identify
from tallymark.assembly import Runtime
from tallymark.baggage import IdentityPropagator, adopt
from tallymark.calls import Call
from tallymark.dimensions import is_text
from tallymark.identity import NOBODY, Identity, current_identity
from tallymark.integrations.serving import serving
from tallymark.runtime import new_runtime, using
from tallymark.settings import Settings
from tests.sdk.fake_collector import FakeCollector

ACCOUNTS = ["acme", "Müller & Söhne", "株式会社", "a+b=c; d,e%20", '"quoted"', "x" * 255]


@pytest.fixture(autouse=True)
def own_propagator() -> Iterator[None]:
    before = propagate.get_global_textmap()
    yield
    propagate.set_global_textmap(before)


@pytest.fixture
def carrying() -> Iterator[Callable[..., None]]:
    """Whether this process sends and accepts, without delivering anything."""
    own = new_runtime()
    with using(own):

        def switch(sends: bool = False, accepts: bool = False) -> None:
            own.settings = Settings(sends_baggage=sends, accepts_baggage=accepts)

        yield switch


class Service:
    """One of the two, in a process of its own."""

    def __init__(self, name: str, collector: FakeCollector, state_dir: Path, **env: str) -> None:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        arguments = [f"tests.sdk.baggage_services:{name}", "--fd", str(listener.fileno()), "--log-level", "error"]
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "TALLYMARK_"))}
        env = {"TALLYMARK_ENDPOINT": collector.endpoint, "TALLYMARK_STATE_DIR": str(state_dir / name), **env}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", *arguments], env={**kept, **env}, pass_fds=[listener.fileno()]
        )
        listener.close()

    def stop(self) -> None:
        """Lets it deliver what is left."""
        self.process.terminate()
        self.process.wait(60)


@pytest.fixture
def services(collector: FakeCollector, state_dir: Path) -> Iterator[Callable[..., Any]]:
    """Starts both; gives the front's address and what stops them and returns the quantity by (meter, account)."""
    running: list[Service] = []

    def start(front: str, back: str) -> tuple[str, Callable[[], Counter[tuple[str, str | None]]]]:
        running.append(Service("back", collector, state_dir, TALLYMARK_BAGGAGE=back))
        running.append(Service("front", collector, state_dir, TALLYMARK_BAGGAGE=front, BACK=running[0].url))

        def billed() -> Counter[tuple[str, str | None]]:
            for service in reversed(running):
                service.stop()
            return by_account(collector)

        return running[1].url, billed

    yield start
    for service in running:
        service.process.kill()
        service.process.wait(60)


def by_account(collector: FakeCollector) -> Counter[tuple[str, str | None]]:
    found: Counter[tuple[str, str | None]] = Counter()
    for (_, meter, _, attributes, _, _), value in collector.points().items():
        texts = {name: AnyValue.FromString(raw).string_value for name, raw in attributes}
        found[meter, texts.get("tallymark.account.id")] += int(value)
        assert value == Decimal(int(value))
    return found


def ask(url: str, times: int = 1, **headers: str) -> None:
    with httpx.Client(timeout=60) as client:
        for _ in range(times):
            assert client.get(f"{url}/work", headers=headers).json() == "3"


def test_each_account_is_billed_for_what_was_done_for_it_in_both_services(services: Callable[..., Any]) -> None:
    url, billed = services(front="send", back="accept")
    expected: Counter[tuple[str, str | None]] = Counter()
    for n, account in enumerate(ACCOUNTS, start=1):
        ask(url, n, **{"x-key": quote(account)})
        expected["front.calls", account] = n
        expected["back.calls", account] = 3 * n
    ask(url, 2)  # a stranger
    expected["front.calls", None], expected["back.calls", None] = 2, 6
    assert billed() == expected


def test_whom_the_called_service_names_itself_counts(services: Callable[..., Any]) -> None:
    url, billed = services(front="true", back="true")
    ask(url, 2, **{"x-key": "acme"})
    ask(url, 3, **{"x-key": "acme", "x-own": "globex"})
    assert billed() == {("front.calls", "acme"): 5, ("back.calls", "acme"): 6, ("back.calls", "globex"): 9}


@pytest.mark.parametrize(("front", "back"), [("accept", "accept"), ("send", "send"), ("false", "true")])
def test_both_sides_must_want_it(services: Callable[..., Any], front: str, back: str) -> None:
    url, billed = services(front, back)
    ask(url, 2, **{"x-key": "acme"})
    assert billed() == {("front.calls", "acme"): 2, ("back.calls", None): 6}


def test_what_a_stranger_writes_goes_no_further_than_a_service_that_sends(services: Callable[..., Any]) -> None:
    """OpenTelemetry itself hands on a stranger's baggage to every called service."""
    url, billed = services(front="send", back="accept")
    forged = {"baggage": "tallymark.account.id=victim,tallymark.plan=free,other=1"}
    ask(url, 2, **forged)
    ask(url, 1, **forged, **{"x-key": "acme"})
    assert billed() == {
        ("front.calls", None): 2,
        ("back.calls", None): 6,
        ("front.calls", "acme"): 1,
        ("back.calls", "acme"): 3,
    }


def adopted(header: str | None) -> Identity:
    with serving(Call()):
        adopt(lambda name: header if name == "baggage" else None)
        return current_identity()


def sent(context: Context | None = None) -> dict[str, object]:
    carrier: dict[str, str] = {}
    IdentityPropagator(W3CBaggagePropagator()).inject(carrier, context)
    return dict(baggage.get_all(W3CBaggagePropagator().extract(carrier, Context())))


names = st.text(min_size=1, max_size=255).filter(is_text)


@given(account=names, plan=st.none() | names)
def test_any_name_arrives_as_it_is_or_not_at_all(account: str, plan: str | None) -> None:
    with using(new_runtime()) as own, identify(account=account, plan=plan):
        own.settings = Settings(sends_baggage=True, accepts_baggage=True)
        carrier: dict[str, str] = {}
        IdentityPropagator(W3CBaggagePropagator()).inject(carrier, Context())
        found = adopted(carrier.get("baggage"))
        if account == account.strip() and "\ufffd" not in account:
            assert found.account == account
            assert found.plan == (plan if plan and plan == plan.strip() and "\ufffd" not in plan else None)
        else:
            assert found == NOBODY


def test_off_means_that_the_header_is_not_even_asked_for(carrying: Callable[..., None]) -> None:
    carrying(sends=False, accepts=False)
    with serving(Call()):
        adopt(lambda name: pytest.fail("asked"))
    identify(account="acme")
    assert sent() == {}
    assert not isinstance(propagate.get_global_textmap(), IdentityPropagator)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "other=1",
        "tallymark.account.id=",
        "tallymark.account.id",
        "tallymark.account.id=%ff%fe",
        "tallymark.account.id=a%00b",
        "tallymark.account.id=" + "x" * 256,
        "tallymark.account.id=" + "x" * 9_000,
        "tallymark.plan=pro",
        "=,;==%",
    ],
)
def test_what_names_no_account_identifies_nobody(carrying: Callable[..., None], header: str | None) -> None:
    carrying(accepts=True)
    assert adopted(header).account is None


def test_a_plan_of_the_resolver_stays_with_an_account_from_baggage(carrying: Callable[..., None]) -> None:
    carrying(accepts=True)
    with serving(Call()):
        identify(user="u-1", plan="own")
        adopt(lambda name: "tallymark.account.id=acme")
        assert current_identity() == Identity("acme", "u-1", "own")
    with serving(Call()):
        identify(account="named")
        adopt(lambda name: "tallymark.account.id=acme")
        assert current_identity() == Identity("named")


def test_a_header_that_cannot_be_read_harms_no_request(carrying: Callable[..., None], caplog: Any) -> None:
    carrying(accepts=True)
    with serving(Call()):
        adopt(lambda name: str(1 / 0))
        assert current_identity() == NOBODY
    assert "the caller's baggage could not be read: ZeroDivisionError" in caplog.text


def test_the_account_is_sent_though_there_is_other_baggage(carrying: Callable[..., None]) -> None:
    carrying(sends=True)
    forged = baggage.set_baggage("tallymark.account.id", "forged", Context())
    context = forged
    for number in range(300):  # more than the propagator takes
        context = baggage.set_baggage(f"other{number}", "x" * 40, context)
    with identify(account="acme", user="a person"):
        found = sent(context)
    assert found["tallymark.account.id"] == "acme"
    assert found["other0"] == "x" * 40
    assert "a person" not in found.values()
    with identify(account=None):
        assert sent(forged) == {}


def test_a_propagator_that_the_host_sets_later_is_found_by_the_next_request(
    fresh: Runtime, collector: FakeCollector, caplog: Any
) -> None:
    configure(endpoint=collector.endpoint, baggage="send")
    configure(endpoint=collector.endpoint, baggage="send")
    ours = propagate.get_global_textmap()
    assert isinstance(ours, IdentityPropagator)
    assert not isinstance(ours._inner, IdentityPropagator)
    propagate.set_global_textmap(TraceContextTextMapPropagator())
    with serving(Call()):
        adopt(lambda name: pytest.fail("it sends, and does not accept"))
    assert isinstance(propagate.get_global_textmap(), IdentityPropagator)
    assert "OTEL_PROPAGATORS" in caplog.text
