"""What a worker tells of a request: when its prompt was computed, what came from where, its tokens.

prefill = queued (fetch, load), chunk*                of a worker that hands over
decode = awaits prefill, hand-over (read*), generate  of the worker that takes over
decode = queued (fetch, load), chunk*, generate       of one that does both, or computes again
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from slipstream.core import machine as m
from slipstream.core.batching import Batcher
from slipstream.core.prefix import HASH_BYTES
from slipstream.core.span_recorder import SpanRecorder
from slipstream.messages import (
    AttemptFailed,
    Borrow,
    Decode,
    Drop,
    Finished,
    KvReady,
    Lent,
    NodeInfo,
    Prefill,
    Released,
    Started,
    TokensOut,
)
from slipstream.spans import Attributes
from slipstream.types import NodeId, RequestId, count_tokens

CHUNKS_MAX = 64
"""Spans for the chunks of one prompt; what a longer one has beyond is one span."""
PULLS_MAX = 1024
"""READs and loads under way; beyond, the oldest is not told of."""


@dataclass(slots=True, eq=False)
class _Job:
    attempt: int
    whole: str
    """Name of the span of the whole attempt."""
    chunks: int = 0
    preemptions: int = 0


class _Chunk(NamedTuple):
    job: _Job
    request_id: RequestId
    said: Attributes
    last: bool
    """A token is drawn after it."""


class _Pull(NamedTuple):
    request_id: RequestId
    attempt: int
    begin_s: float
    said: Attributes


class WorkerSpans(SpanRecorder):
    """Reads of the machine only whether its batcher has preempted a request."""

    def __init__(self, node: NodeInfo, wall_offset_ns: Callable[[], int], batcher: Batcher) -> None:
        super().__init__(node, wall_offset_ns)
        assert node.worker is not None
        self._block_bytes, self._batcher = node.worker.block_bytes, batcher
        self._jobs: dict[RequestId, _Job] = {}
        self._prompts: set[RequestId] = set()
        """Those whose prompt is not computed: steps are looked through only while there are any."""
        self._steps: dict[int, list[_Chunk]] = {}
        """In flight, with parts of prompts in them."""
        self._pulls: OrderedDict[str, _Pull] = OrderedDict()
        self._preemptions = 0
        self.heard = {
            Prefill: self._begins,
            Decode: self._begins,
            Drop: self._dropped,
            KvReady: self._announced,
            Lent: self._lent,
            Released: self._released,
        }
        self.happened = {
            m.BatchDone: self._landed,
            m.BatchFailed: self._broke,
            m.PullDone: self._pulled,
        }
        self.sent = {
            Borrow: self._asks,
            KvReady: self._announces,
            Started: self._started,
            Finished: self._finished,
            AttemptFailed: self._failed,
        }
        self.done = {
            m.RunBatch: self._runs,
            m.PullBlocks: self._reads,
            m.LoadBlocks: self._loads,
        }

    def check(self) -> None:
        super().check()
        assert self._prompts <= self._jobs.keys()
        assert len(self._pulls) <= PULLS_MAX

    # --- An attempt -------------------------------------------------------------------------------

    def _begins(self, source: NodeId, message: Prefill | Decode) -> None:
        request_id = message.request_id
        known = self._jobs.get(request_id)
        if known is not None and known.attempt >= message.attempt:
            return
        if known is not None:
            self._close(request_id, {"outcome": "dropped"})
        whole = "prefill" if isinstance(message, Prefill) else "decode"
        self._jobs[request_id] = _Job(message.attempt, whole)
        said: Attributes = {
            "attempt": message.attempt,
            "prompt_tokens": count_tokens(message.prompt),
        }
        if message.accepted:
            said["accepted_tokens"] = count_tokens(message.accepted)
        self.book.open(request_id, self.now_s)
        self.book.begin(request_id, whole, self.now_s, said=said)
        if isinstance(message, Decode) and message.prefill is not None:
            peer: Attributes = {"peer": message.prefill}
            self.book.begin(request_id, "awaits prefill", self.now_s, whole, peer)
        else:
            self._queue(request_id, {})

    def _queue(self, request_id: RequestId, said: Attributes) -> None:
        """Its prompt is to be computed here."""
        self._prompts.add(request_id)
        self.book.begin(request_id, "queued", self.now_s, self._jobs[request_id].whole, said)

    def _current(self, request_id: RequestId, attempt: int) -> _Job | None:
        job = self._jobs.get(request_id)
        return job if job is not None and job.attempt == attempt else None

    def _close(self, request_id: RequestId, said: Attributes) -> None:
        job = self._jobs.pop(request_id)
        self._prompts.discard(request_id)
        self.book.end(request_id, job.whole, self.now_s, said)
        self.book.close(request_id, self.now_s)

    def _dropped(self, source: NodeId, message: Drop) -> None:
        job = self._jobs.get(message.request_id)
        if job is not None and job.attempt <= message.attempt:
            self._close(message.request_id, {"outcome": "dropped"})

    def _failed(self, to: NodeId, message: AttemptFailed) -> None:
        if self._current(message.request_id, message.attempt) is not None:
            self._close(message.request_id, {"error.type": message.cause.partition(":")[0]})

    def _finished(self, to: NodeId, message: Finished) -> None:
        if self._current(message.request_id, message.attempt) is None:
            return
        said: Attributes = {}
        staged = (e.message for e in self.effects if isinstance(e, m.Send))
        spans = chain.from_iterable(one.spans for one in staged if isinstance(one, TokensOut))
        for span in spans:
            if span.request_id == message.request_id and span.finish_reason is not None:
                said["output_tokens"] = span.position + count_tokens(span.tokens)
                said["cached_tokens"] = span.cached_tokens
                said["finish_reason"] = span.finish_reason.value
        self._close(message.request_id, said)

    # --- Its prompt -------------------------------------------------------------------------------

    def _runs(self, effect: m.RunBatch) -> None:
        if self._batcher.preemptions != self._preemptions:
            self._preempted()
        if not self._prompts:
            return
        plan, chunks = effect.plan, []
        for row in plan.rows:
            request_id = row.request_id
            if request_id not in self._prompts or row.after_previous:
                continue
            self.book.end(request_id, "fetch", self.now_s)
            self.book.end(request_id, "queued", self.now_s)
            said: Attributes = {"from": row.start, "tokens": row.num_tokens, "rows": len(plan.rows)}
            chunks.append(_Chunk(self._jobs[request_id], request_id, said, row.sample))
        if chunks:
            self._steps[plan.step] = chunks

    def _preempted(self) -> None:
        """Some job's blocks were taken: it waits again, and is computed again."""
        self._preemptions = self._batcher.preemptions
        for job in (*self._batcher.waiting, *self._batcher.running):
            known = self._current(job.request_id, job.attempt)
            if known is not None and job.preemptions > known.preemptions:
                known.preemptions = job.preemptions
                self.book.end(job.request_id, "generate", self.now_s, {"preempted": True})
                self._queue(job.request_id, {"preemptions": job.preemptions})

    def _landed(self, done: m.BatchDone) -> None:
        for chunk in self._steps.pop(done.step, ()):
            request_id = chunk.request_id
            if self._jobs.get(request_id) is not chunk.job:
                continue  # another attempt's
            self._computed(chunk, self.now_s - done.elapsed_s)
            if chunk.last:
                self._prompts.discard(request_id)
                self.book.end(request_id, "more chunks", self.now_s)
                if chunk.job.whole == "decode":
                    self.book.begin(request_id, "generate", self.now_s, "decode")

    def _broke(self, failed: m.BatchFailed) -> None:
        self._steps.pop(failed.step, None)

    def _computed(self, chunk: _Chunk, begin_s: float) -> None:
        job, request_id = chunk.job, chunk.request_id
        job.chunks += 1
        if job.chunks <= CHUNKS_MAX:
            self.book.add(request_id, "chunk", begin_s, self.now_s, job.whole, chunk.said)
            return
        self.book.begin(request_id, "more chunks", begin_s, job.whole)
        self._count_up(request_id, "more chunks", {"tokens": chunk.said["tokens"]})

    # --- What comes from elsewhere ----------------------------------------------------------------

    def _asks(self, to: NodeId, message: Borrow) -> None:
        blocks = len(message.block_hashes) // HASH_BYTES
        said: Attributes = {"peer": to, "asked_blocks": blocks}
        self.book.begin(message.request_id, "fetch", self.now_s, "queued", said)

    def _lent(self, source: NodeId, message: Lent) -> None:
        if self._current(message.request_id, message.attempt) is not None:
            lent: Attributes = {"lent_blocks": len(message.block_ids)}
            self.book.say(message.request_id, "fetch", lent)
            if not message.block_ids:
                self.book.end(message.request_id, "fetch", self.now_s)

    def _loads(self, effect: m.LoadBlocks) -> None:
        said: Attributes = {"asked_blocks": len(effect.local_blocks)}
        self._pull(effect.pull_id, said)

    def _reads(self, effect: m.PullBlocks) -> None:
        blocks = len(effect.local_blocks)
        said: Attributes = {
            "peer": effect.peer,
            "blocks": blocks,
            "bytes": blocks * self._block_bytes,
        }
        request_id = self._pull(effect.pull_id, said)
        if "@" not in effect.pull_id:
            self._hands_over(request_id, effect.peer)

    def _pull(self, pull_id: str, said: Attributes) -> RequestId:
        request_id, attempt = _key(pull_id.rpartition("/")[0])
        self._pulls[pull_id] = _Pull(request_id, attempt, self.now_s, said)
        if len(self._pulls) > PULLS_MAX:
            self._pulls.popitem(last=False)
        return request_id

    def _pulled(self, done: m.PullDone) -> None:
        pull = self._pulls.pop(done.pull_id, None)
        if pull is None or self._current(pull.request_id, pull.attempt) is None:
            return
        request_id, _, begin_s, said = pull
        if done.error is not None:
            said["error.type"] = done.error
        if "peer" not in said:  # of the tiers
            said["blocks"] = len(done.digests)
            self.book.add(request_id, "load", begin_s, self.now_s, "queued", said)
            return
        said["transport"] = done.transport
        under = "fetch" if "@" in done.pull_id else "hand-over"
        self.book.add(request_id, "read", begin_s, self.now_s, under, said)
        if done.error is None:
            self.book.say(request_id, under, {"transport": done.transport})
            self._count_up(request_id, under, {name: said[name] for name in ("blocks", "bytes")})

    def _count_up(self, request_id: RequestId, name: str, more: Attributes) -> None:
        """Add to what was said about an open span."""
        for key, value in more.items():
            before = self.book.said(request_id, name, key) or 0
            self.book.say(request_id, name, {key: int(before) + int(value)})

    # --- Hand-overs -------------------------------------------------------------------------------

    def _hands_over(self, request_id: RequestId, peer: NodeId) -> None:
        self.book.begin(request_id, "hand-over", self.now_s, "decode", {"peer": peer})

    def _announces(self, to: NodeId, message: KvReady) -> None:
        """With the first token the work of the worker that computed is over."""
        job = self._current(message.request_id, message.attempt)
        if job is not None and message.first_token is not None:
            said: Attributes = {"peer": to, "cached_tokens": message.cached_tokens}
            self._close(message.request_id, said)

    def _announced(self, source: NodeId, message: KvReady) -> None:
        if self._current(message.request_id, message.attempt) is None:
            return
        self._hands_over(message.request_id, source)
        if message.first_token is not None:
            self.book.end(message.request_id, "awaits prefill", self.now_s)

    def _released(self, source: NodeId, message: Released) -> None:
        name = "fetch" if "@" in message.lease_id else "hand-over"
        request_id, attempt = _key(message.lease_id)
        if self._current(request_id, attempt) is None:
            return
        self.book.say(request_id, name, {"verified": message.ok})
        if name == "fetch":
            self.book.end(request_id, name, self.now_s)

    def _started(self, to: NodeId, message: Started) -> None:
        """Taken over; or given up, and to be computed here."""
        request_id = message.request_id
        if self._current(request_id, message.attempt) is None:
            return
        self.book.end(request_id, "awaits prefill", self.now_s)
        verified = self.book.said(request_id, "hand-over", "verified") is True
        self.book.end(request_id, "hand-over", self.now_s, {"verified": verified})
        if verified:
            self.book.begin(request_id, "generate", self.now_s, "decode")
        else:
            self._queue(request_id, {"computed_again": True})


def _key(lease_id: str) -> tuple[RequestId, int]:
    """Of `request/attempt`; of a fetch with `@reader` behind it."""
    own = lease_id.rpartition("@")[0] if "@" in lease_id else lease_id
    request_id, _, attempt = own.rpartition("/")
    return request_id, int(attempt) if attempt.isdecimal() else 0
