"""Ids of calls, and of the events of a stream: what a client needs to go on at another frontend.

    chatcmpl-<8 hex digits of time><24 drawn>:<tokens>.<events>,<tokens>.<events>,…

Whatever is drawn for a call follows from its id, so that the same body under the same id is the
same call at every frontend. An event's id says of each choice how many tokens of it the client has
by then, and how many events since the count was reached.
"""

import hashlib
import re
import secrets
import time
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from aiohttp import web

from slipstream.frontend.validate import refuse, shown

HEADER = "Last-Event-ID"
NAMED_CHOICES_MAX = 16
"""An id grows with them: a stream of more choices has none, and cannot go on elsewhere."""

_CHARS_MAX = 512
ID_PATTERN = r"^([A-Za-z0-9._-]+[0-9a-f]{32}):([0-9]{1,9}\.[0-9]{1,9}(?:,[0-9]{1,9}\.[0-9]{1,9})*)$"
_EVENT_ID = re.compile(ID_PATTERN)


def new_id() -> str:
    """32 hex digits."""
    return f"{int(time.time()):08x}{secrets.token_hex(12)}"


def created_unix_s(call_id: str) -> int:
    return int(call_id[-32:-24], 16)


def drawn_seed(call_id: str, prompt: int) -> int:
    """63 bits; another one for each prompt, or equal prompts would get equal answers."""
    drawn = hashlib.blake2b(f"{call_id}/{prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(drawn) >> 1


class Form(Enum):
    """Where ids stand in a stream: not every reader of events keeps to the standard."""

    NONE = "none"
    """OpenAI's Python client takes the comment behind an id for an event without data."""
    INSIDE = "inside"
    AHEAD = "ahead"
    """In a block of their own that begins as a comment does: who cuts a stream at empty lines and
    takes `data: ` off the pieces, as `vllm bench serve` does, passes over it. Not behind, for it
    takes the end off what it reads too."""


def form_of(request: web.Request) -> Form:
    """By what the client says that it takes."""
    accept = request.headers.get("Accept", "*/*")
    if HEADER in request.headers or "text/event-stream" in accept:
        return Form.INSIDE
    return Form.AHEAD if "*/*" in accept else Form.NONE


class Place(NamedTuple):
    """Where in a call's stream a client is: of each choice (tokens, events at that count)."""

    call_id: str
    seen: tuple[tuple[int, int], ...]


def last_event(request: web.Request) -> Place | None:
    """Where the client's stream broke off; None for a new request. ApiError: no event of ours has
    such an id."""
    given = request.headers.get(HEADER)
    if given is None:
        return None
    found = _EVENT_ID.fullmatch(given) if len(given) <= _CHARS_MAX else None
    if found is None:
        refuse(
            f"{HEADER} must be the id of the last event that came of a stream, but is "
            f"{shown(given)}. Leave it out to begin anew.",
            HEADER,
        )
    counts = (choice.split(".") for choice in found[2].split(","))
    return Place(found[1], tuple((int(tokens), int(events)) for tokens, events in counts))


class Grows(Protocol):
    tokens: int


class EventIds:
    """Puts ids on the events of one stream, and keeps back what its client has."""

    def __init__(
        self,
        call_id: str,
        choices: Sequence[Grows],
        form: Form,
        seen: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._head = b"id: %b:" % call_id.encode()
        self._choices = choices
        self._form = form if len(choices) <= NAMED_CHOICES_MAX else Form.NONE
        self._at = [(0, 0)] * len(choices)
        self._seen = seen or self._at[:]

    def named(self, index: int, event: bytes) -> bytes:
        """The event, which shows the choice as it is now, with its id; nothing if it was seen. What
        belongs to all of them counts as one of the first."""
        if self._form is Form.NONE:
            return event
        tokens, events = self._at[index]
        now = self._choices[index].tokens
        at = self._at[index] = now, events + 1 if now == tokens else 1
        if at <= self._seen[index]:
            return b""
        place = ",".join([f"{tokens}.{events}" for tokens, events in self._at])
        line = b"%b%b\n" % (self._head, place.encode())
        return line + event if self._form is Form.INSIDE else b":\n%b\n%b" % (line, event)
