"""What is to be placed, and where it went."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from slipstream.core.step_model import Prompt
from slipstream.types import BLOCK_TOKENS, NodeId, RequestId


@dataclass(slots=True, frozen=True)
class Demand:
    """What placement knows about a request."""

    request_id: RequestId
    num_tokens: int
    num_blocks: int
    hints: Mapping[NodeId, int] = field(default_factory=dict)
    """Worker -> leading blocks that it is said to hold."""
    lower: Mapping[NodeId, int] = field(default_factory=dict)
    """How many of them lie in a tier below its pool: it loads them, and lends none of them."""

    def lendable_blocks(self, node_id: NodeId) -> int:
        """What another worker could fetch from there: what is evicted first is the tail."""
        known = self.hints.get(node_id, 0) - self.lower.get(node_id, 0)
        return max(0, min(known, (self.num_tokens - 1) // BLOCK_TOKENS))

    def cached_blocks(self, node_id: NodeId) -> int:
        """Those of use: the last token is computed in any case, for its logits."""
        known = self.hints.get(node_id, 0)
        return min(known, (self.num_tokens - 1) // BLOCK_TOKENS) if known else 0

    def prompt(self, cached_blocks: int = 0) -> Prompt:
        cached = cached_blocks * BLOCK_TOKENS
        return Prompt.of(cached, self.num_tokens - cached)


@dataclass(slots=True, frozen=True)
class Placement:
    decode: NodeId
    prefill: NodeId | None = None
    """None: the decode worker computes the prompt itself."""
    holder: NodeId | None = None
    """From whom the computing worker fetches up to `holder_blocks` leading blocks first."""
    holder_blocks: int = 0
    ttft_s: float = 0.0
    """Predicted, from now on."""
    alone_s: float = 0.0
    """The same, if there was nothing else to do there."""

    @property
    def computes(self) -> NodeId:
        return self.prefill or self.decode
