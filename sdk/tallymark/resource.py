"""Who sends: the process as an OpenTelemetry resource."""

import os
import uuid
from collections.abc import Mapping

from opentelemetry.sdk.resources import PROCESS_PID, OTELResourceDetector, Resource

from tallymark import conventions


def make_resource(given: Mapping[str, str]) -> Resource:
    """`Resource.create()` with `service.instance.id`: the user's own, from `given` or OTEL_RESOURCE_ATTRIBUTES, else
    a new UUID.

    To be called while the program runs: OpenTelemetry's detectors need an executor, which the end of the interpreter
    no longer gives.
    """
    of_user = {**OTELResourceDetector().detect().attributes, **given}
    instance = str(of_user.get(conventions.SERVICE_INSTANCE) or _new_id())
    return Resource.create({**given, conventions.SERVICE_INSTANCE: instance})


def of_forked_child(parent: Resource) -> Resource:
    """The same resource for a child: two processes under one id would be one producer with overlapping intervals.

    The child's id is the parent's and a UUID, so that an id given by the user can still be recognised.
    """
    own = {conventions.SERVICE_INSTANCE: f"{parent.attributes[conventions.SERVICE_INSTANCE]!s}/{_new_id()}"}
    if PROCESS_PID in parent.attributes:
        return parent.merge(Resource({**own, PROCESS_PID: os.getpid()}))
    return parent.merge(Resource(own))


def _new_id() -> str:
    return str(uuid.uuid4())
