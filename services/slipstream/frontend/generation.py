"""The streams behind one HTTP request: opened together, read as one, always closed."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType

import msgspec

from slipstream.errors import ErrorCode, Problem
from slipstream.frontend.gateway import Gateway, Stream, StreamItem
from slipstream.frontend.openai import PromptTokensDetails, StopReason, UsageOut
from slipstream.frontend.problems import ApiError
from slipstream.messages import TextDelta, TextLogprob, Tokenize
from slipstream.types import FinishReason, Usage

MERGED_MAX = 256
"""Items that wait for a slow reader of several choices before their streams are read no further."""

LOGPROB_MIN = -9999.0


class Call(msgspec.Struct, kw_only=True):
    """One HTTP request that generates text."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    submissions: list[Tokenize]
    """One for each choice: prompt by prompt, `n` for each."""
    n: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    wants_logprobs: bool


class Choice:
    """What has arrived of one choice."""

    __slots__ = (
        *("decision", "finish_reason", "path", "prompt_tokens", "stop_reason", "tokens", "usage"),
    )

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.tokens = 0
        self.finish_reason = ""
        self.stop_reason: StopReason = None
        self.usage: Usage | None = None
        self.path = self.decision = ""

    def take(self, delta: TextDelta) -> None:
        self.tokens = max(self.tokens, delta.position + len(delta.tokens) // 4)
        if delta.path:
            self.path, self.decision = delta.path, delta.decision
        if delta.usage is not None:
            self.usage = delta.usage
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason.value
            self.stop_reason = delta.stop_reason

    def running_usage(self) -> UsageOut:
        return UsageOut(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.tokens,
            total_tokens=self.prompt_tokens + self.tokens,
        )

    def final_usage(self) -> Usage:
        return self.usage or Usage(prompt_tokens=self.prompt_tokens, completion_tokens=self.tokens)


class Answers:
    """The choices of a call. Iterating gives (index, delta) until all have ended, ApiError if one
    fails. Leaving the context closes every stream, however it is left."""

    def __init__(self, gateway: Gateway, call: Call) -> None:
        self._gateway = gateway
        self._call = call
        self._streams: list[Stream] = []
        self.choices = [Choice() for _ in call.submissions]

    def __enter__(self) -> "Answers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.ExitStack() as closing:
            for stream in self._streams:
                closing.callback(stream.close)

    def open(self) -> AsyncGenerator[tuple[int, TextDelta], None]:
        for submission in self._call.submissions:
            self._streams.append(self._gateway.open(submission))
        return self._one() if len(self._streams) == 1 else self._several()

    async def _one(self) -> AsyncGenerator[tuple[int, TextDelta], None]:
        async for item in self._streams[0]:
            delta = self._taken(0, item)
            if delta is not None:
                yield 0, delta
                if delta.finish_reason is not None:
                    return
        raise _broken_off()

    async def _several(self) -> AsyncGenerator[tuple[int, TextDelta], None]:
        arrived: asyncio.Queue[tuple[int, StreamItem | Exception]] = asyncio.Queue(MERGED_MAX)
        pumps = [
            asyncio.create_task(_pump(index, stream, arrived))
            for index, stream in enumerate(self._streams)
        ]
        try:
            running = len(pumps)
            while running:
                index, item = await arrived.get()
                if isinstance(item, Exception):
                    raise item
                delta = self._taken(index, item)
                if delta is not None:
                    yield index, delta
                    running -= delta.finish_reason is not None
        finally:
            for pump in pumps:
                pump.cancel()

    def _taken(self, index: int, item: StreamItem) -> TextDelta | None:
        if isinstance(item, Problem):
            raise ApiError(item)
        choice = self.choices[index]
        if isinstance(item, int):
            choice.prompt_tokens = item
            return None
        if item.finish_reason is FinishReason.ERROR:
            raise _broken_off()
        choice.take(item)
        return item

    def usage(self) -> UsageOut:
        """A prompt counts once, however many choices share it."""
        finals = [choice.final_usage() for choice in self.choices]
        firsts = finals[:: self._call.n]
        prompt = sum(usage.prompt_tokens for usage in firsts)
        completion = sum(usage.completion_tokens for usage in finals)
        cached = sum(usage.cached_tokens for usage in firsts)
        return UsageOut(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )

    def headers(self) -> dict[str, str]:
        """Who answers, and why they: as far as it is known by now."""
        paths = dict.fromkeys(choice.path for choice in self.choices if choice.path)
        decisions = dict.fromkeys(choice.decision for choice in self.choices if choice.decision)
        found = {
            "x-slipstream-path": ", ".join(paths),
            "x-slipstream-decision": ", ".join(decisions),
        }
        return {name: text for name, text in found.items() if text and text.isprintable()}


async def _pump(
    index: int, stream: Stream, arrived: "asyncio.Queue[tuple[int, StreamItem | Exception]]"
) -> None:
    try:
        async for item in stream:
            await arrived.put((index, item))
            if isinstance(item, TextDelta) and item.finish_reason is not None:
                return
        await arrived.put((index, _broken_off()))
    except Exception as error:  # noqa: BLE001 (handed to the reader, who raises it)
        await arrived.put((index, error))


def _broken_off() -> ApiError:
    message = "The answer broke off for a reason on our side; the server's log has it."
    return ApiError(Problem(code=ErrorCode.INTERNAL, message=message))


def finite(logprob: float) -> float:
    """JSON has no infinity; a comparison with NaN is false."""
    return logprob if logprob > LOGPROB_MIN else LOGPROB_MIN


def alternatives(entry: TextLogprob, count: int) -> Sequence[TextLogprob]:
    return entry.top[:count]
