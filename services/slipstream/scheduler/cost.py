"""Placement by price: the pair of workers, or the one, with the least sum in seconds of

    the time to the first token: what waits there, the uncached tokens, fetching cached ones
  + what the prompt delays the streams that decode beside it
  + what the stream pays for the steps of its decode worker, and for bringing its KV there

Pairs are separable: the best worker to compute and the best to decode are found one by one, so that
64 workers cost 64 quotes and not 4,096.
"""

import math
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import NamedTuple

from slipstream.scheduler.demand import Demand, Placement
from slipstream.scheduler.ledger import Device, WorkerView
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
TIE, TIE_S = 0.02, 0.05
"""Prices closer than this, and than these seconds, are the same: then workers share what comes."""
SOURCES = 2
"""So many of the cheapest to compute are tried with all who decode: one may be hard to reach."""

_price, _price_s = itemgetter(0), attrgetter("price_s")


@dataclass(slots=True)
class Quote:
    """What it costs to compute a prompt at one worker."""

    view: WorkerView
    first_s: float
    """Until the first token."""
    alone_s: float
    """The same, if there was nothing else to do."""
    price_s: float
    """The same, and what others lose by it."""
    fetch_blocks: int
    """Leading blocks to have after a fetch; 0: none."""


class Market:
    """The prices of one moment, for one request."""

    def __init__(
        self, demand: Demand, views: Sequence[WorkerView], transfers: TransferPrices, now_s: float
    ):
        self.demand, self.now_s, self._read_s = demand, now_s, transfers.read_s
        self._least_s = transfers.least_s
        self._most_cached = max(map(demand.cached_blocks, demand.hints), default=0)
        self.holder, self.held_blocks = _holder(demand, views)
        self._whole, self._rest = demand.prompt(), demand.prompt(self.held_blocks)
        self._streams_beside = _streams_by_device(views)
        self._shared = _shared_devices(views, self._streams_beside, now_s)
        self._quotes: dict[NodeId, Quote] = {}
        self._stream_s: dict[NodeId, float] = {}

    def quote(self, view: WorkerView) -> Quote:
        known = self._quotes.get(view.node_id)
        if known is None:
            known = self._quotes[view.node_id] = self._quote(view)
        return known

    def _quote(self, view: WorkerView) -> Quote:
        prices, node_id = view.prices, view.node_id
        own = self.demand.cached_blocks(node_id)
        prompt, wait_s, fetch_blocks = self._whole, 0.0, 0
        if own:
            prompt = self.demand.prompt(own)
            if below := self.demand.lower.get(node_id, 0):
                wait_s = self._read_s(node_id, node_id, below)
        compute_s = prices.prompt_s(prompt)
        if own < self.held_blocks:
            assert self.holder is not None
            rest_s = prices.prompt_s(self._rest)
            read_s = self._read_s(node_id, self.holder, self.held_blocks - own)
            if read_s + rest_s < compute_s:
                prompt, compute_s, wait_s = self._rest, rest_s, wait_s + read_s
                fetch_blocks = self.held_blocks
        step_s, backlog_s = view.costs(self.now_s)
        if shared := self._shared.get(view.device):
            # One queue, whichever of its workers they wait at, and each in turn makes a step.
            backlog_s, step_s = shared.backlog_s, shared.round_s + (0.0 if view.streams else step_s)
        # Blocks are fetched while what came before is computed.
        first_s = (backlog_s if backlog_s > wait_s else wait_s) + compute_s
        first_s += math.ceil(prompt.tokens / view.chunk_tokens) * step_s
        lost_s = self._streams_beside[view.device] * compute_s
        price_s = first_s + DELAY_WEIGHT * lost_s
        return Quote(view, first_s, wait_s + compute_s, price_s, fetch_blocks)

    def stream_s(self, view: WorkerView) -> float:
        """What a stream pays for decoding there."""
        known = self._stream_s.get(view.node_id)
        if known is None:
            context = view.context_tokens + self.demand.num_tokens
            step_s = view.prices.step_s(len(view.streams) + 1, context)
            if shared := self._shared.get(view.device):  # others' turns come between its steps
                step_s += shared.round_s - (view.costs(self.now_s)[0] if view.streams else 0.0)
            known = self._stream_s[view.node_id] = STREAM_STEPS * step_s
        return known

    def handover_s(self, source: WorkerView, target: WorkerView) -> float:
        """What is left of the transfer when the prompt is computed: chunks before the last one
        travel meanwhile."""
        missing = self.demand.num_blocks - self.demand.cached_blocks(target.node_id)
        chunk = source.chunk_tokens // BLOCK_TOKENS
        return self._read_s(target.node_id, source.node_id, min(missing, chunk))

    def _least_handover_s(self, source: WorkerView) -> float:
        """To whoever has most of it, by the best transport that is known."""
        missing = self.demand.num_blocks - self._most_cached
        return self._least_s(min(missing, source.chunk_tokens // BLOCK_TOKENS))

    def alone(self, hosts: Sequence[WorkerView]) -> tuple[float, Placement] | None:
        """A worker that does both as cheaply as any, and the least price."""
        if not hosts:
            return None
        priced = [(self.quote(view).price_s + self.stream_s(view), view) for view in hosts]
        _, view = self._best(priced)
        return min(map(_price, priced)), self._placement(self.quote(view), None)

    def apart(
        self, sources: Sequence[WorkerView], hosts: Sequence[WorkerView], limit_s: float = math.inf
    ) -> tuple[float, Placement] | None:
        """The cheapest pair, and its price, if that is below `limit_s`."""
        offers = sorted(((self.stream_s(view), view) for view in hosts), key=_price)
        best: tuple[float, Placement] | None = None
        tried = 0
        for quote in sorted(map(self.quote, sources), key=_price_s) if offers else ():
            least_s = quote.price_s + offers[0][0] + self._least_handover_s(quote.view)
            if tried == SOURCES or least_s >= limit_s:
                break
            found = self._cheapest(quote.view, offers, limit_s - quote.price_s)
            tried += found is not None
            if found is not None and quote.price_s + found[0] < limit_s:
                limit_s = quote.price_s + found[0]
                best = limit_s, self._placement(quote, found[1].node_id)
        return best

    def _cheapest(
        self, source: WorkerView, offers: Sequence[tuple[float, WorkerView]], limit_s: float
    ) -> tuple[float, WorkerView] | None:
        """Of those who could decode, cheapest steps first: with the transfer, who is it?"""
        layout, least_s = source.worker.kv_layout_id, self._least_handover_s(source)
        priced: list[tuple[float, WorkerView]] = []
        for stream_s, view in offers:
            if stream_s + least_s > limit_s:
                break  # and all that follow, whatever their transfer costs
            if view is not source and view.worker.kv_layout_id == layout:
                price_s = stream_s + self.handover_s(source, view)
                limit_s = min(limit_s, _tied(price_s))
                priced.append((price_s, view))
        return self._best(priced) if priced else None

    def _best(self, priced: Sequence[tuple[float, WorkerView]]) -> tuple[float, WorkerView]:
        """The least price; among equals, who has least to do, then as the name falls. Of one
        device's workers the one with most streams: together they read the weights once."""
        limit = _tied(min(map(_price, priced)))
        near = [each for each in priced if each[0] <= limit]
        if len(near) == 1:
            return near[0]
        name = zlib.crc32(self.demand.request_id.encode())

        def to_do(each: tuple[float, WorkerView]) -> tuple[int, int, int]:
            view = each[1]
            shared = self._shared.get(view.device)
            held, streams = (shared.held, len(view.streams)) if shared else (len(view.held), 0)
            return held, -streams, zlib.crc32(view.node_id.encode(), name)

        return min(near, key=to_do)

    def _placement(self, quote: Quote, decode: NodeId | None) -> Placement:
        node_id = quote.view.node_id
        return Placement(
            decode=decode or node_id,
            prefill=node_id if decode else None,
            holder=self.holder if quote.fetch_blocks else None,
            holder_blocks=quote.fetch_blocks,
            ttft_s=quote.first_s,
            alone_s=quote.alone_s,
        )


def _holder(demand: Demand, views: Sequence[WorkerView]) -> tuple[NodeId | None, int]:
    """Who is said to have most of the prompt; among equals, who has least to do."""
    holders = [view for view in views if view.node_id in demand.hints]
    if not holders:
        return None, 0
    best = max(holders, key=lambda v: (demand.lendable_blocks(v.node_id), -len(v.held)))
    blocks = demand.lendable_blocks(best.node_id)
    return (best.node_id, blocks) if blocks else (None, 0)


def _tied(price_s: float) -> float:
    return min(price_s * (1.0 + TIE), price_s + TIE_S)


def _streams_by_device(views: Sequence[WorkerView]) -> dict[Device, int]:
    found: dict[Device, int] = {}
    for view in views:
        found[view.device] = found.get(view.device, 0) + len(view.streams)
    return found


class _Shared(NamedTuple):
    """What workers that compete for one device have to do together."""

    round_s: float
    """A step of each that has streams."""
    backlog_s: float
    """Until all prompts that wait are computed."""
    held: int
    """Requests."""


def _shared_devices(
    views: Sequence[WorkerView], devices: Collection[Device], now_s: float
) -> dict[Device, _Shared]:
    """Of all `devices` those that several workers have."""
    if len(devices) == len(views):
        return {}
    workers: dict[Device, list[WorkerView]] = {}
    for view in views:
        workers.setdefault(view.device, []).append(view)
    found = {}
    for device, together in workers.items():
        if len(together) > 1:
            costs = [(view, *view.costs(now_s)) for view in together]
            round_s = sum(step_s for view, step_s, _ in costs if view.streams)
            backlog_s = sum(backlog_s for _, _, backlog_s in costs)
            found[device] = _Shared(round_s, backlog_s, sum(len(view.held) for view in together))
    return found
