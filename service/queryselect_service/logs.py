"""What the log says, and in which form: an object of JSON a line for machines, or a line of text for people.

Requirements that the design meets:

- Nothing in a line is a caller's own text but request ids, which are checked: no values, no names, no messages about
  them. What a caller did wrong the caller is told; here stand the code and the reason.
- Libraries are heard only when they warn, whatever the level: they would write out addresses, headers and credentials.
- A line is a line: whatever is in it, no line break and no control character leaves it as such.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from datetime import UTC, datetime
from typing import Any

FORMATS = ("auto", "json", "text")
#: The packages whose lines are ours.
OURS = ("queryselect", "queryselect_service")
#: The longest text of an error, in characters.
MOST = 20_000
#: What stands in a line of text as it is.
_PLAIN = re.compile(r"[\w.:/+\-\[\]]+", re.ASCII)


def fields(**values: Any) -> dict[str, Any]:
    """What `extra` of a log call takes: values that become fields of the line; those that are None are left out."""
    return {"fields": {name: value for name, value in values.items() if value is not None}}


class JsonFormatter(logging.Formatter):
    """One object a line, ASCII alone."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        entry: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            entry["error"] = {"type": type(error).__qualname__, "stack": _stack(error)}
        return json.dumps(entry, default=str)


class TextFormatter(logging.Formatter):
    """One line, `name=value` after the message; of an error the stack below, indented."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        said: dict[str, Any] = {}
        for name, value in getattr(record, "fields", {}).items():
            said |= {f"{name}.{each}": of for each, of in value.items()} if isinstance(value, dict) else {name: value}
        parts = [_time(record), record.levelname, record.name, _escaped(record.getMessage())]
        parts += [f"{name}={_value(value)}" for name, value in said.items()]
        if record.exc_info and record.exc_info[1] is not None:
            parts.append("\n" + "\n".join(f"    {_escaped(line)}" for line in _stack(record.exc_info[1]).splitlines()))
        return " ".join(parts)


def begin(level: str, form: str) -> None:
    """Logs to stderr from now on. Raises ValueError for a level or a form that there is not."""
    level = level.upper()
    if level not in logging.getLevelNamesMapping():
        raise ValueError(f"log_level must be one of {', '.join(logging.getLevelNamesMapping())}; it is {level!r}")
    if form not in FORMATS:
        raise ValueError(f"log_format must be one of {', '.join(FORMATS)}; it is {form!r}")
    text = form == "text" or (form == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler()
    handler.setFormatter(TextFormatter() if text else JsonFormatter())
    severity = logging.getLevelNamesMapping()[level]
    logging.basicConfig(level=max(severity, logging.WARNING), handlers=[handler])
    logging.getLogger("urllib3").setLevel(max(severity, logging.ERROR))  # it warns of what a server has sent
    for name in OURS:
        logging.getLogger(name).setLevel(severity)
    logging.captureWarnings(capture=True)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _stack(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-MOST:]


def _escaped(text: str) -> str:
    """The text with what is not printable written out."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _value(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
