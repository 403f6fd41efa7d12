"""One answer as it comes in: when its pieces came, and what is wrong with it. Pure."""

from typing import Any

import msgspec

PIECE_BYTES_MAX = 1 << 20
"""Of one event; far more than any server sends."""


class _Details(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class Broken(msgspec.Struct, frozen=True):
    """What is wrong with an accepted answer."""

    wrong: bool
    """It has said something that is not so; otherwise it has no end."""
    told: str


class Stream:
    """Reads server-sent events of a chat or of a completion with one choice."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        """When each event with text came, or with what the model thinks before it."""
        self.text = ""
        self.finish_reason = ""
        self.done = False
        self.prompt_tokens = self.tokens = self.cached_tokens = 0
        """As the server counts them; 0 until it has said so."""
        self._parts: list[str] = []
        self._rest = b""
        self._broken: Broken | None = None

    def feed(self, data: bytes, now_s: float) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            event = line.removeprefix(b"data:").strip()
            if len(event) != len(line) and event:
                self._event(event, now_s)
        if len(self._rest) > PIECE_BYTES_MAX:
            self._break(True, f"an event of more than {PIECE_BYTES_MAX} bytes")
            self._rest = b""

    def close(self) -> None:
        """Nothing more will come; `text` is whole now."""
        self.text = "".join(self._parts)

    def broken(self, tokens_asked: int) -> Broken | None:
        """Of an answer that the client has not cancelled."""
        if self._broken is not None:
            return self._broken
        if not self.finish_reason:
            return Broken(False, "ended without finish_reason")
        if not self.done:
            return Broken(False, "ended without [DONE]")
        if self.tokens != tokens_asked:
            return Broken(True, f"usage says {self.tokens} tokens, {tokens_asked} were asked for")
        if len(self.times_s) > self.tokens:
            return Broken(True, f"{len(self.times_s)} pieces of text, but {self.tokens} tokens")
        return None

    @property
    def failed(self) -> bool:
        """Whether there is no use in reading on."""
        return self._broken is not None

    def _event(self, event: bytes, now_s: float) -> None:
        if event == b"[DONE]":
            self.done = True
            return
        try:
            chunk = _decode(event)
        except msgspec.DecodeError:
            return self._break(True, f"an event that cannot be read: {short(event)}")
        if self.done:
            return self._break(True, f"an event after [DONE]: {short(event)}")
        if chunk.error is not None:
            return self._break(False, f"an error: {short(msgspec.json.encode(chunk.error))}")
        for choice in chunk.choices:
            delta = choice.delta or _Delta(choice.text)
            self._parts.append(delta.content or "")
            if delta.content or delta.reasoning_content:
                self.times_s.append(now_s)
            self.finish_reason = choice.finish_reason or self.finish_reason
        if chunk.usage is not None:
            self.prompt_tokens = chunk.usage.prompt_tokens
            self.tokens = chunk.usage.completion_tokens
            details = chunk.usage.prompt_tokens_details
            self.cached_tokens = details.cached_tokens if details else 0

    def _break(self, wrong: bool, told: str) -> None:
        self._broken = self._broken or Broken(wrong, told)


def short(text: bytes) -> str:
    """One line, of any length."""
    return " ".join(text.decode("utf-8", "replace").split())[:200]
