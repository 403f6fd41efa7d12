"""The frontend's machine: keeps every submission until it ends, and the tokenizer that has it.

A tokenizer that is lost takes only its text state with it: another one gets the submission and the
tokens that the client already has, under a higher attempt, and goes on from there.
"""

import math
import zlib
from collections import Counter
from dataclasses import dataclass, field

import msgspec

from slipstream.core.machine import (
    AdapterAsked,
    Closed,
    CodecAsked,
    Deliver,
    DeliverAdapter,
    Drain,
    Effect,
    Event,
    Exit,
    Opened,
    PeerDown,
    PeerUp,
    Received,
    Send,
    SetTimer,
    TimerFired,
)
from slipstream.core.membership import Membership
from slipstream.errors import ErrorCode, Problem
from slipstream.frontend.codec_calls import CodecCalls
from slipstream.frontend.patience import Patience, not_ready
from slipstream.frontend.seeking import SEEK_S, Seeking
from slipstream.frontend.settings import FrontendSettings
from slipstream.messages import (
    SCHEDULER,
    AdapterChanged,
    Cancel,
    ClusterLoad,
    CodecResult,
    Failed,
    NodeInfo,
    Peers,
    Sought,
    TextDelta,
    TextOut,
    Tokenize,
    Tokenized,
)
from slipstream.types import ATTEMPTS_PER_MOVE, Epoch, NodeId, RequestId, Role, count_tokens

TICK_TIMER, TICK_S = "tick", 0.5
MOVE_BATCH_BYTES = 16 << 20
"""How much is moved at a time: a session that holds too much unread is ended."""

GONE = Problem(
    code=ErrorCode.STREAM_NOT_FOUND,
    message="No journal and no tokenizer has this stream any more; send the request again, without "
    "Last-Event-ID.",
    param="Last-Event-ID",
)

_encode = msgspec.msgpack.Encoder().encode


@dataclass(slots=True, eq=False)
class _Request:
    submission: Tokenize
    deadline_s: float
    tokenizer: NodeId = ""
    """Who has it; empty: it waits for one."""
    lost: tuple[NodeId, Epoch] | None = None
    """While it waits: the process that had it."""
    attempt: int = 0
    """Of what was sent last; deltas of lower ones are void."""
    attempt_seen: int = 0
    accepted: bytearray = field(default_factory=bytearray)
    prompt_tokens_told: bool = False
    seeking: Seeking | None = None
    """It was another frontend's, and its tokenizer is not known yet."""
    holder: NodeId = ""
    """Who is said to have it."""
    ended: bool = False
    """The client has its last item, and has not closed yet."""

    @property
    def num_accepted(self) -> int:
        return count_tokens(self.accepted)


class FrontendMachine:
    def __init__(self, node: NodeInfo, settings: FrontendSettings) -> None:
        self.settings = settings
        self.membership = Membership(node)
        self.patience = Patience(self.membership, settings.recovery_wait_s)
        self.load = ClusterLoad(gauges={})
        """As the scheduler said last."""
        self.draining = False
        self._drained_s = math.inf
        self._requests: dict[RequestId, _Request] = {}
        self._calls = CodecCalls(
            settings.max_codec_calls, settings.codec_timeout_s, settings.retry_after_s
        )
        self._assigned: Counter[NodeId] = Counter()
        self._turn = zlib.crc32(node.node_id.encode())
        self._epochs: dict[NodeId, Epoch] = {}
        """Of the sessions that are up."""
        self._ticking = False
        self._exited = False
        self._counts: Counter[str] = Counter()

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        self.patience.before(event, now_s)
        effects = self.membership.handle(event, now_s)
        match event:
            case Opened():
                effects += self._open(event, now_s)
            case Closed(request_id):
                effects += self._close(request_id)
            case CodecAsked():
                alive = self._tokenizers(event.model, now_s)
                target = self._idlest(alive) if alive else None
                effects.append(self._calls.ask(event, target, now_s))
            case AdapterAsked(change):
                effects.append(Send(SCHEDULER, change))
            case Received(source, message):
                effects += self._received(source, message, now_s)
            case PeerUp(peer, epoch):
                self._epochs[peer] = epoch
                effects += self._place_waiting(now_s)
            case PeerDown(peer):
                effects += self._lost(peer, now_s)
            case Drain():
                self.draining, self._drained_s = True, now_s + self.settings.drain_timeout_s
                effects += self.membership.drain(now_s)
            case TimerFired(key) if key == TICK_TIMER:
                self._ticking = False
                effects += self._tick(now_s)
        if not self._ticking and (self._requests or self._calls):
            self._ticking = True
            effects.append(SetTimer(TICK_TIMER, now_s + TICK_S))
        if self.draining and not self._exited and not self._requests and not self._calls:
            self._exited = True
            effects.append(Exit())
        return effects

    def statistics(self) -> dict[str, float]:
        live = [request for request in self._requests.values() if not request.ended]
        return {
            "requests_live": float(len(live)),
            "requests_waiting": float(sum(not request.tokenizer for request in live)),
            "requests_unclosed": float(len(self._requests) - len(live)),
            "codec_calls": float(len(self._calls)),
        } | {f"{name}_total": float(count) for name, count in self._counts.items()}

    def check(self) -> None:
        assert len(self._requests) <= self.settings.max_requests
        assert len(self._calls) <= self.settings.max_codec_calls
        assigned: Counter[NodeId] = Counter()
        for request in self._requests.values():
            assert len(request.accepted) % 4 == 0
            assert not (request.ended and request.tokenizer)
            assert request.attempt_seen >= request.attempt
            assert not (request.seeking and (request.ended or request.tokenizer))
            if request.tokenizer:
                assigned[request.tokenizer] += 1
        assert assigned == +self._assigned
        assert self._ticking or not (self._requests or self._calls)

    # --- The client's side ---

    def _open(self, opened: Opened, now_s: float) -> list[Effect]:
        submission, taken = opened.submission, opened.taken
        known = self._requests.get(submission.request_id)
        if known is not None and taken is None:
            return []
        problem = self._refusal(submission.model, now_s)
        if problem is not None:
            self._counts[f"refused_{problem.code.value}"] += 1
            left = [] if known is None else self._close(submission.request_id)
            return [*left, Deliver(submission.request_id, problem)]
        if known is not None:  # from ourselves: its client is back
            self._release(known)
        self._counts["requests"] += 1
        deadline_s = now_s + submission.timeout_s + self.settings.deadline_grace_s
        request = _Request(submission, deadline_s)
        self._requests[submission.request_id] = request
        if taken is None:
            return self._place(request, now_s)
        self._counts["resumed"] += 1
        request.accepted += taken.accepted
        request.prompt_tokens_told = taken.prompt_tokens_told
        request.seeking = Seeking(taken.journaled, taken.owner, now_s + SEEK_S)
        return request.seeking.ask(opened, self._tokenizers(submission.model, now_s))

    def _refusal(self, model: str, now_s: float) -> Problem | None:
        if self.draining:
            code, message = ErrorCode.DRAINING, "The server is stopping; send the request again."
        elif reason := self.patience.over(now_s, model):
            code, message = ErrorCode.NOT_READY, not_ready(reason)
        elif len(self._requests) >= self.settings.max_requests:
            code = ErrorCode.QUEUE_FULL
            message = f"{self.settings.max_requests} requests are live; send the request again."
        else:
            return None
        return Problem(code=code, message=message, retry_after_s=self.settings.retry_after_s)

    def _close(self, request_id: RequestId) -> list[Effect]:
        request = self._requests.pop(request_id, None)
        if request is None or request.ended:
            return []
        self._counts["abandoned"] += 1
        return self._withdraw(request)

    def _withdraw(self, request: _Request) -> list[Effect]:
        """The tokenizer need not go on. One that is out of reach finds out by itself."""
        tokenizer = self._release(request)
        cancel = Cancel(request_id=request.submission.request_id)
        return [Send(tokenizer, cancel)] if tokenizer else []

    def _end(self, request: _Request, item: TextDelta | Problem) -> list[Effect]:
        """The last item. The entry stays until the client has closed."""
        self._release(request)
        request.ended, request.seeking = True, None
        request.accepted = bytearray()
        if isinstance(item, Problem):
            self._counts[f"failed_{item.code.value}"] += 1
        else:
            self._counts["finished"] += 1
        return [Deliver(request.submission.request_id, item)]

    # --- Tokenizers ---

    def _place(self, request: _Request, now_s: float) -> list[Effect]:
        """Give it to a tokenizer, or let it wait for one."""
        alive = self._tokenizers(request.submission.model, now_s)
        if not alive:
            return []
        lost, request.lost = request.lost, None
        if lost is not None and lost[0] in alive and self._epochs.get(lost[0]) == lost[1]:
            target = lost[0]  # only the session broke: it still has the stream
            self._counts["resyncs"] += 1
        else:
            target = request.holder if request.holder in alive else self._idlest(alive)
            request.holder = ""
            if request.attempt:
                self._counts["moves"] += 1
                moves = request.attempt_seen // ATTEMPTS_PER_MOVE + 1
                request.attempt = moves * ATTEMPTS_PER_MOVE
            else:
                request.attempt = 1
        request.attempt_seen = max(request.attempt_seen, request.attempt)
        request.tokenizer = target
        self._assigned[target] += 1
        left_s = request.deadline_s - self.settings.deadline_grace_s - now_s
        submission = msgspec.structs.replace(
            request.submission,
            attempt=request.attempt,
            accepted=bytes(request.accepted),
            timeout_s=max(0.0, left_s),
        )
        return [Send(target, submission)]

    def _tokenizers(self, model: str, now_s: float) -> list[NodeId]:
        return self.membership.alive(Role.TOKENIZER, now_s, model)

    def _idlest(self, alive: list[NodeId]) -> NodeId:
        """With the fewest streams of ours; of equals each in turn, or frontends with little to do
        would all turn to the same."""
        self._turn += 1
        first = self._turn % len(alive)
        in_turn = alive[first:] + alive[:first]
        return min(in_turn, key=lambda node_id: self._assigned[node_id])

    def _release(self, request: _Request) -> NodeId:
        tokenizer, request.tokenizer = request.tokenizer, ""
        if tokenizer:
            self._assigned[tokenizer] -= 1
        return tokenizer

    def _place_waiting(self, now_s: float) -> list[Effect]:
        effects: list[Effect] = []
        num_bytes = 0
        for request in self._requests.values():
            if num_bytes >= MOVE_BATCH_BYTES:
                break  # the next tick goes on
            if not (request.tokenizer or request.ended or request.seeking):
                effects += self._place(request, now_s)
                num_bytes += len(_encode(request.submission)) + len(request.accepted)
        return effects

    def _lost(self, peer: NodeId, now_s: float) -> list[Effect]:
        epoch = self._epochs.pop(peer, None)
        for request in self._requests.values():
            if request.tokenizer == peer:
                self._release(request)
                request.lost = None if epoch is None else (peer, epoch)
            if request.seeking:
                request.seeking.asked.discard(peer)
        return [*self._calls.lost(peer), *self._sought(now_s), *self._place_waiting(now_s)]

    def _heard(self, source: NodeId, sought: Sought, now_s: float) -> list[Effect]:
        request = self._requests.get(sought.request_id)
        if request is None or request.seeking is None:
            return []
        request.seeking.heard(source, sought)
        return self._sought(now_s)

    def _sought(self, now_s: float) -> list[Effect]:
        """Those that were looked for long enough go on, under a number that fences off the frontend
        that had them."""
        effects: list[Effect] = []
        for request in self._requests.values():
            seeking = request.seeking
            if seeking is None or not seeking.over(now_s):
                continue
            request.seeking = None
            if seeking.found:
                request.holder = seeking.holder
                request.attempt = request.attempt_seen = seeking.attempt - 1  # a move comes next
                effects += self._place(request, now_s)
            else:
                effects += self._end(request, GONE)
        return effects

    # --- What they say ---

    def _received(self, source: NodeId, message: object, now_s: float) -> list[Effect]:
        match message:
            case TextOut(deltas=deltas):
                return [effect for delta in deltas for effect in self._delta(source, delta)]
            case Tokenized(request_id=request_id, prompt_tokens=prompt_tokens):
                request = self._of(source, request_id)
                if request is None or request.prompt_tokens_told:
                    return []
                request.prompt_tokens_told = True
                return [Deliver(request_id, prompt_tokens)]
            case Failed(request_id=request_id, problem=problem):
                request = self._of(source, request_id)
                return [] if request is None else self._end(request, problem)
            case CodecResult():
                return self._calls.answered(source, message)
            case Sought(request_id=request_id):
                return self._heard(source, message, now_s)
            case Peers():
                return self._place_waiting(now_s)
            case AdapterChanged():
                return [DeliverAdapter(message)]
            case ClusterLoad():
                self.load = message
        return []

    def _of(self, source: NodeId, request_id: RequestId) -> _Request | None:
        request = self._requests.get(request_id)
        return request if request is not None and request.tokenizer == source else None

    def _delta(self, source: NodeId, delta: TextDelta) -> list[Effect]:
        """Takes what follows on what the client has. What was said before is skipped; what is ahead
        of a loss, be it of tokens or of `Tokenized`, is said again in answer to our `Tokenize`."""
        request = self._of(source, delta.request_id)
        if request is None or delta.attempt < request.attempt:
            return []
        if delta.position != request.num_accepted or not request.prompt_tokens_told:
            self._counts["deltas_skipped"] += 1
            return []
        request.attempt_seen = max(request.attempt_seen, delta.attempt)
        request.accepted += delta.tokens
        self._counts["tokens"] += count_tokens(delta.tokens)
        if delta.finish_reason is not None:
            return self._end(request, delta)
        return [Deliver(delta.request_id, delta)]

    # --- Time ---

    def _overdue(self, request: _Request, missing: str, now_s: float) -> Problem | None:
        if now_s >= request.deadline_s:
            text = f"The request's time budget of {request.submission.timeout_s:g} s is used up."
            return Problem(code=ErrorCode.DEADLINE, message=text)
        if now_s >= self._drained_s:
            text = f"The server stops after {self.settings.drain_timeout_s:g} s; send it again."
            return Problem(code=ErrorCode.DRAINING, message=text)
        if missing and not request.accepted:
            retry_after_s = self.settings.retry_after_s
            text = not_ready(missing)
            return Problem(code=ErrorCode.NOT_READY, message=text, retry_after_s=retry_after_s)
        return None

    def _tick(self, now_s: float) -> list[Effect]:
        effects = self._sought(now_s) + self._place_waiting(now_s)
        missing = self.patience.over(now_s)
        for request in self._requests.values():
            problem = None if request.ended else self._overdue(request, missing, now_s)
            if problem is not None:
                effects += [*self._withdraw(request), *self._end(request, problem)]
        return effects + self._calls.tick(now_s)
