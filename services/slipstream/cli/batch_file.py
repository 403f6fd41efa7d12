"""Files of OpenAI's Batch API: one request, or one answer, on each line."""

import fcntl
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from slipstream.client.api import Reply, is_passing
from slipstream.config import SetupError

NO_ANSWER = "no_answer"
ID = "batch_req_"
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
_BEGINS = f'{{"id":"{ID}'.encode()
"""Each line that we write, so that no other one is taken for ours."""


class Asked(msgspec.Struct, frozen=True):
    """A line of the input."""

    custom_id: str
    url: str
    body: dict[str, Any]
    method: str = "POST"


class _Failure(msgspec.Struct, frozen=True):
    code: str = ""


class _Said(msgspec.Struct, frozen=True):
    status_code: int


class _Known(msgspec.Struct, frozen=True):
    """A line of the output. A line of the input lacks `id` and `response`."""

    id: str
    custom_id: str
    response: _Said | None
    error: _Failure | None = None

    @property
    def is_final(self) -> bool:
        """Not so what nobody answered, or what was refused for the moment alone."""
        if self.response is not None:
            return not is_passing(self.response.status_code)
        return self.error is not None and self.error.code != NO_ANSWER


class BatchFileError(SetupError):
    """One line: which file, which line of it, what is wrong."""


def read_requests(path: str) -> list[Asked]:
    """BatchFileError: the file, or a line of it, cannot be used; nothing was asked then."""
    requests: list[Asked] = []
    lines: dict[str, int] = {}
    decoder = msgspec.json.Decoder(Asked)
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    asked = decoder.decode(line)
                except msgspec.DecodeError as error:
                    raise BatchFileError(f"{path}:{number}: {error}") from None
                if wrong := _unusable(asked, lines):
                    raise BatchFileError(f"{path}:{number}: {wrong}")
                lines[asked.custom_id] = number
                requests.append(asked)
    except OSError as error:
        raise BatchFileError(f"{path}: {error.strerror}") from None
    if not requests:
        raise BatchFileError(f"{path}: there is no request in it")
    return requests


def _unusable(asked: Asked, lines: Mapping[str, int]) -> str:
    """Why this line cannot be served, whatever the server; empty if it can."""
    if not asked.custom_id:
        return "custom_id is empty; name each request"
    if asked.custom_id in lines:
        return f"custom_id {asked.custom_id!r} stands on line {lines[asked.custom_id]} too"
    if asked.method != "POST" or asked.url not in PATHS:
        return f"{asked.method} {asked.url}: expected POST and one of {', '.join(PATHS)}"
    if asked.body.get("stream"):
        return "stream is true; a batch has whole answers, leave it out"
    return ""


def refuse_one_file(asked: str, answers: str) -> None:
    """BatchFileError: the requests would be written over, by whichever name."""
    if os.path.exists(answers) and os.path.samefile(asked, answers):
        raise BatchFileError(f"{answers}: the requests are in it; name another file for answers")


class Answers:
    """The output, open for more. Each answer is in the file before the next is counted."""

    def __init__(self, path: str) -> None:
        """Finds what is there. A last line of ours that a break has torn goes; anything else that
        is no answer, or that another batch writes to, is not ours to change: BatchFileError."""
        self.done: set[str] = set()
        self._path, self._unanswered = Path(path), set[str]()
        """Asked again, for they have no lasting answer; their new line takes the place."""
        try:
            self._file = self._path.open("a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.truncate(self._find())
        except BlockingIOError:
            raise BatchFileError(
                f"{path}: another batch writes to it; wait for its end, or name another file"
            ) from None
        except OSError as error:
            raise BatchFileError(f"{path}: {error.strerror}") from None

    def _find(self) -> int:
        """What the whole lines say; where they end."""
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, 1):
            try:
                if not line.endswith(b"\n"):
                    if line.startswith(_BEGINS) or _BEGINS.startswith(line):
                        break
                    raise msgspec.DecodeError("it does not begin as one")
                known = msgspec.json.decode(line, type=_Known)
            except msgspec.DecodeError as error:
                raise BatchFileError(
                    f"{self._path}:{number}: not an answer of a batch ({error}); name another file"
                ) from None
            end += len(line)
            (self.done if known.is_final else self._unanswered).add(known.custom_id)
        return end

    def add(self, asked: Asked, reply: Reply) -> None:
        self._write(asked, msgspec.Raw(_answer(reply)), None)

    def fail(self, asked: Asked, message: str) -> None:
        """There is no answer."""
        self._write(asked, None, {"code": NO_ANSWER, "message": message})

    def _write(self, asked: Asked, response: Any, error: Any) -> None:
        line = {
            "id": f"{ID}{uuid.uuid4().hex}",
            "custom_id": asked.custom_id,
            "response": response,
            "error": error,
        }
        self._file.write(msgspec.json.encode(line) + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._unanswered:
            self._keep_the_last()
        self._file.close()

    def _keep_the_last(self) -> None:
        """Of each request one line."""
        self._file.seek(0)
        lines = {msgspec.json.decode(line, type=_Known).custom_id: line for line in self._file}
        path = self._path.resolve()  # a link stays one
        made = path.with_name(f".{path.name}.{os.getpid()}")
        made.write_bytes(b"".join(lines.values()))
        shutil.copymode(path, made)
        made.replace(path)


def _answer(reply: Reply) -> bytes:
    try:
        body: Any = msgspec.json.decode(reply.body)
    except msgspec.DecodeError:  # a proxy's page
        body = reply.body.decode(errors="replace")
    return msgspec.json.encode(
        {"status_code": reply.status, "request_id": reply.request_id, "body": body}
    )
