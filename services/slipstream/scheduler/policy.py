"""Where a request runs: a pure function of what is known about the workers.

`cost` is how the system is meant to run; the others are what it is compared with.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from slipstream.scheduler.cost import HYSTERESIS, RISK_S, Market
from slipstream.scheduler.demand import Demand, Placement
from slipstream.scheduler.ledger import WorkerView
from slipstream.scheduler.prices import TransferPrices
from slipstream.types import Role

Policy: TypeAlias = Literal["cost", "prefix", "load", "random", "round-robin"]
Disaggregation: TypeAlias = Literal["auto", "always", "never"]

_Order: TypeAlias = Callable[[Sequence[WorkerView]], WorkerView]


@dataclass(slots=True, frozen=True)
class Rules:
    policy: Policy = "cost"
    disaggregation: Disaggregation = "auto"


def place(
    demand: Demand,
    views: Sequence[WorkerView],
    transfers: TransferPrices,
    rules: Rules,
    turn: int,
    now_s: float,
    others: Sequence[WorkerView] = (),
) -> Placement | None:
    """The pair, or the one worker, for this request; None: nobody has room.

    `views`: workers of its model; `others`, of other models, count where they share a device with
    these. `turn`: how many were placed before. `always`: through a prefill worker as long as one
    lives; when none does, the decode workers do it all. `auto` leaves it to the prices; the other
    policies have none, and do as with `always`.
    """
    room = [view for view in views if view.taking and view.admits(demand.num_blocks)]
    free = [view for view in room if view.worker.accept_decode]
    alone = [view for view in free if view.prefills]
    if rules.policy == "cost":
        market = Market(demand, [*views, *others] if others else views, transfers, now_s)
        if rules.disaggregation == "auto":
            sources = [view for view in room if view.prefills]
            found = market.alone(alone)
            return _placed(market.apart(sources, free, _worth(found)) or found)
    if rules.disaggregation != "never":
        taking = [view for view in views if view.taking]
        hosts = [view for view in taking if view.worker.accept_decode]
        if any(_is_partner(view, hosts) for view in taking):
            sources = [view for view in room if _is_partner(view, hosts)]
            if rules.policy == "cost":
                return _placed(market.apart(sources, free))
            return _pair(sources, free, _order(rules.policy, demand, turn))
    if not alone:
        return None
    if rules.policy == "cost":
        return _placed(market.alone(alone))
    return Placement(_order(rules.policy, demand, turn)(alone).node_id)


def _is_partner(view: WorkerView, hosts: Sequence[WorkerView]) -> bool:
    """Whether there is somebody to compute prompts for."""
    return (
        view.node.role is Role.PREFILL
        and view.prefills
        and any(host is not view and _fit(view, host) for host in hosts)
    )


def _fit(source: WorkerView, target: WorkerView) -> bool:
    return source.worker.kv_layout_id == target.worker.kv_layout_id


def _placed(found: tuple[float, Placement] | None) -> Placement | None:
    return found and found[1]


def _worth(alone: tuple[float, Placement] | None) -> float:
    """What a pair has to cost less than."""
    return math.inf if alone is None else max(alone[0] * HYSTERESIS, alone[0] - RISK_S)


def _pair(
    sources: Sequence[WorkerView], hosts: Sequence[WorkerView], order: _Order
) -> Placement | None:
    pairs = {
        source.node_id: others
        for source in sources
        if (others := [host for host in hosts if host is not source and _fit(source, host)])
    }
    if not pairs:
        return None
    source = order([view for view in sources if view.node_id in pairs])
    return Placement(order(pairs[source.node_id]).node_id, source.node_id)


def _order(policy: Policy, demand: Demand, turn: int) -> _Order:
    """How a policy that knows no prices chooses among workers with room."""

    def load(view: WorkerView) -> tuple[int, int]:
        return len(view.held), view.prompt_tokens

    def chance(view: WorkerView) -> int:
        return zlib.crc32(f"{demand.request_id} {view.node_id}".encode())

    def prefix(view: WorkerView) -> tuple[int, int, int]:
        return (-demand.cached_blocks(view.node_id), *load(view))

    match policy:
        case "prefix":
            return lambda views: min(views, key=prefix)
        case "load":
            return lambda views: min(views, key=load)
        case "random":
            return lambda views: min(views, key=chance)
        case _:
            return lambda views: sorted(views, key=lambda v: v.node_id)[turn % len(views)]
