"""`opentelemetry-instrument` meters a service whose code does not name Tallymark.

    pip install tallymark opentelemetry-distro
    TALLYMARK_TRACK=requests TALLYMARK_IDENTIFY=shop.usage:whose opentelemetry-instrument uvicorn shop:app

It finds `TallymarkInstrumentor` by the entry point `opentelemetry_instrumentor`. Nothing else imports this module: it
needs the package opentelemetry-instrumentation, which is there when that command runs.

Frameworks are patched when the service imports them, and none is imported for it: a module that the service would load
after gevent's patches, or after DJANGO_SETTINGS_MODULE is set, still is.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Collection, Iterable
from types import ModuleType
from typing import Any, Final, cast

from opentelemetry.instrumentation.instrumentor import BaseInstrumentor  # type: ignore[attr-defined]
from wrapt import register_post_import_hook  # opentelemetry-instrumentation depends on it

from tallymark import runtime
from tallymark.errors import SettingsError
from tallymark.integrations import asgi, wsgi
from tallymark.integrations.asgi_lifespan import serve_lifespan
from tallymark.integrations.from_environment import RequestVariables
from tallymark.integrations.serving import Requests
from tallymark.reporting import logger

_GONE: Final = "the application was called after its end"


class TallymarkInstrumentor(BaseInstrumentor):  # type: ignore[misc]
    """Configures Tallymark from the environment, and puts its middleware outermost around each application of
    Starlette, FastAPI, Flask and Django, and its interceptor before the others of each gRPC server.

    Applications that have the middleware already are counted once. What is wrong with a setting is logged, with all
    that is wrong, and stops neither other instrumentations nor the service. With TALLYMARK_DISABLED nothing is patched.
    """

    _patches: Patches | None = None

    def instrumentation_dependencies(self) -> Collection[str]:
        """None: whichever of the frameworks is there."""
        return ()

    def _instrument(self, **kwargs: Any) -> None:
        # An exception here would end OpenTelemetry's loading of whatever comes after.
        try:
            _configure()
            if not runtime.current().enabled:
                return
            variables = RequestVariables()
            for problem in variables.problems():
                logger.error("%s", problem)
            variables.expect()
            self._patches = Patches(variables)
            for module, patch in _FRAMEWORKS.items():
                register_post_import_hook(functools.partial(self._patches.on_import, patch), module)
        except Exception:
            logger.exception("tallymark could not instrument this process")

    def _uninstrument(self, **kwargs: Any) -> None:
        """Takes the patches back. What has been counted still goes out: `tallymark.shutdown()` ends that."""
        if self._patches is not None:
            self._patches.undo()
            self._patches = None


def _configure() -> None:
    current = runtime.current()
    if current.settings is not None:  # by code that ran before, which counts over the environment
        return
    try:
        runtime.configure()
    except SettingsError as error:
        logger.error(
            "%s\nThe service goes on; its usage is kept in memory until tallymark.configure() succeeds, and is lost "
            "where that does not happen",
            error,
        )
        return
    current.gives_way = True


class Patches:
    """What one `instrument()` has put in the place of frameworks' own functions."""

    def __init__(self, variables: RequestVariables) -> None:
        self.variables = variables
        self.active = True
        self._undo: list[Callable[[], None]] = []

    def on_import(self, patch: Callable[[Patches, Any], None], module: ModuleType) -> None:
        """A framework has been imported. Import hooks cannot be taken back; those of what is undone do nothing."""
        if not self.active:
            return
        try:
            patch(self, module)
        except Exception:
            logger.exception("tallymark cannot meter %s: this version is not the one it knows", module.__name__)

    def replace(self, owner: Any, name: str, make: Callable[[Any], Callable[..., Any]]) -> None:
        """Puts what `make` makes of a function in its place."""
        original = getattr(owner, name)
        replacement = functools.wraps(original)(make(original))
        setattr(owner, name, replacement)

        def restore() -> None:
            if getattr(owner, name) is replacement:  # else somebody has wrapped it, and it does nothing from now on
                setattr(owner, name, original)

        self.at_undo(restore)

    def at_undo(self, function: Callable[[], None]) -> None:
        """Calls `function` when the patches are taken back."""
        self._undo.append(function)

    def undo(self) -> None:
        """Everything is as it was."""
        self.active = False
        while self._undo:
            self._undo.pop()()


class _Middlewares:
    """The middleware of each application: `make` is given what calls it, which keeps it no longer than it lives."""

    def __init__(self, make: Callable[[Any, Callable[..., Any]], Any], original: Callable[..., Any]) -> None:
        self._make = make
        self._original = original
        self._known: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def of(self, app: Any) -> Any:
        known = self._known.get(app)
        if known is None:
            found, original = weakref.ref(app), self._original

            def call(*args: Any) -> Any:
                living = found()
                assert living is not None, _GONE
                return original(living, *args)

            known = self._known.setdefault(app, self._make(app, call))
        return known


def _patch_starlette(patches: Patches, module: Any) -> None:
    """FastAPI's applications are Starlette's too, and call this."""
    variables = patches.variables

    def around(_: Any, call: Callable[..., Any]) -> asgi.UsageMiddleware:
        middleware = asgi.UsageMiddleware(call, variables.resolver, variables.trackers)
        middleware.supports_lifespan = True
        return middleware

    def make(original: Any) -> Callable[..., Any]:
        middlewares = _Middlewares(around, original)

        async def __call__(self: Any, scope: Any, receive: Any, send: Any) -> None:  # noqa: N807 - its name in messages
            if patches.active:
                await middlewares.of(self)(scope, receive, send)
            else:
                await original(self, scope, receive, send)

        return __call__

    patches.replace(module.Starlette, "__call__", make)


def _patch_flask(patches: Patches, module: Any) -> None:
    variables = patches.variables

    def around(app: Any, call: Callable[..., Any]) -> wsgi.UsageMiddleware:
        from tallymark.integrations.flask import tell_routes

        tell_routes(app)
        return wsgi.UsageMiddleware(call, variables.resolver, variables.trackers)

    def make(original: Any) -> Callable[..., Any]:
        middlewares = _Middlewares(around, original)

        def __call__(self: Any, environ: wsgi.Environ, start_response: wsgi.StartResponse) -> Iterable[bytes]:  # noqa: N807
            serve = middlewares.of(self) if patches.active else functools.partial(original, self)
            return cast(Iterable[bytes], serve(environ, start_response))

        return __call__

    patches.replace(module.Flask, "__call__", make)


def _patch_django(patches: Patches, module: Any) -> None:
    """Around the chain of middlewares once it is loaded, and not into MIDDLEWARE: the site's settings stay its own."""

    def make(original: Any) -> Callable[..., Any]:
        def load_middleware(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            if patches.active:
                _put_around_chain(patches, self)

        return load_middleware

    patches.replace(module.BaseHandler, "load_middleware", make)


def _patch_django_asgi(patches: Patches, module: Any) -> None:
    """Requests are the chain's affair; the end of the server is not told there."""

    def make(original: Any) -> Callable[..., Any]:
        async def __call__(self: Any, scope: Any, receive: Any, send: Any) -> None:  # noqa: N807
            call = functools.partial(original, self)
            if patches.active and scope["type"] == "lifespan":
                await serve_lifespan(call, scope, receive, send)
            else:
                await call(scope, receive, send)

        return __call__

    patches.replace(module.ASGIHandler, "__call__", make)


def _put_around_chain(patches: Patches, handler: Any) -> None:
    from tallymark.integrations.django import RequestMiddleware

    chain = handler._middleware_chain
    variables = patches.variables
    ours = RequestMiddleware(chain, Requests("UsageMiddleware", variables.resolver, variables.trackers))
    handler._middleware_chain = ours
    found = weakref.ref(handler)

    def restore() -> None:
        living = found()
        if living is not None and living._middleware_chain is ours:
            living._middleware_chain = chain

    patches.at_undo(restore)


def _patch_grpc(patches: Patches, module: Any) -> None:
    from tallymark.integrations.grpc import AsyncUsageInterceptor, UsageInterceptor

    variables = patches.variables

    def making(interceptor: Callable[..., Any]) -> Callable[[Any], Callable[..., Any]]:
        def make(original: Any) -> Callable[..., Any]:
            parameters = inspect.signature(original)

            def server(*args: Any, **kwargs: Any) -> Any:
                try:
                    given = parameters.bind(*args, **kwargs) if patches.active else None
                except TypeError:  # which gRPC itself tells better
                    given = None
                if given is not None:
                    ours = interceptor(variables.resolver, variables.trackers)
                    given.arguments["interceptors"] = (ours, *(given.arguments.get("interceptors") or ()))
                    args, kwargs = given.args, given.kwargs
                return original(*args, **kwargs)

            return server

        return make

    patches.replace(module, "server", making(UsageInterceptor))
    patches.replace(module.aio, "server", making(AsyncUsageInterceptor))


_FRAMEWORKS: Final[dict[str, Callable[[Patches, Any], None]]] = {
    "starlette.applications": _patch_starlette,
    "flask.app": _patch_flask,
    "django.core.handlers.base": _patch_django,
    "django.core.handlers.asgi": _patch_django_asgi,
    "grpc": _patch_grpc,
}
