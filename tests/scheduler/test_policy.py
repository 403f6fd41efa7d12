"""Where a request runs: tables of small worlds, and drawn ones."""

import random
from collections import Counter
from itertools import permutations

import msgspec
import pytest

from scheduler.rig import node
from slipstream.core.step_model import Prompt
from slipstream.messages import StepSample, TransferSample
from slipstream.scheduler.cost import HYSTERESIS, STREAM_STEPS, TIE, Market
from slipstream.scheduler.demand import Demand, Placement
from slipstream.scheduler.ledger import Ledger, WorkerView
from slipstream.scheduler.policy import Disaggregation, Policy, Rules, place
from slipstream.scheduler.prices import StepPrices, TransferPrices

P0, P1, D0, D1 = "prefill-0", "prefill-1", "decode-0", "decode-1"
OTHER = "fake/bfloat16/l1"
POLICIES: list[Policy] = ["cost", "prefix", "load", "random", "round-robin"]


def view(
    node_id: str, held: int = 0, queued: int = 0, blocks: int = 0, streams: int = 0, **info: object
) -> WorkerView:
    """A worker that holds `held` requests with `blocks` blocks, has prompts of `queued` tokens to
    compute and decodes `streams`."""
    device = str(info.pop("device", node_id))
    known = node(node_id, **info)
    assert known.worker is not None
    made = WorkerView(known, known.worker, StepPrices())
    made.worker = msgspec.structs.replace(known.worker, device=device)
    made.__post_init__()
    for number in range(max(held, streams, int(queued > 0))):
        made.give(f"{node_id}/{number}", blocks if number == 0 else 0)
    for number in range(streams):
        made.give_stream(f"{node_id}/{number}", 100)
    if queued:
        made.give_prompt(f"{node_id}/0", Prompt.of(0, queued), 0.0)
    return made


def demand(num_tokens: int = 100, **hints: int) -> Demand:
    """`prefill_0=4`: it is said to hold four blocks of the prompt."""
    named = {name.replace("_", "-"): count for name, count in hints.items()}
    return Demand("r", num_tokens, num_tokens // 16 + 1, named)


def placed(
    wanted: Demand,
    views: list[WorkerView],
    mode: Disaggregation,
    policy: Policy = "cost",
    turn: int = 0,
) -> Placement | None:
    return place(wanted, views, TransferPrices(), Rules(policy, mode), turn, 0.0)


def where(placement: Placement | None) -> tuple[str | None, str] | None:
    return None if placement is None else (placement.prefill, placement.decode)


# --- Who is asked at all --------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("workers", "wanted", "pair"),
    [
        ([view(P0), view(D0)], demand(), (P0, D0)),
        # Room.
        ([view(P0, held=4), view(P1), view(D0)], demand(), (P1, D0)),
        ([view(P0), view(D0, 1, blocks=10), view(D1)], demand(), (P0, D1)),
        ([view(P0), view(D0, 1, blocks=10)], demand(), None),
        ([view(P0), view(D0, 1, blocks=9)], demand(), (P0, D0)),
        ([view(P0, held=4), view(D0)], demand(), None),
        ([view(P0), view(D0)], demand(999), (P0, D0)),
        # Layouts.
        ([view(P0, kv_layout_id=OTHER), view(P1), view(D0)], demand(), (P1, D0)),
        ([view(P0, kv_layout_id=OTHER), view(D0)], demand(), (None, D0)),
        # Without a prefill worker the decode workers do it all, if they can.
        ([view(D0)], demand(), (None, D0)),
        ([view(D0, prefill_budget_tokens=0)], demand(), None),
        ([view(P0, prefill_budget_tokens=0), view(D0)], demand(), (None, D0)),
        ([view(P0)], demand(), None),
        ([], demand(), None),
        # A prefill worker that decodes too is no partner of itself.
        ([view(P0, accept_decode=True)], demand(), (None, P0)),
    ],
)
def test_always_through_a_prefill_worker(
    workers: list[WorkerView], wanted: Demand, pair: tuple[str | None, str] | None, policy: Policy
) -> None:
    for order in permutations(workers):
        assert where(placed(wanted, list(order), "always", policy)) == pair


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("workers", "host"),
    [
        ([view(P0), view(D0)], D0),
        ([view(P0, accept_decode=True), view(D0, held=4)], P0),
        ([view(D0, held=4)], None),
        ([view(D0, prefill_budget_tokens=0)], None),
    ],
)
def test_never_is_one_pool(workers: list[WorkerView], host: str | None, policy: Policy) -> None:
    for order in permutations(workers):
        found = placed(demand(), list(order), "never", policy)
        assert where(found) == (None if host is None else (None, host))


def test_who_takes_nothing_new_is_not_asked() -> None:
    views = [view(P0), view(D0), view(D1)]
    views[1].taking = False
    for mode in ("auto", "always", "never"):
        found = placed(demand(), views, mode)  # type: ignore[arg-type]
        assert found is not None and found.decode == D1


# --- Prices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "wanted", "pair"),
    [
        # The shorter way to the first token.
        ([view(P0, queued=1000), view(P1), view(D0)], demand(), (P1, D0)),
        ([view(P0), view(P1), view(D0)], demand(200, prefill_1=12), (P1, D0)),
        ([view(P0), view(P1, queued=2000), view(D0)], demand(200, prefill_1=12), (P0, D0)),
        # Streams beside it lose what the prompt takes, wherever they are on that device.
        ([view(P0, streams=3), view(P1), view(D0)], demand(), (P1, D0)),
        (
            [view(P0, device="0"), view(P1), view(D0), view(D1, streams=3, device="0")],
            demand(),
            (P1, D0),
        ),
        # The decode side: who steps faster; among those, who has most of it.
        ([view(P0), view(D0), view(D1, streams=3)], demand(), (P0, D0)),
        ([view(P0), view(D0), view(D1)], demand(200, decode_1=12, prefill_0=12), (P0, D1)),
    ],
)
def test_the_cheapest_pair(
    workers: list[WorkerView], wanted: Demand, pair: tuple[str, str]
) -> None:
    for order in permutations(workers):
        assert where(placed(wanted, list(order), "always")) == pair


def test_auto_computes_where_it_decodes_until_that_harms_others() -> None:
    alone = [view(P0), view(D0)]
    assert where(placed(demand(2000), alone, "auto")) == (None, D0)
    room = {"num_blocks": 400, "max_num_seqs": 64}
    busy = [view(P0, **room), view(D0, streams=20, **room)]
    assert where(placed(demand(2000), busy, "auto")) == (P0, D0), "twenty streams would wait"
    assert where(placed(demand(2), busy, "auto")) == (None, D0), "not worth a transfer"
    cached = demand(200, decode_0=12)
    assert where(placed(cached, busy, "auto")) == (None, D0), "nearly all of it is there"
    dead = busy[1:]
    assert where(placed(demand(2000), dead, "auto")) == (None, D0), "nobody else is left"


@pytest.mark.parametrize("mode", ["auto", "never"])
def test_workers_of_one_device_are_one_queue_and_their_streams_stay_together(
    mode: Disaggregation,
) -> None:
    room = {"num_blocks": 400, "max_num_seqs": 64}
    as_one = [view(P0, device="0", **room), view(D0, device="0", streams=20, **room)]
    assert where(placed(demand(2000), as_one, mode)) == (None, D0), "nobody is spared by leaving"
    late = [view(D0, device="0", streams=20, queued=200_000, **room), view(D1, device="0", **room)]
    assert where(placed(demand(2000), late, mode)) == (None, D0), "nor when much waits"
    own = [view(D0, **room), view(D1, streams=3, **room)]
    shared = [view(D0, device="0", **room), view(D1, device="0", streams=3, **room)]
    assert where(placed(demand(), own, mode)) == (None, D0)
    assert where(placed(demand(), shared, mode)) == (None, D1), "two rounds where one would do"
    for most in (D0, D1):  # parted by want of room once, they come together again
        parted = [view(n, device="0", streams=3 + 2 * (n == most), **room) for n in (D0, D1)]
        assert where(placed(demand(), parted, mode)) == (None, most)
    waits = [view(D0, device="0", **room), view(D1, device="0", queued=3000, **room)]
    quotes = [Market(demand(), waits, TransferPrices(), 0.0).quote(each) for each in waits]
    assert quotes[0].first_s == pytest.approx(quotes[1].first_s, rel=0.05), "one queue"
    away = [view(D0, **room), waits[1]]
    quotes = [Market(demand(), away, TransferPrices(), 0.0).quote(each) for each in away]
    assert quotes[0].first_s < quotes[1].first_s / 3


def test_workers_of_one_device_have_one_price() -> None:
    """A sample of one is what the other costs; on hosts of their own they are told apart."""
    for host, same in (("h", True), ("i", False)):
        nodes = []
        for name, where_ in ((P0, "h"), (D0, host)):
            info = node(name)
            worker = msgspec.structs.replace(info.worker, device="cpu 0,1")
            nodes.append(msgspec.structs.replace(info, host=where_, worker=worker))
        ledger = Ledger()
        ledger.sync(nodes, [P0, D0])
        assert (ledger.views[P0].prices is ledger.views[D0].prices) == same


def test_who_is_cheapest_to_compute_may_be_hard_to_reach() -> None:
    views = [view(P0), view(P1, queued=200, num_blocks=400), view(D0)]
    transfers = TransferPrices()
    transfers.sync([P0, P1, D0])
    for _ in range(9):
        transfers.learn(D0, [TransferSample(P0, "bus", 30, 0.9)], 0.0)
        transfers.learn(D0, [TransferSample(P1, "shm", 30, 1e-3)], 0.0)
    found = place(demand(1000), views, transfers, Rules("cost", "always"), 0, 0.0)
    assert where(found) == (P1, D0)
    other = [view(P0, kv_layout_id=OTHER), view(P1, queued=200, num_blocks=400), view(D0)]
    assert where(placed(demand(1000), other, "always")) == (P1, D0), "the first fits nobody"


def test_a_prefix_is_fetched_where_that_is_cheaper_than_to_compute_it() -> None:
    views = [view(P0), view(P1, queued=3000, num_blocks=400), view(D0)]
    wanted = demand(2000, prefill_1=100)
    found = placed(wanted, views, "always")
    assert found is not None and found.prefill == P0, "its holder is busy"
    assert (found.holder, found.holder_blocks) == (P1, 100)
    transfers = TransferPrices()
    transfers.sync([P0, P1, D0])
    slow = [TransferSample(P1, "bus", count, 0.2 * count) for count in (1, 5, 9, 20)]
    for _ in range(5):
        transfers.learn(P0, slow, 0.0)
    found = place(wanted, views, transfers, Rules("cost", "always"), 0, 0.0)
    assert found is not None and found.holder is None, "computing is faster than such a wire"


def test_what_lies_below_a_pool_is_loaded_there_and_lent_to_nobody() -> None:
    views = [view(P0, num_blocks=400), view(P1, queued=3000, num_blocks=400), view(D0)]
    known = demand(2000, prefill_1=100)
    below = Demand("r", known.num_tokens, known.num_blocks, known.hints, {P1: 100})
    found = placed(below, views, "always")
    assert found is not None and found.holder is None
    partly = Demand("r", known.num_tokens, known.num_blocks, known.hints, {P1: 40})
    found = placed(partly, views, "always")
    assert found is not None and (found.holder, found.holder_blocks) == (P1, 60)
    transfers = TransferPrices()
    transfers.sync([P0, P1, D0])
    transfers.learn(P1, [TransferSample(P1, "tier", 100, 5.0)] * 9, 0.0)
    market = Market(below, views, transfers, 0.0)
    assert (
        market.quote(views[1]).first_s
        > Market(known, views, transfers, 0.0).quote(views[1]).first_s
    )
    assert transfers.read_s(P0, P1, 100) < 0.1, "what a disk takes says nothing of a wire"


def test_what_is_held_by_who_computes_is_not_fetched() -> None:
    found = placed(demand(2000, prefill_0=100), [view(P0), view(D0)], "always")
    assert found is not None and found.holder is None


def test_at_least_one_token_is_computed_whatever_the_index_says() -> None:
    wanted = demand(32, decode_0=999)
    assert wanted.cached_blocks(D0) == 1
    assert demand(33, decode_0=999).cached_blocks(D0) == 2


def test_equal_workers_share_what_comes_at_once() -> None:
    views = [view(f"decode-{n}") for n in range(4)]
    counts = Counter(where(placed(Demand(f"r{n}", 100, 7, {}), views, "auto")) for n in range(400))
    assert len(counts) == 4 and min(counts.values()) > 60


def _drawn(rng: random.Random) -> tuple[list[WorkerView], TransferPrices, Demand]:
    views = []
    for name in [f"prefill-{n}" for n in range(4)] + [f"decode-{n}" for n in range(4)]:
        made = view(
            name,
            queued=rng.choice((0, 0, 300, 3000)),
            streams=rng.choice((0, 1, 3)),
            num_blocks=1000,
            accept_decode=rng.random() < 0.7,
            device=rng.choice((name, "shared")),
        )
        speed = rng.choice((0.3, 1.0, 5.0))
        made.prices.learn([StepSample(512, 512 * 900, 0, 0, 0.03 * speed)] * 8, 0.0)
        views.append(made)
    hints = {v.node_id: rng.randrange(0, 100) for v in views if rng.random() < 0.5}
    tokens = rng.choice((20, 200, 2000))
    return views, TransferPrices(), Demand(f"r{rng.random()}", tokens, tokens // 16 + 1, hints)


@pytest.mark.parametrize("seed", range(60))
def test_no_pair_is_cheaper_than_the_one_that_was_chosen(seed: int) -> None:
    rng = random.Random(seed)
    views, transfers, wanted = _drawn(rng)
    rng.shuffle(views)
    market = Market(wanted, views, transfers, 0.0)
    hosts = [v for v in views if v.worker.accept_decode]
    alone = {v.node_id: market.quote(v).price_s + market.stream_s(v) for v in hosts}
    apart = {
        (s.node_id, t.node_id): market.quote(s).price_s
        + market.stream_s(t)
        + market.handover_s(s, t)
        for s in views
        for t in hosts
        if s is not t
    }
    found = place(wanted, views, transfers, Rules("cost", "auto"), 0, 0.0)
    assert found is not None
    slack = 1.0 + 2 * TIE
    if found.prefill is None:
        assert alone[found.decode] <= min(alone.values()) * slack
        assert alone[found.decode] * HYSTERESIS <= min(apart.values()) * slack
    else:
        price = apart[found.prefill, found.decode]
        assert price <= min(apart.values()) * slack
        assert price <= min(alone.values()) * HYSTERESIS * slack
    chosen = market.quote(next(v for v in views if v.node_id == found.computes))
    assert found.ttft_s == chosen.first_s > 0.0


def test_a_step_is_paid_for_by_every_token_of_the_stream() -> None:
    views = [view(D0, streams=3), view(D1)]
    market = Market(demand(), views, TransferPrices(), 0.0)
    dear, cheap = (market.stream_s(v) for v in views)
    assert dear - cheap == pytest.approx(
        STREAM_STEPS * (views[0].prices.step_s(4, 400) - views[0].prices.step_s(1, 100))
    )


# --- The others -----------------------------------------------------------------------------------


def test_policies_that_know_no_prices() -> None:
    views = [view(D0, held=3), view(D1, held=1), view("decode-2", held=2)]
    wanted = demand(100, decode_0=1, decode_2=5)
    assert where(placed(wanted, views, "never", "prefix")) == (None, "decode-2")
    assert where(placed(demand(), views, "never", "prefix")) == (None, D1), "then by load"
    assert where(placed(wanted, views, "never", "load")) == (None, D1)
    turns = [where(placed(wanted, views, "never", "round-robin", turn)) for turn in range(4)]
    assert turns == [(None, D0), (None, D1), (None, "decode-2"), (None, D0)]
    drawn = {
        where(placed(Demand(f"r{n}", 100, 7, {}), views, "never", "random")) for n in range(50)
    }
    assert len(drawn) == 3
    again = {where(placed(wanted, views, "never", "random")) for _ in range(5)}
    assert len(again) == 1, "drawn from the name: a replay draws the same"
