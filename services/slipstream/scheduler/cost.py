"""Placement by price: the pair of workers, or the one, with the least sum in seconds of

    the time to the first token: what waits there, the uncached tokens, fetching cached ones
  + what the prompt delays the streams that decode beside it
  + what the stream pays for the steps of its decode worker, and for bringing its KV there

Pairs are separable: the best worker to compute and the best to decode are found one by one, so that
64 workers cost 64 quotes and not 4,096.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from slipstream.scheduler.demand import Demand, Placement
from slipstream.scheduler.ledger import WorkerView
from slipstream.scheduler.prices import TransferPrices
from slipstream.types import BLOCK_TOKENS, NodeId

DELAY_WEIGHT = 1.0
"""Of a second that running streams lose, to one that the new one waits."""
STREAM_STEPS = 32
"""Steps of its decode worker that a stream is taken to pay for."""
HYSTERESIS = 0.9
"""Apart must be this much cheaper than alone: a transfer has its risks."""
TIE = 0.02
"""Prices closer than this are the same: then workers share what comes."""


@dataclass(slots=True)
class Quote:
    """What it costs to compute a prompt at one worker."""

    view: WorkerView
    first_s: float
    """Until the first token."""
    price_s: float
    """The same, and what others lose by it."""
    fetch_blocks: int
    """Leading blocks to have after a fetch; 0: none."""


class Market:
    """The prices of one moment, for one request."""

    def __init__(
        self, demand: Demand, views: Sequence[WorkerView], transfers: TransferPrices, now_s: float
    ):
        self.demand, self.views = demand, views
        self.transfers, self.now_s = transfers, now_s
        self.holder, self.held_blocks = _holder(demand, views)
        self._streams_beside = _streams_by_device(views)

    def quote(self, view: WorkerView) -> Quote:
        demand, prices = self.demand, view.prices
        own = demand.cached_blocks(view.node_id)
        prompt = demand.prompt(own)
        compute_s = prices.prompt_s(prompt.cached_tokens, prompt.tokens)
        wait_s, fetch_blocks = 0.0, 0
        if self.holder is not None and self.held_blocks > own:
            rest = demand.prompt(self.held_blocks)
            rest_s = prices.prompt_s(rest.cached_tokens, rest.tokens)
            missing = self.held_blocks - own
            read_s = self.transfers.read_s(view.node_id, self.holder, missing)
            if read_s + rest_s < compute_s:
                prompt, compute_s, wait_s = rest, rest_s, read_s
                fetch_blocks = self.held_blocks
        steps_s = view.chunks(prompt.tokens) * view.step_s()
        # Blocks are fetched while what came before is computed.
        first_s = max(wait_s, view.backlog_s(self.now_s)) + compute_s + steps_s
        beside = self._streams_beside.get(_device(view), 0)
        price_s = first_s + DELAY_WEIGHT * beside * compute_s
        return Quote(view, first_s, price_s, fetch_blocks)

    def stream_s(self, view: WorkerView) -> float:
        """What a stream pays for decoding there."""
        context = view.context_tokens + self.demand.num_tokens
        return STREAM_STEPS * view.prices.step_s(len(view.streams) + 1, context)

    def handover_s(self, source: WorkerView, target: WorkerView) -> float:
        """What is left of the transfer when the prompt is computed: chunks before the last one
        travel meanwhile."""
        demand = self.demand
        missing = demand.num_blocks - demand.cached_blocks(target.node_id)
        chunk = max(1, source.worker.prefill_budget_tokens // BLOCK_TOKENS)
        return self.transfers.read_s(target.node_id, source.node_id, min(missing, chunk))

    def best(self, views: Sequence[WorkerView], prices: Sequence[float]) -> int:
        """Index of the least price; among equals, who has least to do, then as the name falls."""
        limit = min(prices) * (1.0 + TIE)
        near = [index for index, price in enumerate(prices) if price <= limit]
        if len(near) == 1:
            return near[0]
        name = zlib.crc32(self.demand.request_id.encode())
        return min(
            near, key=lambda i: (len(views[i].held), zlib.crc32(views[i].node_id.encode(), name))
        )

    def alone(self, hosts: Sequence[WorkerView]) -> tuple[float, Placement] | None:
        """The cheapest worker that does both, and its price."""
        if not hosts:
            return None
        quotes = [self.quote(view) for view in hosts]
        prices = [q.price_s + self.stream_s(q.view) for q in quotes]
        index = self.best(hosts, prices)
        return prices[index], self._placement(quotes[index], None)

    def apart(
        self, sources: Sequence[WorkerView], hosts: Sequence[WorkerView]
    ) -> tuple[float, Placement] | None:
        """The cheapest pair, and its price."""
        quotes = [self.quote(view) for view in sources]
        ranked = [quotes[i] for i in _least(2, [q.price_s for q in quotes])]
        best: tuple[float, Placement] | None = None
        for quote in ranked:
            source = quote.view
            others = [
                view
                for view in hosts
                if view is not source and view.worker.kv_layout_id == source.worker.kv_layout_id
            ]
            if not others:
                continue
            prices = [self.stream_s(view) + self.handover_s(source, view) for view in others]
            index = self.best(others, prices)
            price = quote.price_s + prices[index]
            if best is None or price < best[0]:
                best = price, self._placement(quote, others[index].node_id)
        return best

    def _placement(self, quote: Quote, decode: NodeId | None) -> Placement:
        node_id = quote.view.node_id
        return Placement(
            decode=decode or node_id,
            prefill=node_id if decode else None,
            holder=self.holder if quote.fetch_blocks else None,
            holder_blocks=quote.fetch_blocks,
            ttft_s=quote.first_s,
        )


def _holder(demand: Demand, views: Sequence[WorkerView]) -> tuple[NodeId | None, int]:
    """Who is said to have most of the prompt; among equals, who has least to do."""
    best = max(views, key=lambda v: (demand.cached_blocks(v.node_id), -len(v.held)), default=None)
    blocks = 0 if best is None else demand.cached_blocks(best.node_id)
    return (best.node_id, blocks) if best is not None and blocks else (None, 0)


def _device(view: WorkerView) -> tuple[str, str]:
    """Who names the same competes for it."""
    return (view.node.host, view.worker.device) if view.worker.device else (view.node_id, "")


def _streams_by_device(views: Sequence[WorkerView]) -> dict[tuple[str, str], int]:
    found: dict[tuple[str, str], int] = {}
    for view in views:
        device = _device(view)
        found[device] = found.get(device, 0) + len(view.streams)
    return found


def _least(count: int, prices: Sequence[float]) -> list[int]:
    return sorted(range(len(prices)), key=prices.__getitem__)[:count]
