"""What a worker's streams have said, kept until their tokenizers have surely heard it."""

from dataclasses import dataclass

from slipstream.core.job import Job
from slipstream.core.machine import Effect, Send
from slipstream.messages import TokensOut, TokenSpan
from slipstream.types import NodeId, RequestId

REPEAT_S = 2.0


@dataclass(slots=True, eq=False)
class _Ended:
    job: Job
    until_s: float
    repeat_s: float


class TokenLog:
    """Collects one step's tokens per tokenizer; says again what a lost session swallowed."""

    def __init__(self, keep_s: float, ended_max: int = 16_384):
        self.keep_s, self.ended_max = keep_s, ended_max
        self.ended: dict[RequestId, _Ended] = {}
        self._staged: dict[NodeId, list[TokenSpan]] = {}

    def stage(self, job: Job) -> None:
        """Tokens made since the last call go out with the next `flush`."""
        self._staged.setdefault(job.tokenizer, []).append(job.span(job.sent))
        job.sent = job.num_output - job.num_accepted

    def end(self, job: Job, now_s: float) -> None:
        """The job is gone, its tokens stay until `acknowledge`."""
        self.ended[job.request_id] = _Ended(job, now_s + self.keep_s, now_s + REPEAT_S)

    def acknowledge(self, request_id: RequestId, attempt: int) -> None:
        """The tokenizer has the end of this attempt, or wants nothing of it."""
        ended = self.ended.get(request_id)
        if ended is not None and ended.job.attempt <= attempt:
            del self.ended[request_id]

    def tick(self, now_s: float) -> list[Job]:
        """Says every end again that nobody has acknowledged; the jobs that are given up."""
        over = [e.job for e in self.ended.values() if e.until_s <= now_s]
        over += [e.job for e in list(self.ended.values())[: -self.ended_max]]
        for ended in self.ended.values():
            if ended.repeat_s <= now_s:
                ended.repeat_s = now_s + REPEAT_S
                self.repeat(ended.job, 0)
        return over

    def flush(self) -> list[Effect]:
        """One message for each tokenizer that has something to hear."""
        staged, self._staged = self._staged, {}
        return [Send(tokenizer, TokensOut(spans=spans)) for tokenizer, spans in staged.items()]

    def repeat(self, job: Job, position: int) -> None:
        """Say the output from `position` on once more, as far as it was said at all."""
        start = max(0, position - job.num_accepted)
        if start < job.sent or (start == job.sent and job.finish_reason is not None):
            self._staged.setdefault(job.tokenizer, []).append(job.span(start))
            job.sent = job.num_output - job.num_accepted
