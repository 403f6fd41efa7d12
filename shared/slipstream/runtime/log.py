"""Log lines on stderr. Nobody logs prompts, answers or token ids."""

import logging
import sys
import time

import msgspec


def set_up(level: str, node_id: str, as_json: bool) -> None:
    """Replaces what the root logger had. `level`: debug, info, warning or error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter(node_id) if as_json else _TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class _TextFormatter(logging.Formatter):
    """`12:00:01.250 info peer scheduler down`: one line, then the traceback if any. Whoever shows
    the lines of several processes together says whose they are."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        message = record.getMessage().replace("\r", "\\r").replace("\n", "\\n")
        level = record.levelname.lower()
        line = f"{clock}.{int(record.msecs):03d} {level} {message}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _JsonFormatter(logging.Formatter):
    """One JSON object a line; `time_unix_s` is the wall clock."""

    def __init__(self, node_id: str) -> None:
        super().__init__()
        self._node_id = node_id

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time_unix_s": round(record.created, 3),
            "level": record.levelname.lower(),
            "node_id": self._node_id,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()
