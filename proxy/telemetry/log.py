"""The log: lines on stderr, written by a thread of their own so that a slow reader never stalls the gate.

What clients can provoke goes through `throttled`: some lines a second per kind, the rest counted, not written.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import queue
import sys
import time
from datetime import UTC, datetime
from typing import TextIO

logger = logging.getLogger("tensorgate")

_QUEUE_LINES = 10_000
_LINES_PER_SECOND = 50


def printable(text: str) -> str:
    """Foreign text on one line: control characters escaped, so that no client can forge a log line."""
    return text.encode("unicode_escape", "replace").decode("ascii") if not text.isprintable() else text


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = f"{_timestamp(record)} {record.levelname.lower():7} {printable(record.getMessage())}"
        if not record.exc_info:
            return line
        # What a model says of a client's text may have lines of its own.
        trace = "\n".join("    " + printable(one) for one in self.formatException(record.exc_info).splitlines())
        return f"{line}\n{trace}"


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {"time": _timestamp(record), "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def _timestamp(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _DroppingHandler(logging.handlers.QueueHandler):
    """Drops lines when the queue is full: a full disk or a stuck reader must not take the gate's memory."""

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            pass

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record


def start(level: str, form: str, to: TextIO | None = None) -> logging.handlers.QueueListener:
    """Send the project's log to stderr, or `to`; stop the listener at the end, which writes what is left."""
    logging.raiseExceptions = False  # stderr may be a closed pipe or a full disk
    stream = logging.StreamHandler(to or sys.stderr)
    stream.setFormatter(_JsonFormatter() if form == "json" else _TextFormatter())
    lines: queue.Queue[logging.LogRecord] = queue.Queue(_QUEUE_LINES)
    root = logging.getLogger()
    root.handlers[:] = [_DroppingHandler(lines)]
    root.setLevel(logging.WARNING)
    logger.setLevel(level.upper())
    listener = logging.handlers.QueueListener(lines, stream)
    listener.start()
    return listener


class _Throttle:
    def __init__(self) -> None:
        self._second = 0
        self._written: dict[str, int] = {}

    def allow(self, kind: str) -> bool:
        second = int(time.monotonic())
        if second != self._second:
            dropped = {kind: count - _LINES_PER_SECOND for kind, count in self._written.items()}
            for name, count in dropped.items():
                if count > 0:
                    logger.warning("%d more lines about %s were not written", count, name)
            self._second = second
            self._written.clear()
        count = self._written.get(kind, 0) + 1
        self._written[kind] = count
        return count <= _LINES_PER_SECOND


_throttle = _Throttle()


def throttled(
    level: int, kind: str, message: str, *args: object, error: BaseException | None = None
) -> None:
    """Log something that a client can provoke; `kind` is from a fixed set."""
    if logger.isEnabledFor(level) and _throttle.allow(kind):
        logger.log(level, message, *args, exc_info=error)
