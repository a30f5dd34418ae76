"""Who a call is billed to: an account, the user who acted for it, its plan.

`identify()` sets a context variable, so threads and tasks each keep their own. One thing a context variable cannot
do: ASGI frameworks run a synchronous dependency in a worker thread on a *copy* of the request's context, and what
is set there never comes back. While an integration serves a request, an identity set in such a thread is therefore
also *published* on the request's `Call`, and holds wherever the context still carries the identity that the thread
started from. Nothing else is shared: a task that identified somebody for itself keeps that.
"""

from __future__ import annotations

import enum
import os
import threading
import weakref
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Final

from tallymark import runtime
from tallymark.calls import Call, current_call
from tallymark.dimensions import is_text

MAX_IDENTITY_LENGTH: Final = 255
FEW: Final = 8
"""Identities set in worker threads that one call may keep without a look at which of them are still needed."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom usage is recorded for. Without an account it is kept by the collector, but billed to nobody."""

    account: str | None = None
    user: str | None = None
    plan: str | None = None


NOBODY: Final = Identity()


class Held:
    """An identity in force in some context; compared by identity.

    `block` is the `with identify()` block that it was set in, if any. The two references are set on published ones
    alone: `base` is what the request's own context held when the worker thread began, `entrance` what alone can make a
    block of this one, and end it.
    """

    __slots__ = ("__weakref__", "base", "block", "ended", "entrance", "identity", "is_block")

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.ended = False
        self.is_block = False
        self.block: Held | None = None
        self.base: weakref.ref[Held] | None = None
        self.entrance: weakref.ref[Identified] | None = None


current_held: ContextVar[Held] = ContextVar("tallymark_identity", default=Held(NOBODY))  # noqa: B039 - never changed
"""What is in force in a context; where no integration serves a request, it is all that there is to know."""


class _Keep(enum.Enum):
    KEEP = enum.auto()


_KEEP: Final = _Keep.KEEP


class Identified:
    """What `identify()` returns: as a context manager it restores the identity from before at its end."""

    __slots__ = ("__weakref__", "_before", "_held")

    def __init__(self, held: Held, before: Held) -> None:
        self._held = held
        self._before = before

    def __enter__(self) -> Identity:
        self._held.is_block = True
        return self._held.identity

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._held.ended = True
        current_held.set(self._before)
        call = current_call.get()
        if call is not None and call.identified is not None and not is_in_force(call.identified):
            call.identified = self._before


def current_identity() -> Identity:
    """The identity in force here and now."""
    held = current_held.get()
    call = current_call.get()
    if call is None or not call.published:
        return held.identity
    return _published_over(held, call)


def identify(
    account: str | None | _Keep = _KEEP, user: str | None | _Keep = _KEEP, plan: str | None | _Keep = _KEEP
) -> Identified:
    """Say whom the usage recorded from here on belongs to.

        identify(account="acme", user="u-17", plan="pro")       # until the context ends (in a request: its end)
        with identify(account="acme"):                           # until the block ends
            ...

    Fields that are not given stay as they are; the plan is dropped when the account changes, for it was the other
    account's. Each is a str of 1 to 255 characters, without NUL or lone surrogates. It is called inside requests, so
    it never raises: a bad value counts as None with a warning, and usage without an account is held back by the
    collector for correction. It is never left with the account from before.

    One request that acts for several accounts takes the `with` form in each of its tasks or threads.
    """
    before = current_identity()
    new_account = before.account if account is _KEEP else _checked("account", account)
    new_user = before.user if user is _KEEP else _checked("user", user)
    if plan is not _KEEP:
        new_plan = _checked("plan", plan)
    else:
        new_plan = before.plan if before.account in (None, new_account) else None
    outer = current_held.get()
    held = Held(Identity(new_account, new_user, new_plan))
    identified = Identified(held, outer)
    call = current_call.get()
    if call is not None:
        held.block = outer if outer.is_block else outer.block
        call.identified = held
        if _in_worker_thread():
            held.base = outer.base or weakref.ref(outer)
            held.entrance = weakref.ref(identified)
            _publish(held, call)
    current_held.set(held)
    return identified


def _published_over(held: Held, call: Call) -> Identity:
    for published in reversed(list(call.published)):
        base = published.base
        if base is not None and base() is held and is_in_force(published):
            return published.identity
    return held.identity


def _publish(held: Held, call: Call) -> None:
    """Forgets those that nothing will ever find again, too: a websocket may identify in thousands of worker threads.
    Whenever their number has doubled, so that however many are in force, one more costs no more for it."""
    call.published[held] = None
    if len(call.published) >= call.look_through_at:
        _forget(call)
        call.look_through_at = max(2 * len(call.published), FEW)


def _forget(call: Call) -> None:
    lasting: dict[Held, set[Held | None]] = {}
    """By base, the blocks within which a newer one is in force until their end: those that can be no block."""
    for one in reversed(list(call.published)):
        base = None if one.base is None else one.base()
        if base is None or not _can_be_found(one, lasting.setdefault(base, set())):
            call.published.pop(one, None)
        elif one.entrance is not None and one.entrance() is None:
            lasting[base].add(one.block)


def _can_be_found(held: Held, lasting: set[Held | None]) -> bool:
    """Whether it is in force, and some time will be the newest that is: none in `lasting` is for as long as it is."""
    around: Held | None = held
    while around is not None:
        if around.ended or around in lasting:
            return False
        around = around.block
    return None not in lasting


def is_in_force(held: Held) -> bool:
    """False once a `with identify()` block around it, or its own, has ended."""
    around: Held | None = held
    while around is not None:
        if around.ended:
            return False
        around = around.block
    return True


def _in_worker_thread() -> bool:
    # Starlette's run_in_threadpool, which FastAPI uses for synchronous dependencies and handlers, is AnyIO's.
    # Other threads (asyncio.to_thread, executors) keep to the context that they were given.
    return type(threading.current_thread()).__module__.startswith("anyio.")


def _after_fork_in_child() -> None:
    # A worker that is forked inside a request, as a pool's are at its first use, outlives it: whatever waits for the
    # request's end would wait for good, and the other accounts' work be billed to this one.
    if current_call.get() is not None:
        current_call.set(None)
        current_held.set(Held(NOBODY))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _checked(field: str, value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, str) and 0 < len(value) <= MAX_IDENTITY_LENGTH and is_text(value):
        return str.__str__(value)
    runtime.current().reporter.warning(
        f"identify.{field}",
        "identify(): %s must be a str of 1 to %d characters without NUL or lone surrogates, not %s; "
        "usage is recorded without it",
        field,
        MAX_IDENTITY_LENGTH,
        f"a str of {len(value)}" if isinstance(value, str) else f"a {type(value).__name__}",
    )
    return None
