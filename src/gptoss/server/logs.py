"""One JSON object a line, on stderr: who asked for what and how it went, never what was said."""

import json
import logging
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

LOG = logging.getLogger("gptoss.server")
FRAMES = 12


class Lines(logging.Formatter):
    """The record's ``event`` fields; of foreign records their message."""

    def format(self, record: logging.LogRecord) -> str:
        """As one line."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields = getattr(record, "fields", None)
        if fields is None:
            fields = {"event": "message", "logger": record.name, "text": record.getMessage()}
            if record.exc_info and record.exc_info[1]:
                fields |= described(record.exc_info[1])
        line = {"time": at, "level": record.levelname.lower(), **fields}
        return json.dumps(line, default=str)


def set_up(level: int = logging.INFO) -> None:
    """Send all that is logged in this process to stderr. Called by whoever owns the process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    LOG.setLevel(level)


def note(event: str, fields: Mapping[str, Any], *, level: int = logging.INFO) -> None:
    """Log an event."""
    if LOG.isEnabledFor(level):
        LOG.log(level, event, extra={"fields": {"event": event, **fields}})


def failure(error: BaseException, request: str | None) -> None:
    """Log what went wrong inside."""
    note("failure", {"id": request, **described(error)}, level=logging.ERROR)


def described(error: BaseException) -> dict[str, Any]:
    """Kind and place. Its words may quote what a user wrote, so they stay out."""
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
    return {
        "error": type(error).__name__,
        "trace": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }
