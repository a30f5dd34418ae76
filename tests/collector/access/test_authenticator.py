"""Who is let in, for how long, and what it costs the database when nobody is."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from tallymark_collector.access import Authenticator, Principal, Scope, lookups, tokens
from tallymark_collector.access.authenticator import ANONYMOUS
from tallymark_collector.access.lookups import LookUps
from tallymark_collector.access.requests import authorization_of, tenant_of
from tallymark_collector.errors import Forbidden, Overloaded, StoreUnavailable, Unauthenticated
from tests.collector.access.conftest import START, Clock, Directory


async def test_a_token_says_the_tenant_and_the_scopes(authenticator: Authenticator, directory: Directory) -> None:
    ours, theirs = directory.add("acme-corp"), directory.add("globex", [Scope.READ_ACCOUNT], "a")
    for scheme in ("Bearer ", "bearer ", "BEARER   "):
        assert (await authenticator.authenticate(scheme + ours)).tenant == "acme-corp"
    other = await authenticator.authenticate(f"Bearer {theirs}")
    assert (other.tenant, other.scopes, other.account) == ("globex", {Scope.READ_ACCOUNT}, "a")
    assert other.credential == theirs[:16]


BAD = [
    "",
    "Bearer",
    "Bearer ",
    "{token}",
    "Basic {token}",
    " Bearer {token}",
    "Bearer {token} ",
    "Bearer {token}\n",
    "Bearer\t{token}",
    "Bearer {token}, Bearer {token}",
    "Bearer {upper}",
    "Bearer {other}",
    "Bearer {wrong}",
    "Bearer {token}\u00e9",
    "Bearer \uff54mk_{tail}",
    "Bearer '{token}'",
    "Bearer {token}{pad}",
]


@pytest.mark.parametrize("form", BAD)
async def test_what_is_no_good_token_is_refused_without_being_repeated(
    authenticator: Authenticator, directory: Directory, form: str
) -> None:
    text = directory.add()
    known = tokens.read(text)
    assert known is not None
    wrong = tokens.of(known.id, tokens.make().text[17:60]).text
    value = form.format(
        token=text, upper=text.upper(), other=tokens.make().text, wrong=wrong, tail=text[4:], pad="x" * 10_000
    )
    with pytest.raises(Unauthenticated) as refused:
        await authenticator.authenticate(value)
    for secret in (text[17:60], text.upper()[17:60], wrong[17:60]):
        assert secret not in str(refused.value)


async def test_who_has_not_the_secret_learns_nothing_of_the_id(
    authenticator: Authenticator, directory: Directory
) -> None:
    known = tokens.read(directory.add())
    assert known is not None
    directory.revoke(known.text)
    said = set()
    for guess in (tokens.make(), tokens.of(known.id, tokens.make().text[17:60])):
        with pytest.raises(Unauthenticated) as refused:
            await authenticator.authenticate(f"Bearer {guess.text}")
        said.add(str(refused.value))
    assert said == {"this token is not known here"}


async def test_a_revoked_token_ends_when_what_is_remembered_does(
    authenticator: Authenticator, directory: Directory, clock: Clock
) -> None:
    text = directory.add()
    await authenticator.authenticate(f"Bearer {text}")
    directory.revoke(text)
    clock.seconds = lookups.REMEMBERED_SECONDS - 0.001
    await authenticator.authenticate(f"Bearer {text}")
    clock.seconds = lookups.REMEMBERED_SECONDS
    with pytest.raises(Unauthenticated, match=f"the token {text[:16]} is revoked"):
        await authenticator.authenticate(f"Bearer {text}")


async def test_a_token_expires_to_the_second(authenticator: Authenticator, directory: Directory, clock: Clock) -> None:
    text = directory.add(expires_at=START + timedelta(seconds=3))
    clock.seconds = 2.9
    await authenticator.authenticate(f"Bearer {text}")
    clock.seconds = 3
    with pytest.raises(Unauthenticated, match="is expired"):
        await authenticator.authenticate(f"Bearer {text}")
    assert len(directory.asked) == 1, "without asking again"


async def test_a_database_that_is_away_is_never_a_wrong_token(
    authenticator: Authenticator, directory: Directory, clock: Clock
) -> None:
    text = directory.add()
    await authenticator.authenticate(f"Bearer {text}")
    directory.away = StoreUnavailable("away")
    await authenticator.authenticate(f"Bearer {text}")
    clock.seconds = lookups.REMEMBERED_SECONDS
    for header in (f"Bearer {text}", f"Bearer {tokens.make().text}"):
        with pytest.raises(StoreUnavailable):
            await authenticator.authenticate(header)
    with pytest.raises(StoreUnavailable):
        await Authenticator(directory).authenticate(None)
    directory.away = None
    await authenticator.authenticate(f"Bearer {text}")


async def test_without_a_credential_everybody_is_the_default_tenant_until_the_first_is_made(
    authenticator: Authenticator, directory: Directory, clock: Clock
) -> None:
    for _ in range(100):
        assert await authenticator.authenticate(None) == ANONYMOUS
    assert directory.asked_any == 1
    text = directory.add("default")
    assert await authenticator.authenticate(f"Bearer {text}"), "it counts at once"
    clock.seconds = lookups.REMEMBERED_SECONDS
    with pytest.raises(Unauthenticated, match="no credential was sent"):
        await authenticator.authenticate(None)
    directory.rows.clear()
    clock.seconds *= 2
    with pytest.raises(Unauthenticated):
        await authenticator.authenticate(None)


async def test_a_bad_token_is_refused_where_none_is_needed(directory: Directory) -> None:
    for allowed in (False, True):
        with pytest.raises(Unauthenticated):
            await Authenticator(directory, allow_anonymous=allowed).authenticate(f"Bearer {tokens.make().text}")


async def test_anonymous_requests_may_be_allowed_beside_tokens(directory: Directory) -> None:
    text = directory.add("acme-corp")
    authenticator = Authenticator(directory, allow_anonymous=True)
    assert await authenticator.authenticate(None) == ANONYMOUS
    assert (await authenticator.authenticate(f"Bearer {text}")).tenant == "acme-corp"


async def test_a_certificate_is_the_tenant_that_its_names_were_given_to(
    authenticator: Authenticator, directory: Directory
) -> None:
    directory.trust("uri:spiffe://acme.example/shop")
    directory.trust("dns:globex.example", "globex")
    shop = ("sha256:" + "0" * 64, "uri:spiffe://acme.example/shop")
    assert (await authenticator.authenticate(None, shop)).tenant == "acme-corp"
    with pytest.raises(Unauthenticated, match="names of several tenants"):
        await authenticator.authenticate(None, (*shop, "dns:globex.example"))
    with pytest.raises(Unauthenticated, match="is named for no tenant"):
        await authenticator.authenticate(None, ("dns:acme.example",))
    text = directory.add("initech")
    assert (await authenticator.authenticate(f"Bearer {text}", shop)).tenant == "initech"
    with pytest.raises(Unauthenticated):
        await authenticator.authenticate("Bearer nonsense", shop)


async def test_a_collector_that_asks_for_certificates_is_closed_before_any_is_named(directory: Directory) -> None:
    with pytest.raises(Unauthenticated):
        await Authenticator(directory, closed=True).authenticate(None, ("dns:acme.example",))


async def test_guesses_are_bounded_in_queries_memory_and_waiting(
    directory: Directory, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = directory.add()
    guesser = Authenticator(directory, lookups=LookUps(directory, clock, clock.pause), now=clock.now)
    await guesser.authenticate(f"Bearer {good}")
    directory.asked.clear()
    refused = await asyncio.gather(
        *(guesser.authenticate(f"Bearer {tokens.make().text}") for _ in range(lookups.MAX_WAITING)),
        return_exceptions=True,
    )
    assert {type(error) for error in refused} == {Unauthenticated}
    assert len(directory.asked) == lookups.MAX_WAITING / lookups.MAX_KEYS
    assert clock.seconds >= (len(directory.asked) - 1) * lookups.GUESSING_INTERVAL, "not faster than that"

    monkeypatch.setattr(lookups, "MAX_REMEMBERED", 50)
    for _ in range(200):
        with pytest.raises(Unauthenticated):
            await guesser.authenticate(f"Bearer {tokens.make().text}")
    directory.asked.clear()
    clock.seconds = 0
    await guesser.authenticate(f"Bearer {good}")
    assert directory.asked == [], "guesses push nothing out that is good"


async def test_one_guess_again_and_again_is_one_query(authenticator: Authenticator, directory: Directory) -> None:
    directory.add()
    guess = tokens.make().text
    for _ in range(50):
        with pytest.raises(Unauthenticated):
            await authenticator.authenticate(f"Bearer {guess}")
    assert len(directory.asked) == 1


class Slow(Directory):
    """Answers when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()
        self.entered = asyncio.Event()

    async def find(self, keys):  # type: ignore[no-untyped-def]
        found = await super().find(keys)
        self.entered.set()
        await self.go.wait()
        return found


async def test_too_many_that_wait_are_asked_to_come_again_and_good_ones_overtake_them(clock: Clock) -> None:
    slow = Slow()
    texts = [slow.add() for _ in range(3)]
    slow.go.set()
    authenticator = Authenticator(slow, lookups=LookUps(slow, clock, clock.pause), now=clock.now)
    for text in texts:
        await authenticator.authenticate(f"Bearer {text}")
    slow.go.clear()
    slow.entered.clear()
    slow.asked.clear()
    clock.seconds = 60
    # One query is under way; then guesses fill the queue, then good ones whose time is up come.
    guesses = [
        asyncio.create_task(authenticator.authenticate(f"Bearer {tokens.make().text}"))
        for _ in range(lookups.MAX_WAITING + lookups.MAX_KEYS + 5)
    ]
    await slow.entered.wait()
    more = [asyncio.create_task(authenticator.authenticate(f"Bearer {tokens.make().text}")) for _ in range(300)]
    again = [asyncio.create_task(authenticator.authenticate(f"Bearer {text}")) for text in texts]
    hung_up = again.pop()
    await asyncio.sleep(0)
    hung_up.cancel()
    slow.go.set()
    assert [(await one).tenant for one in again] == ["acme-corp"] * 2
    assert set(slow.asked[1]) == {text[4:16] for text in texts}, "before the guesses that wait, and apart from them"
    answers = await asyncio.gather(*guesses, *more, return_exceptions=True)
    kinds = [type(answer) for answer in answers]
    assert set(kinds) == {Unauthenticated, Overloaded}
    assert kinds.count(Unauthenticated) <= lookups.MAX_WAITING + lookups.MAX_KEYS


async def test_requests_that_wait_are_bounded_though_they_show_the_same_guess(clock: Clock) -> None:
    """And those of one credential whose time is up; neither takes another credential's place."""
    slow = Slow()
    one, other = slow.add("acme-corp"), slow.add("globex")
    slow.go.set()
    authenticator = Authenticator(slow, lookups=LookUps(slow, clock, clock.pause), now=clock.now)
    for text in (one, other):
        await authenticator.authenticate(f"Bearer {text}")
    slow.go.clear()
    clock.seconds = 60
    guess, flood = tokens.make().text, lookups.MAX_WAITING + 7
    guesses = [asyncio.create_task(authenticator.authenticate(f"Bearer {guess}")) for _ in range(flood)]
    again = [asyncio.create_task(authenticator.authenticate(f"Bearer {one}")) for _ in range(flood)]
    await asyncio.sleep(0)
    quiet = asyncio.create_task(authenticator.authenticate(f"Bearer {other}"))
    slow.go.set()
    assert (await quiet).tenant == "globex"
    for tasks, kind in ((guesses, Unauthenticated), (again, Principal)):
        answers = [type(answer) for answer in await asyncio.gather(*tasks, return_exceptions=True)]
        assert (answers.count(kind), answers.count(Overloaded)) == (lookups.MAX_WAITING, 7)
    assert (await authenticator.authenticate(f"Bearer {one}")).tenant == "acme-corp"


async def test_receivers_get_a_tenant_that_may_write(authenticator: Authenticator, directory: Directory) -> None:
    found = tenant_of(authenticator)
    writes, reads = directory.add("acme-corp"), directory.add("acme-corp", [Scope.READ])
    assert await found({"Authorization": f"Bearer {writes}"}) == "acme-corp"
    assert await found([(b"authorization", f"Bearer {writes}".encode()), (b"host", b"\xff")]) == "acme-corp"
    with pytest.raises(Forbidden, match=f"{reads[:16]} may not send usage"):
        await found([("authorization", f"Bearer {reads}")])


def test_two_headers_are_one_too_many() -> None:
    assert authorization_of([("content-type", "x"), ("AUTHORIZATION", "y")]) == "y"
    assert authorization_of([]) is None
    for pairs in ([("authorization", "a"), ("authorization", "a")], [("authorization", "a"), (b"Authorization", b"b")]):
        with pytest.raises(Unauthenticated, match="more than once"):
            authorization_of(pairs)
    assert authorization_of([("authorization", b"Bearer \xff")]) == "Bearer ÿ"
