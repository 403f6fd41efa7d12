"""Stands in for the tokenizer: submits requests, takes their tokens, and keeps the account.

Answers as the tokenizer's machine does (`StreamAck`, `StreamEnded`, `Resend`, a new `Submit` at
`Resume`), without text.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from slipstream.core.machine import Effect, Event, Received, Send
from slipstream.core.membership import Membership
from slipstream.messages import (
    SCHEDULER,
    Failed,
    NodeInfo,
    Resend,
    Resume,
    StreamAck,
    StreamEnded,
    Submit,
    TokensOut,
    TokenSpan,
)
from slipstream.simulate.prompts import Prompts
from slipstream.simulate.trace import TraceRequest
from slipstream.types import TOKEN_BYTES, RequestId, SamplingParams, count_tokens


class Limits(msgspec.Struct, frozen=True):
    """What a request must keep to count: time to first token, and mean time between tokens."""

    ttft_s: float
    itl_s: float

    def kept(self, stream: "Stream") -> bool:
        answered = stream.ended_s is not None and not stream.problem
        return answered and stream.first_s <= self.ttft_s and stream.mean_itl_s <= self.itl_s


@dataclass(slots=True, eq=False)
class Stream:
    """One request, from its arrival to its end and beyond."""

    request: TraceRequest
    attempt: int = 1
    accepted: bytes = b""
    first_s: float = 0.0
    """When its first token came; as `last_s` and `ended_s` in seconds after the arrival."""
    last_s: float = 0.0
    ended_s: float | None = None
    cached_tokens: int = 0
    problem: str = ""

    @property
    def num_tokens(self) -> int:
        return count_tokens(self.accepted)

    @property
    def mean_itl_s(self) -> float:
        return (self.last_s - self.first_s) / max(1, self.num_tokens - 1)


class Driver:
    """`streams` holds every request by its number in the trace; `gaps_s` every inter-token gap."""

    def __init__(
        self,
        node: NodeInfo,
        requests: Sequence[TraceRequest],
        prompts: Prompts,
        limits: Limits,
        timeout_s: float,
    ):
        self.membership, self._model = Membership(node), node.model
        self.streams = [Stream(request) for request in requests]
        self.gaps_s = array("d")
        self.open = len(self.streams)
        """Requests that have not ended, those that have not come included."""
        self.late = 0
        """Requests that have ended outside of the limits, failed ones included."""
        self._prompts, self._limits, self._timeout_s = prompts, limits, timeout_s

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        effects = self.membership.handle(event, now_s)
        match event:
            case Received(source, TokensOut(spans=spans)):
                for span in spans:
                    effects += self._take(source, span, now_s)
            case Received(_, Resume(request_id=request_id, attempt=attempt)):
                stream = self._stream(request_id)
                if stream.ended_s is not None:
                    effects.append(Send(SCHEDULER, StreamEnded(request_id=request_id)))
                else:
                    stream.attempt = max(stream.attempt, attempt)
                    effects += self.submit(int(request_id), now_s)
            case Received(_, Failed(request_id=request_id, problem=problem)):
                stream = self._stream(request_id)
                if stream.ended_s is None:
                    stream.problem = problem.code.value
                    effects += self._end(stream, request_id, now_s)
        return effects

    def statistics(self) -> dict[str, float]:
        return {"streams_open": self.open}

    def check(self) -> None:
        assert self.open == sum(stream.ended_s is None for stream in self.streams)

    def submit(self, number: int, now_s: float) -> list[Effect]:
        """A request arrives, or goes on as a new attempt."""
        stream = self.streams[number]
        request = stream.request
        submit = Submit(
            request_id=str(number),
            attempt=stream.attempt,
            prompt=self._prompts.packed(request),
            accepted=stream.accepted,
            sampling=SamplingParams(max_tokens=request.output_tokens, seed=number, ignore_eos=True),
            timeout_s=max(0.0, request.arrival_s + self._timeout_s - now_s),
            model=self._model,
            block_hashes=self._prompts.hashes(request),
        )
        return [Send(SCHEDULER, submit)]

    def _stream(self, request_id: RequestId) -> Stream:
        return self.streams[int(request_id)]

    def _take(self, source: str, span: TokenSpan, now_s: float) -> list[Effect]:
        stream = self._stream(span.request_id)
        request_id, attempt = span.request_id, span.attempt
        heard = Send(source, StreamAck(request_id=request_id, attempt=attempt))
        if stream.ended_s is not None or attempt < stream.attempt:
            return [heard] if span.finish_reason is not None else []
        if attempt > stream.attempt:
            return []
        have = stream.num_tokens
        if span.position > have:
            again = Resend(request_id=request_id, attempt=attempt, position=have)
            return [Send(source, again)]
        new = span.tokens[(have - span.position) * TOKEN_BYTES :]
        if new:
            self._count(stream, span, count_tokens(new), now_s - stream.request.arrival_s)
            stream.accepted += new
        if span.finish_reason is None:
            return []
        return [heard, *self._end(stream, request_id, now_s)]

    def _count(self, stream: Stream, span: TokenSpan, count: int, after_s: float) -> None:
        if stream.accepted:
            self.gaps_s.extend([(after_s - stream.last_s) / count] * count)
        else:
            stream.first_s, stream.cached_tokens = after_s, span.cached_tokens
        stream.last_s = after_s

    def _end(self, stream: Stream, request_id: RequestId, now_s: float) -> list[Effect]:
        stream.ended_s = now_s - stream.request.arrival_s
        self.open -= 1
        self.late += not self._limits.kept(stream)
        return [Send(SCHEDULER, StreamEnded(request_id=request_id))]
