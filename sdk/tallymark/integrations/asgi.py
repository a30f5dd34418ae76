"""ASGI: method, route and identity of the requests of Starlette, FastAPI and other ASGI applications.

app.add_middleware(UsageMiddleware, identify=lambda scope: {"account": account_of(scope)})
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any, Final, cast

from tallymark import runtime
from tallymark.baggage import adopt
from tallymark.calls import METHODS, OTHER_METHOD, Call
from tallymark.identity import Identity, identify, serving

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Resolver = Callable[[Scope], "Identity | Mapping[str, str | None] | None"]

_FIELDS: Final = ("account", "user", "plan")
_MOUNT_TAIL: Final = "/{path}"


class UsageMiddleware:
    """Pure ASGI middleware. Add it outermost, once, so that it stands around authentication and routing.

    `identify`, if given, is called with the scope of each HTTP request and returns whom it is for: an `Identity`, a
    mapping with any of account, user and plan, or None when that is not known yet. It must not block. When it raises,
    the request goes on and its usage is recorded without an account. Handlers and dependencies, synchronous ones
    too, may call `tallymark.identify()` later.
    """

    def __init__(self, app: App, identify: Resolver | None = None) -> None:
        self.app = app
        self._resolver = identify

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        with serving(AsgiCall(scope)):
            if self._resolver is None or _identify_by(self._resolver, scope):
                adopt(lambda name: _header(scope, name))
            # The scope itself, not a copy: routers write the matched route into it.
            await self.app(scope, receive, send)


class AsgiCall(Call):
    """A request as its scope describes it."""

    __slots__ = ("_scope",)

    def __init__(self, scope: Scope) -> None:
        super().__init__()
        self._scope = scope

    def method(self) -> str | None:
        method = self._scope.get("method")
        return method if method in METHODS else OTHER_METHOD

    def route(self) -> str | None:
        return route_template(self._scope)

    def status(self) -> int:
        status = getattr(_matched(self._scope), "status_code", None)
        return status if isinstance(status, int) else 200


def route_template(scope: Scope) -> str | None:
    """The template of the route that matched, with those of the mounts above it; None when no route has matched.

    `root_path` as the server gave it is left out: where a proxy puts the service does not divide its usage.
    """
    route = _matched(scope)
    template = getattr(route, "path_format", None) or getattr(route, "path", None)
    if not isinstance(template, str):
        return None
    if "app_root_path" not in scope:  # set by the first mount
        return template
    mounted_at = str(scope.get("root_path", ""))[len(str(scope["app_root_path"])) :]
    above = _mount_template(getattr(scope.get("router"), "routes", ()), mounted_at)
    if above is None:
        return template
    if not hasattr(route, "endpoint") and template == above + _MOUNT_TAIL:
        return template  # a mounted application without routes of its own
    return above + template


def _matched(scope: Scope) -> object | None:
    """The matched route, or what describes it best.

    FastAPI keeps a route of an included router under the path of that router alone; the one with the prefixes is its
    "effective route". It stays in the scope below a mount, so it counts only for the endpoint that it names.
    """
    fastapi = scope.get("fastapi")
    if fastapi:
        endpoint = scope.get("endpoint")
        context = fastapi.get("effective_route_context")
        for candidate in (getattr(context, "starlette_route", None), context):
            if candidate is not None and endpoint is not None and getattr(candidate, "endpoint", None) is endpoint:
                return cast(object, candidate)
    route: object | None = scope.get("route")
    if route is None and (endpoint := scope.get("endpoint")) is not None:
        # FastAPI does not name a plain Starlette route in the scope.
        for known in getattr(scope.get("router"), "routes", ()):
            if getattr(known, "endpoint", None) is endpoint:
                return cast(object, known)
    return route


def _mount_template(routes: Iterable[Any], mounted_at: str) -> str | None:
    """The templates of the mounts that lead to the concrete path `mounted_at`, joined; None when none do."""
    if not mounted_at:
        return ""
    for route in routes:
        contexts = getattr(route, "effective_route_contexts", None)
        if contexts is not None:  # FastAPI's included router
            inner = [c.starlette_route for c in contexts() if c.starlette_route is not None]
            template = _mount_template(inner, mounted_at)
        elif getattr(route, "routes", None) is None:
            continue
        elif getattr(route, "path_regex", None) is None:  # Starlette's Host
            template = _mount_template(route.routes, mounted_at)
        else:
            match = route.path_regex.match(mounted_at + "/")
            if match is None:
                continue
            rest = "/" + match["path"].rstrip("/")
            template = _mount_template(route.routes, "" if rest == "/" else rest)
            if template is not None:
                template = route.path_format.removesuffix(_MOUNT_TAIL) + template
        if template is not None:
            return template
    return None


def _header(scope: Scope, name: str) -> str | None:
    wanted = name.encode()
    return b",".join(value for key, value in scope["headers"] if key == wanted).decode("latin-1") or None


def _identify_by(resolver: Resolver, scope: Scope) -> bool:
    """False where the resolver raised: the request is nobody's then."""
    try:
        found = resolver(scope)
        if isinstance(found, Identity):
            identify(found.account, found.user, found.plan)
        elif found is not None:
            identify(**{field: found[field] for field in _FIELDS if field in found})
    except Exception as error:
        identify(None, None, None)
        runtime.current().reporter.error(
            "resolver",
            "UsageMiddleware's identify function raised; the request is recorded without an account: %s",
            type(error).__name__,
            exc_info=error,
        )
        return False
    return True
