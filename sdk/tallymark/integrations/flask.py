"""Flask: every request of an application, also one that no view has answered.

    from tallymark.integrations.flask import init_app
    init_app(app, identify=lambda environ: {"account": account_of(environ)}, track=[track_usage("requests")])

`http.route` is the rule that matched, with the prefixes of its blueprints; a 405 has none, for Flask does not tell.
Views and `before_request` functions may call `tallymark.identify()`.
"""

from __future__ import annotations

import flask

from tallymark.integrations.serving import Resolver, Track
from tallymark.integrations.wsgi import CALL, Environ, UsageMiddleware, WsgiCall


def init_app(app: flask.Flask, identify: Resolver[Environ] | None = None, track: Track = ()) -> None:
    """Puts `wsgi.UsageMiddleware` around the application; its parameters are described there."""
    app.wsgi_app = UsageMiddleware(app.wsgi_app, identify, track)  # type: ignore[method-assign]
    tell_routes(app)


def tell_routes(app: flask.Flask) -> None:
    """First of all, so that the route is known whatever happens next: a debugger's exception forgets the request."""
    functions = app.before_request_funcs.setdefault(None, [])
    if _tell_route not in functions:
        functions.insert(0, _tell_route)


def _tell_route() -> None:
    call, rule = flask.request.environ.get(CALL), flask.request.url_rule
    if isinstance(call, WsgiCall) and rule is not None:
        template = rule.rule
        call.routed = lambda: template
