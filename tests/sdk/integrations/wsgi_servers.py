"""Real WSGI servers in this process; when the block has ended, every request has."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server
from wsgiref.validate import validator

import waitress.server
import werkzeug.serving


class Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


class SilentWerkzeug(werkzeug.serving.WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002
        pass


@contextmanager
def wsgi_serving(app: Any, kind: str) -> Iterator[int]:
    """The port of `app` under "werkzeug" (a thread a request), "waitress" (a pool) or "wsgiref", with its validator."""
    if kind == "waitress":
        sockets: dict[int, Any] = {}
        server: Any = waitress.server.create_server(app, host="127.0.0.1", port=0, map=sockets, threads=4)
        port, stop = server.effective_port, server.close
        run = server.run
    else:
        if kind == "werkzeug":
            server = werkzeug.serving.make_server("127.0.0.1", 0, app, threaded=True, request_handler=SilentWerkzeug)
            server.daemon_threads, server.block_on_close = False, True
        else:
            server = make_server("127.0.0.1", 0, validator(app), handler_class=Silent)
        port, stop = server.server_port, server.shutdown
        run = server.serve_forever
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield port
    finally:
        if kind == "waitress":
            server.task_dispatcher.shutdown(True, 10)
            server.trigger.pull_trigger(lambda: _close_all(sockets))
        else:
            stop()
        thread.join()
        if kind != "waitress":
            server.server_close()


def _close_all(sockets: dict[int, Any]) -> None:
    for channel in list(sockets.values()):
        channel.close()
