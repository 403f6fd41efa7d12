"""What was decided for each request and what came of it: for people, and to see how good it is."""

from collections import OrderedDict, deque
from statistics import median

import msgspec

from slipstream.messages import FirstToken
from slipstream.scheduler.demand import Demand, Placement
from slipstream.types import BLOCK_TOKENS, NodeId, RequestId

KEPT = 4096
ERRORS_MAX = 64
"""Of the latest first tokens: what the median error is taken over."""


class Decision(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One attempt of one request. Times in seconds."""

    request_id: RequestId
    attempt: int
    policy: str
    decode: NodeId
    prefill: NodeId | None = None
    holder: NodeId | None = None
    prompt_tokens: int
    claimed_tokens: int
    """That the computing worker was said to have, fetched ones included."""
    waited_s: float
    """In the queue, from the submission on."""
    predicted_ttft_s: float
    """From the placement on, as is the actual one."""
    actual_ttft_s: float | None = None
    cached_tokens: int | None = None
    fetched_blocks: int = 0
    migrations: int = 0

    @property
    def header(self) -> str:
        """In short, as clients see it: said before the first token, so without what came of it."""
        parts = {
            "policy": self.policy,
            "ttft_ms": f"{self.predicted_ttft_s * 1e3:.1f}" if self.predicted_ttft_s else None,
            "waited_ms": f"{self.waited_s * 1e3:.1f}",
            "claimed": self.claimed_tokens,
            "holder": self.holder,
            "migrations": self.migrations or None,
        }
        return "; ".join(f"{name}={value}" for name, value in parts.items() if value is not None)


class Decisions:
    """The latest ones. Owns nothing that placement depends on."""

    def __init__(self) -> None:
        self._of: OrderedDict[RequestId, tuple[Decision, float]] = OrderedDict()
        self._errors: deque[float] = deque(maxlen=ERRORS_MAX)

    def note(self, demand: Demand, placement: Placement, now_s: float, **more: object) -> Decision:
        """`more`: the fields that only the request knows."""
        own = demand.cached_blocks(placement.computes)
        decision = msgspec.convert(
            {
                "request_id": demand.request_id,
                "decode": placement.decode,
                "prefill": placement.prefill,
                "holder": placement.holder,
                "prompt_tokens": demand.num_tokens,
                "claimed_tokens": max(own, placement.holder_blocks) * BLOCK_TOKENS,
                "predicted_ttft_s": placement.ttft_s,
                **more,
            },
            Decision,
        )
        self._of[demand.request_id] = decision, now_s
        self._of.move_to_end(demand.request_id)
        if len(self._of) > KEPT:
            self._of.popitem(last=False)
        return decision

    def first_token(self, message: FirstToken, now_s: float) -> float | None:
        """How long after its prediction it came; None: there was none."""
        decision, placed_s = self._of.get(message.request_id, (None, 0.0))
        if decision is None or decision.attempt != message.attempt:
            return None
        decision.actual_ttft_s = now_s - placed_s
        decision.cached_tokens = message.cached_tokens
        decision.fetched_blocks = message.fetched_blocks
        if not (decision.predicted_ttft_s > 0.0 and decision.actual_ttft_s > 0.0):
            return None
        late_s = decision.actual_ttft_s - decision.predicted_ttft_s
        self._errors.append(abs(late_s) / decision.actual_ttft_s)
        return late_s

    def of(self, request_id: RequestId) -> Decision | None:
        """The last one of this request, if it is kept."""
        return self._of.get(request_id, (None, 0.0))[0]

    def latest(self) -> list[tuple[Decision, float]]:
        """With when each was made, oldest first."""
        return list(self._of.values())

    def median_error(self) -> float:
        """Of the predicted time to the first token, relative to the actual one; 0 without any."""
        return median(self._errors) if self._errors else 0.0
