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

DELAY_WEIGHT = 0.25
"""Of a second that running streams lose, to one that the new one waits."""
STREAM_STEPS = 32
"""Steps of its decode worker that a stream is taken to pay for."""
HYSTERESIS = 0.9
"""Apart must be this much cheaper than alone: a transfer has its risks."""
RISK_S = 0.1
"""But no more than this: its risks do not grow with what the prompt costs to compute."""
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
        self._quotes: dict[NodeId, Quote] = {}

    def quote(self, view: WorkerView) -> Quote:
        known = self._quotes.get(view.node_id)
        if known is None:
            known = self._quotes[view.node_id] = self._quote(view)
        return known

    def _quote(self, view: WorkerView) -> Quote:
        demand, prices = self.demand, view.prices
        own = demand.cached_blocks(view.node_id)
        tokens, wait_s, fetch_blocks = demand.num_tokens - own * BLOCK_TOKENS, 0.0, 0
        below = demand.lower.get(view.node_id, 0)
        if below:
            wait_s = self._read_s(view.node_id, view.node_id, below)
        compute_s = prices.prompt_s(own * BLOCK_TOKENS, tokens)
        if self.holder is not None and self.held_blocks > own:
            rest = demand.num_tokens - self.held_blocks * BLOCK_TOKENS
            rest_s = prices.prompt_s(self.held_blocks * BLOCK_TOKENS, rest)
            read_s = self._read_s(view.node_id, self.holder, self.held_blocks - own)
            if read_s + rest_s < compute_s:
                tokens, compute_s, wait_s = rest, rest_s, wait_s + read_s
                fetch_blocks = self.held_blocks
        # Blocks are fetched while what came before is computed.
        first_s = max(wait_s, view.backlog_s(self.now_s)) + compute_s
        first_s += view.chunks(tokens) * view.step_s()
        beside = self._streams_beside[view.device]
        return Quote(view, first_s, first_s + DELAY_WEIGHT * beside * compute_s, fetch_blocks)

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
        return self._read_s(target.node_id, source.node_id, min(missing, chunk))

    def _read_s(self, reader: NodeId, source: NodeId, num_blocks: int) -> float:
        return self.transfers.read_s(reader, source, num_blocks, self.now_s)

    def alone(self, hosts: Sequence[WorkerView]) -> tuple[float, Placement] | None:
        """The cheapest worker that does both, and its price."""
        if not hosts:
            return None
        priced = [(self.quote(view).price_s + self.stream_s(view), view) for view in hosts]
        price_s, view = self._best(priced)
        return price_s, self._placement(self.quote(view), None)

    def apart(
        self, sources: Sequence[WorkerView], hosts: Sequence[WorkerView]
    ) -> tuple[float, Placement] | None:
        """The cheapest pair, and its price."""
        offers = sorted((self.stream_s(view), index) for index, view in enumerate(hosts))
        quotes = sorted(map(self.quote, sources), key=lambda quote: quote.price_s)
        best: tuple[float, Placement] | None = None
        # The second one counts where the first is also the best to decode.
        for quote in quotes[:2]:
            source = quote.view
            found = self._cheapest(source, [(price, hosts[index]) for price, index in offers])
            if found is not None and (best is None or quote.price_s + found[0] < best[0]):
                placement = self._placement(quote, found[1].node_id)
                best = quote.price_s + found[0], placement
        return best

    def _cheapest(
        self, source: WorkerView, offers: Sequence[tuple[float, WorkerView]]
    ) -> tuple[float, WorkerView] | None:
        """Of those who could decode, cheapest steps first: with the transfer, who is it?"""
        layout = source.worker.kv_layout_id
        priced: list[tuple[float, WorkerView]] = []
        limit = float("inf")
        for stream_s, view in offers:
            if stream_s > limit:
                break  # and all that follow, whatever their transfer costs
            if view is not source and view.worker.kv_layout_id == layout:
                price_s = stream_s + self.handover_s(source, view)
                limit = min(limit, price_s * (1.0 + TIE))
                priced.append((price_s, view))
        return self._best(priced) if priced else None

    def _best(self, priced: Sequence[tuple[float, WorkerView]]) -> tuple[float, WorkerView]:
        """The least price; among equals, who has least to do, then as the name falls."""
        limit = min(price for price, _ in priced) * (1.0 + TIE)
        near = [each for each in priced if each[0] <= limit]
        if len(near) == 1:
            return near[0]
        name = zlib.crc32(self.demand.request_id.encode())
        return min(
            near, key=lambda each: (len(each[1].held), zlib.crc32(each[1].node_id.encode(), name))
        )

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
    holders = [view for view in views if view.node_id in demand.hints]
    if not holders:
        return None, 0
    best = max(holders, key=lambda v: (demand.lendable_blocks(v.node_id), -len(v.held)))
    blocks = demand.lendable_blocks(best.node_id)
    return (best.node_id, blocks) if blocks else (None, 0)


def _streams_by_device(views: Sequence[WorkerView]) -> dict[tuple[str, str], int]:
    found: dict[tuple[str, str], int] = {}
    for view in views:
        found[view.device] = found.get(view.device, 0) + len(view.streams)
    return found
