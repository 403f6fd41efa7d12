"""The streams behind one HTTP request: opened together, read as one, always closed."""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType

import msgspec

from slipstream.core.submission import call_digest
from slipstream.errors import ErrorCode, Problem
from slipstream.frontend.event_ids import NAMED_CHOICES_MAX, EventIds, Form, Place
from slipstream.frontend.gateway import Gateway, StreamItem
from slipstream.frontend.journal import Journal, Log
from slipstream.frontend.openai import (
    PromptLogprob,
    PromptLogprobs,
    PromptTokensDetails,
    StopReason,
    UsageOut,
)
from slipstream.frontend.problems import ApiError
from slipstream.frontend.replay import Replay
from slipstream.frontend.trail import Trail
from slipstream.messages import PartKind, TextDelta, TextLogprob, Tokenize
from slipstream.spans import TraceContext
from slipstream.types import FinishReason, Usage

TAKEN_MAX = 64
"""Items that go out in one write: a slow reader is noticed between two."""

LOGPROB_MIN = -9999.0

PATH = "x-slipstream-path"

TOOL_CALLS = "tool_calls"
"""Why a choice ended that calls functions; where the client named the function, it is a plain stop,
as OpenAI has it."""


class Call(msgspec.Struct, kw_only=True):
    """One HTTP request that generates text."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    submissions: list[Tokenize]
    """One for each choice: prompt by prompt, `n` for each."""
    trail: Trail
    stall_timeout_s: float
    """Longest silence between two tokens."""
    n: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    wants_logprobs: bool
    forced: bool = False
    """The client has named the function to be called, so that a call is a plain end."""
    ids: Form = Form.NONE
    after: Place | None = None
    """The client has the stream up to here, from another frontend."""
    context: TraceContext


class Choice:
    """What has arrived of one choice."""

    __slots__ = (
        *("_forced", "called", "decision", "finish_reason", "path", "prompt_logprobs"),
        *("prompt_tokens", "stop_reason", "tokens", "usage"),
    )

    def __init__(self, forced: bool = False) -> None:
        self._forced = forced
        self.called = False
        self.prompt_logprobs: list[TextLogprob] = []
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
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        self.called = self.called or any(part.kind is PartKind.CALL for part in delta.parts)
        if delta.finish_reason is not None:
            called = self.called and not self._forced and delta.finish_reason is FinishReason.STOP
            self.finish_reason = TOOL_CALLS if called else delta.finish_reason.value
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
    """The choices of a call: `open`, then `take` while there is `more`. Leaving the context closes
    every stream, however it is left."""

    def __init__(self, gateway: Gateway, call: Call, journal: Journal | None = None) -> None:
        """`journal`: where a stream is written down before it is told."""
        self._gateway = gateway
        self._call = call
        named = call.ids is not Form.NONE and len(call.submissions) <= NAMED_CHOICES_MAX
        resumable = call.stream and named
        self._journal = journal if resumable else None
        self._log: Log | None = None
        self._closing: list[Callable[[], None]] = []
        self._arrived: deque[tuple[int, StreamItem]] = deque()
        """Not taken yet. Together as long as the answers at most."""
        self._news: asyncio.Future[None] | None = None
        self._heard_s: float | None = None
        """When the last token came."""
        self._watch: asyncio.TimerHandle | None = None
        self.choices = [Choice(call.forced) for _ in call.submissions]
        self._running = len(self.choices)
        self.ids = EventIds(call.id, self.choices, call.ids, call.after.seen if call.after else ())

    def __enter__(self) -> "Answers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._watch is not None:
            self._watch.cancel()
        reasons = [choice.finish_reason for choice in self.choices if choice.finish_reason]
        self._call.trail.reasons = reasons
        self._call.trail.path = self.headers().get(PATH, "")
        with contextlib.ExitStack() as closing:
            for close in self._closing:
                closing.callback(close)
            if self._log is not None:
                self._log.end(whole=self._running == 0)

    async def open(self) -> None:
        """Begins the answers, or goes on with those that the client had at another frontend."""
        call = self._call
        seen = [tokens for tokens, _ in call.after.seen] if call.after is not None else None
        call.trail.begin(call.id, call.model, seen)
        head = call_digest(call.submissions) if self._journal else b""
        found, owner = None, 0
        if call.after is not None:
            # Seconds, so that of two that know nothing of each other the later one has more.
            owner = max(0, int(time.time()) - call.created) + 1
        if call.after is not None and self._journal is not None:
            found = await self._journal.take(call.id, head, owner)
        replay = Replay(len(self.choices))
        replay.read(found.packs if found else ())
        self._arrived.extend(replay.items)
        owner = found.owner if found else owner
        if self._journal is not None:
            self._log = self._journal.begin(call.id, b"" if found else head, owner, self._put)
        for index, submission in enumerate(call.submissions):
            if replay.ended[index]:
                continue
            put = partial(self._log.append if self._log else self._put, index)
            taken = None
            if call.after is not None:
                taken = replay.taken(index, owner, journaled=found is not None)
            open_ = self._gateway.open
            self._closing.append(open_(submission, put, call.context, call.model, taken))
        if call.stall_timeout_s < math.inf:
            self._look_again(call.stall_timeout_s)

    def _look_again(self, after_s: float) -> None:
        self._watch = asyncio.get_running_loop().call_later(after_s, self._look)

    def _look(self) -> None:
        """One timer for the whole answer. Until the first token others watch over the time."""
        now_s, limit_s = asyncio.get_running_loop().time(), self._call.stall_timeout_s
        silent_s = 0.0 if self._heard_s is None else now_s - self._heard_s
        if silent_s < limit_s:
            self._look_again(limit_s - silent_s)
        elif self._running:
            text = f"No token came for {limit_s:g} s (--stall-timeout-s); send the request again."
            self._put(0, Problem(code=ErrorCode.STALLED, message=text))

    async def more(self) -> bool:
        """Waits until there is something to take; False once every choice has ended."""
        if len(self._arrived) > TAKEN_MAX:
            await asyncio.sleep(0)  # a journal is read at once: others have their turn between
        if self._running and not self._arrived:
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        return self._running > 0

    def take(self) -> Iterator[tuple[int, TextDelta]]:
        """What has arrived, as (index of the choice, delta), but no more than TAKEN_MAX items.
        ApiError if a choice has failed, after what came before that has been taken."""
        for taken in range(min(len(self._arrived), TAKEN_MAX)):
            index, item = self._arrived[0]
            error = _failure(item)
            if error is not None and taken:
                return
            if error is not None:
                self._call.trail.error = error.problem.code
                raise error
            self._arrived.popleft()
            choice = self.choices[index]
            if isinstance(item, TextDelta):
                choice.take(item)
                self._running -= item.finish_reason is not None
                yield index, item
            elif isinstance(item, int):
                choice.prompt_tokens = item

    def _put(self, index: int, item: StreamItem) -> None:
        if isinstance(item, TextDelta):
            self._heard_s = asyncio.get_running_loop().time()
            self._call.trail.made(index, item, first=index % self._call.n == 0)
        elif isinstance(item, int) and index % self._call.n == 0:  # choices share their prompt
            self._call.trail.prompt(item)
        self._arrived.append((index, item))
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

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
            PATH: ", ".join(paths),
            "x-slipstream-decision": ", ".join(decisions),
        }
        return {name: text for name, text in found.items() if text and text.isprintable()}


def _failure(item: StreamItem) -> ApiError | None:
    if isinstance(item, Problem):
        return ApiError(item)
    if isinstance(item, TextDelta) and item.finish_reason is FinishReason.ERROR:
        message = "The answer broke off for a reason on our side; the server's log has it."
        return ApiError(Problem(code=ErrorCode.INTERNAL, message=message))
    return None


def finite(logprob: float) -> float:
    """JSON has no infinity; a comparison with NaN is false."""
    return logprob if logprob > LOGPROB_MIN else LOGPROB_MIN


def prompt_logprobs(choice: Choice) -> PromptLogprobs | msgspec.UnsetType:
    """Of each token of the prompt; the first one has none."""
    scored = choice.prompt_logprobs[1:]
    if not choice.prompt_logprobs:
        return msgspec.UNSET
    return [None, *({str(x.token_id): _scored(x) for x in (entry, *entry.top)} for entry in scored)]


def _scored(entry: TextLogprob) -> PromptLogprob:
    return PromptLogprob(logprob=finite(entry.logprob), decoded_token=entry.text)


def alternatives(entry: TextLogprob, count: int) -> Sequence[TextLogprob]:
    return entry.top[:count]
