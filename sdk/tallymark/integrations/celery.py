"""Celery: every run of a task, in whatever pool, for the account that the caller or the task's arguments name.

    app = Celery("shop")
    meter_tasks(app, track=[track_usage("jobs")], carry_identity=True)

Call it where the application is made, in the module that callers and workers import.

One run is one call: a retry and a redelivery (`acks_late`) are runs of their own, and `tallymark.task.state` tells how
each one ended, in Celery's words: SUCCESS, FAILURE, RETRY, IGNORED, REJECTED. To bill those that succeeded alone:

    track_usage("jobs", billable=lambda call: call.error is None)

A run that is killed (hard time limit, SIGKILL, a lost worker) has no end and is not counted itself; what it had
recorded until then is, but for calls inside it that raised: these are recorded at its end, which tells what came of
them. Tasks that a worker revokes or does not know have no run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast

from celery import Celery, signals

from tallymark import conventions, runtime
from tallymark.calls import NO_ARGUMENTS, Call, Description, current_call, error_name
from tallymark.dimensions import Value
from tallymark.errors import checked_function
from tallymark.identity import Identity, current_identity
from tallymark.integrations.serving import ASYNC_WAY, Found, Requests, Resolver, Served, Track

HEADER: Final = "tallymark"
"""The message header that carries who a task is for."""

_ENDS: Final = {"Retry": "RETRY", "Ignore": "IGNORED", "Reject": "REJECTED"}


def meter_tasks(
    app: Celery,
    identify: Resolver[Any] | None = None,
    track: Track = (),
    carry_identity: bool = False,
) -> None:
    """Meters the tasks of `app`. Again for the same application: nothing happens.

    `identify`, if given, is called with the task (`task.name`, `task.request.args`, `.kwargs`) when a run begins, and
    returns whom it is for: an `Identity`, a mapping with any of account, user and plan, or None when that is not known
    yet. When it raises, the run goes on and its usage is recorded without an account.

    `carry_identity`: a message takes along who was identified where it was sent (in the header `tallymark`), for its
    run, its retries and what that sends in turn. Whoever may write to the broker may then say who pays; `identify` has
    the last word. It holds for all messages that this process sends.

    `track`: what `track_usage()` made, to count every run by.

    A process of a prefork pool that ends in order delivers what it has left; what it cannot deliver waits on the disk.
    """
    metered = _MeteredTasks(app, identify, track, carry_identity)
    # Strong references: nobody else keeps the methods. Celery 5.4 tells methods of two objects apart by this
    # uid alone.
    signals.task_prerun.connect(metered.begin, weak=False, dispatch_uid=f"tallymark.{id(app)}")
    signals.task_postrun.connect(metered.end, weak=False, dispatch_uid=f"tallymark.{id(app)}")
    signals.worker_process_shutdown.connect(_deliver, weak=False)
    if carry_identity:
        signals.before_task_publish.connect(_carry, weak=False)


class TaskCall(Call):
    """One run of a task."""

    __slots__ = ("name", "state")

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.state: str | None = None
        """How the run has ended."""

    def _state_after(self, error: BaseException | None) -> str:
        if self.state is not None:
            return self.state
        if error is None:
            return "SUCCESS"
        return next((_ENDS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _ENDS), "FAILURE")

    def decides_later(self, error: BaseException) -> bool:
        """`autoretry_for` makes a retry of any exception."""
        return isinstance(error, Exception) and self.state is None

    def describe(
        self, result: object, error: BaseException | None, arguments: Mapping[str, object] = NO_ARGUMENTS
    ) -> Description:
        """(task's name, state, error type): the last on failures only."""
        state = self._state_after(error)
        return self.name, state, error_name(error) if state == "FAILURE" else None

    def describe_running(self) -> Description:
        return self.name, None, None

    @staticmethod
    def attributes_of(description: Description) -> Mapping[str, Value | None]:
        name, state, failure = cast("tuple[str | None, ...]", description)
        return {conventions.TASK_NAME: name, conventions.TASK_STATE: state, conventions.ERROR_TYPE: failure}


class _MeteredTasks:
    def __init__(self, app: Celery, identify: Resolver[Any] | None, track: Track, carry_identity: bool) -> None:
        self._app = app
        self._identify = None if identify is None else checked_function("meter_tasks: identify", identify, ASYNC_WAY)
        self._carries = carry_identity
        self._requests: Requests[tuple[Any, Found]] = Requests("meter_tasks", self._who, track)

    def begin(self, task: Any = None, **_: Any) -> None:
        if task is None or task.app is not self._app:
            return
        carried: Found = None
        if self._carries:
            if getattr(task.request, "is_eager", False):
                carried = current_identity()
            elif isinstance(header := getattr(task.request, HEADER, None), Mapping):
                carried = header
        call = TaskCall(task.name)
        self._requests.begin(call, (task, carried))

    def end(self, task: Any = None, state: str | None = None, retval: object = None, **_: Any) -> None:
        call = current_call.get()
        if task is None or task.app is not self._app or not isinstance(call, TaskCall) or call.name != task.name:
            return
        served = call.served
        error = retval if isinstance(retval, BaseException) and state != "SUCCESS" else None
        call.state = state or "FAILURE"  # none where the worker itself was told to end
        if isinstance(served, Served):
            served.end(error)

    def _who(self, about: tuple[Any, Found]) -> Found:
        task, carried = about
        found = None if self._identify is None else self._identify(task)
        return carried if found is None else found


def _carry(headers: Any = None, **_: Any) -> None:
    """Puts whom this is sent for into a message's headers."""
    identity = current_identity()
    if isinstance(headers, dict) and identity != Identity():
        headers[HEADER] = {"account": identity.account, "user": identity.user, "plan": identity.plan}


def _deliver(**_: Any) -> None:
    """A pool's process leaves by os._exit, which runs no exit handlers."""
    runtime.current().shutdown(None)
