"""OpenTelemetry's own clients, each a program in its own language beside this file.

A program reads an order from stdin, as JSON: which protocol, temporality and endpoint, as which process, and what to
record, round by round; each round is exported before the next begins. It prints what it has recorded, by its own count:
`{"versions": {…}, "tally": [[meter, account, route, thousandths], …]}`. Quantities are thousandths so that no program
has to add up decimals.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from tests.interop.build import BUILT, folder_of
from tests.interop.ledger import Quantities

HERE = Path(__file__).parent
PATIENCE_S = 150
PROTOCOLS = {
    "python": ("grpc", "http/protobuf"),
    "javascript": ("grpc", "http/json", "http/protobuf"),
    "go": ("grpc", "http/protobuf"),
    "java": ("grpc", "http/protobuf"),
}
"""What each client speaks."""
SWITCH = "TALLYMARK_TEST_INTEROP"
"""The variable that has what was built used; `make interop` sets it."""

Call = dict[str, Any]
"""account, route, calls, volume_thousandths."""


class NotBuiltError(Exception):
    """The client is not there, for the reason given."""


@dataclass(frozen=True)
class Order:
    """What a client is told."""

    protocol: str
    temporality: str
    port: int
    rounds: Sequence[Sequence[Call]]
    instance: str | None = "one"
    compression: str = "none"
    spans: bool = False
    backoff_ms: int = 200
    """Go alone: by default it waits for 5 seconds."""
    pause_ms: int = 0
    """After each round."""
    cardinality: int = 2000
    """Attribute sets of one counter; the default of all of them."""
    frozen_ms: int | None = None
    """JavaScript alone: its clock stands still at this time, in milliseconds, until the first export is over."""

    def text(self) -> str:
        """As the programs read it."""
        return json.dumps(
            {
                "protocol": self.protocol,
                "temporality": self.temporality,
                "endpoint": f"http://127.0.0.1:{self.port}",
                "service": "shop",
                "instance": self.instance,
                "compression": self.compression,
                "timeout_ms": 20_000,
                "backoff_ms": self.backoff_ms,
                "spans": self.spans,
                "pause_ms": self.pause_ms,
                "cardinality": self.cardinality,
                "frozen_ms": self.frozen_ms,
                "rounds": self.rounds,
            }
        )


@dataclass
class Running:
    """A client at work."""

    name: str
    process: subprocess.Popen[str]
    versions: dict[str, str] = field(default_factory=dict)

    def recorded(self) -> Quantities:
        """Waits for its end: what it says that it recorded."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        assert self.process.returncode == 0, f"{self.name} ended with {self.process.returncode}:\n{err[-3000:]}"
        said = json.loads(out.splitlines()[-1])
        self.versions = said["versions"]
        found: Quantities = defaultdict(Decimal)
        for meter, account, route, thousandths in said["tally"]:
            found[meter, account, route] += Decimal(thousandths) / 1000
        print(f"{self.name} said on stderr:\n{err[-2000:]}")
        return dict(found)


def command(name: str) -> list[str]:
    """How the client is started. Raises NotBuiltError."""
    if name == "python":
        return [sys.executable, str(HERE / "python" / "client.py")]
    if not os.environ.get(SWITCH):
        raise NotBuiltError("make interop builds and runs it")
    built = folder_of(name) / BUILT
    if not built.exists():
        raise NotBuiltError("it is not built: make interop")
    said = json.loads(built.read_text())
    if "missing" in said:
        raise NotBuiltError(said["missing"])
    found: list[str] = said["command"]
    return found


def start(name: str, order: Order) -> Running:
    """A client's process, at work from now on. Raises NotBuiltError."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "TALLYMARK_"))}
    arguments = command(name)
    with tempfile.TemporaryFile("w+") as stdin:
        stdin.write(order.text())
        stdin.seek(0)
        process = subprocess.Popen(
            arguments, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
    return Running(name, process)
