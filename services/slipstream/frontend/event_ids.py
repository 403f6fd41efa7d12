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
        self, call_id: str, choices: Sequence[Grows], seen: Sequence[tuple[int, int]] = ()
    ) -> None:
        self._head = b"id: %b:" % call_id.encode()
        self._choices = choices
        self._named = len(choices) <= NAMED_CHOICES_MAX
        self._at = [(0, 0)] * len(choices)
        self._seen = seen or self._at[:]

    def named(self, index: int, event: bytes) -> bytes:
        """The event, which shows the choice as it is now, with its id; nothing if it was seen. What
        belongs to all of them counts as one of the first."""
        if not self._named:
            return event
        tokens, events = self._at[index]
        now = self._choices[index].tokens
        at = self._at[index] = now, events + 1 if now == tokens else 1
        if at <= self._seen[index]:
            return b""
        place = ",".join([f"{tokens}.{events}" for tokens, events in self._at])
        return b"%b%b\n%b" % (self._head, place.encode(), event)
