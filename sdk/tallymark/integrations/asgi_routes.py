"""Which route an ASGI scope has been given to, by Starlette, FastAPI or Litestar, and its template."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, cast

from tallymark.integrations.asgi_types import Scope

_MOUNT_TAIL: Final = "/{path}"


def matched_route(scope: Scope) -> object | None:
    """The matched route, or what describes it best; None as long as none has matched.

    FastAPI keeps a route of an included router under the path of that router alone; the one with the prefixes is its
    "effective route". It stays in the scope below a mount, so it counts only for the endpoint that it names.
    """
    handler: object | None = scope.get("route_handler")  # Litestar's
    if handler is not None:
        return handler
    endpoint = scope.get("endpoint")
    if endpoint is None:
        return scope.get("route")
    fastapi = scope.get("fastapi")
    if fastapi:
        context = fastapi.get("effective_route_context")
        for candidate in (getattr(context, "starlette_route", None), context):
            if candidate is not None and getattr(candidate, "endpoint", None) is endpoint:
                return cast(object, candidate)
    route = scope.get("route")
    if route is not None and endpoint in (getattr(route, "endpoint", None), getattr(route, "app", None)):
        return cast(object, route)
    # FastAPI does not name a plain Starlette route or a mount in the scope; Starlette itself has done so since 1.0.
    named = [known for known in _every_route(scope.get("router")) if _leads_to(known, endpoint)]
    if len(named) > 1:  # one endpoint at several paths
        path = str(scope.get("path", "")).removeprefix(str(scope.get("root_path", "")))
        named = [known for known in named if known.path_regex.match(path)]
    return named[0] if named else cast("object | None", route)


def route_template(scope: Scope, route: object) -> str | None:
    """The template of the route that matched, with those of the mounts above it.

    `root_path` as the server gave it is left out: where a proxy puts the service does not divide its usage. None for a
    mounted application none of whose own routes has matched.
    """
    if "route_handler" in scope:
        return cast("str | None", scope.get("path_template") or None)
    template = getattr(route, "path_format", None) or getattr(route, "path", None)
    if not isinstance(template, str) or (not hasattr(route, "endpoint") and getattr(route, "routes", None)):
        return None
    if "app_root_path" not in scope:  # set by the first mount
        return template
    mounted_at = str(scope.get("root_path", ""))[len(str(scope["app_root_path"])) :]
    above = _mount_template(getattr(scope.get("router"), "routes", ()), mounted_at)
    if above is None:
        return template
    if not hasattr(route, "endpoint") and template.endswith(_MOUNT_TAIL):
        return above + _MOUNT_TAIL  # a mounted application without routes: the mount is the route
    return above + template


def _leads_to(route: Any, endpoint: object) -> bool:
    """Whether a matched `route` puts `endpoint` into the scope."""
    if hasattr(route, "endpoint"):
        return route.endpoint is endpoint
    return getattr(route, "app", None) is endpoint


def _every_route(router: object) -> Iterator[Any]:
    """The routes below a router, those that mounts and included routers lead to as well."""
    for route in getattr(router, "routes", None) or ():
        contexts = getattr(route, "effective_route_contexts", None)
        if contexts is None:
            yield route
            yield from _every_route(route)
        else:  # FastAPI's included router
            for context in contexts():
                if context.starlette_route is not None:
                    yield context.starlette_route
                    yield from _every_route(context.starlette_route)


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
