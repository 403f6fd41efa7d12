"""One answer as it is streamed: its text, and when it came. Reads bytes, and no socket or clock."""

from typing import Any

import msgspec

_SHOWN_MAX = 200


class AnswerError(Exception):
    """An answer that was refused, broken off, or not as it was to be; one line."""


class PromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    completion_tokens: int
    prompt_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None

    @property
    def cached_tokens(self) -> int:
        details = self.prompt_tokens_details
        return (details.cached_tokens or 0) if details is not None else 0


class Delta(msgspec.Struct, frozen=True):
    content: str | None = None
    reasoning_content: str | None = None


class Choice(msgspec.Struct, frozen=True):
    """Of a chat, which has `delta`, or of a completion, which has `text`."""

    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None

    @property
    def content(self) -> str:
        return (self.text if self.delta is None else self.delta.content) or ""

    @property
    def reasoning(self) -> str:
        """What the model thinks before it answers."""
        return (self.delta and self.delta.reasoning_content) or ""

    @property
    def is_token(self) -> bool:
        """A chat begins with a chunk that names the role and ends with one that says why; of a
        completion each has a token, which need not have made text yet."""
        return self.delta is None or bool(self.content or self.reasoning)


class _Chunk(msgspec.Struct):
    id: str = ""
    model: str = ""
    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class Meter:
    """Times from `begin_s`, the moment before the request was sent, on the caller's clock."""

    def __init__(self, begin_s: float, keep_gaps: bool = False) -> None:
        self.first_s = self.last_s = 0.0
        """To the first and the latest chunk with a token in it; 0: none has come."""
        self.gaps_s: list[float] = []
        """Between two chunks with tokens, if `keep_gaps`."""
        self.usage: Usage | None = None
        self.finish_reason = ""
        self.id = self.model = ""
        self.last_id = ""
        """Of the last event that was taken: where to go on if the connection breaks; empty: the
        server names none."""
        self.done = False
        """The server has said that this is the end."""
        self._begin_s = begin_s
        self._keep_gaps = keep_gaps
        self._rest = self._id = b""

    @property
    def tokens(self) -> int:
        return self.usage.completion_tokens if self.usage is not None else 0

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first; a chunk may hold several of them."""
        return (self.last_s - self.first_s) / max(1, self.tokens - 1)

    def feed(self, data: bytes, now_s: float) -> list[Choice]:
        """What `data`, cut anywhere, brought. AnswerError: the server says that it failed."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        found: list[Choice] = []
        for line in lines:
            if line.startswith(b"id:"):
                self._id = line[3:].strip()
            event = line[5:].strip() if line.startswith(b"data:") else b""
            if not event:
                continue  # a comment, an empty line
            if event == b"[DONE]":
                self.done = True
                continue
            found += self._event(event, now_s - self._begin_s)
            self.last_id = self._id.decode("ascii", "replace")
        return found

    def reconnected(self) -> None:
        """What follows begins with a whole event."""
        self._rest = self._id = b""

    def _event(self, event: bytes, at_s: float) -> list[Choice]:
        try:
            chunk = _decode(event)
        except msgspec.DecodeError:
            raise AnswerError(f"a chunk that cannot be read: {short(event)}") from None
        if chunk.error is not None:
            said = short(msgspec.json.encode(chunk.error))
            raise AnswerError(f"an error in the stream: {said}")
        if any(choice.is_token for choice in chunk.choices):
            if not self.first_s:
                self.first_s = at_s
            elif self._keep_gaps:
                self.gaps_s.append(at_s - self.last_s)
            self.last_s = at_s
        for choice in chunk.choices:
            self.finish_reason = choice.finish_reason or self.finish_reason
        self.usage = chunk.usage or self.usage
        self.id, self.model = chunk.id or self.id, chunk.model or self.model
        return chunk.choices


def short(text: bytes) -> str:
    """For a message of one line."""
    return " ".join(text.decode("utf-8", "replace").split())[:_SHOWN_MAX]
