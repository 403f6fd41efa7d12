"""Where a request runs, as a table of worlds."""

from itertools import permutations

import pytest

from scheduler.rig import worker
from slipstream.scheduler.policy import RUNNING_TOKENS, Demand, Placement, WorkerView, place
from slipstream.types import Role


def view(
    node_id: str, assigned: int = 0, queued: int = 0, blocks: int = 0, **info: object
) -> WorkerView:
    role = node_id.partition("-")[0]
    return WorkerView(node_id, Role(role), worker(role, **info), assigned, queued, blocks)


P0, P1, D0, D1 = "prefill-0", "prefill-1", "decode-0", "decode-1"
ALL = [view(P0), view(P1), view(D0), view(D1)]
OTHER = "fake/bfloat16/l1"


def demand(num_tokens: int = 100, **hints: int) -> Demand:
    """`prefill_0=4`: it is said to hold four blocks of the prompt."""
    named = {name.replace("_", "-"): count for name, count in hints.items()}
    return Demand(num_tokens, num_tokens // 16 + 1, named)


@pytest.mark.parametrize(
    ("workers", "wanted", "placement"),
    [
        (ALL, demand(), Placement(D0, P0)),
        ([view(P0, queued=1), view(P1), view(D0)], demand(), Placement(D0, P1)),
        ([view(P0), view(D0, assigned=1), view(D1)], demand(), Placement(D1, P0)),
        # A hint is worth the tokens it saves, no more: 4 blocks are 64 tokens.
        ([view(P0), view(P1, queued=63), view(D0)], demand(prefill_1=4), Placement(D0, P1)),
        ([view(P0), view(P1, queued=65), view(D0)], demand(prefill_1=4), Placement(D0, P0)),
        ([view(P0), view(P1), view(D0)], demand(prefill_1=1), Placement(D0, P1)),
        # Streams beside it count too.
        (
            [view(P0, assigned=1), view(P1, queued=RUNNING_TOKENS - 1), view(D0)],
            demand(),
            Placement(D0, P1),
        ),
        # The decode side: fewest streams, then who has most of it.
        ([view(P0), view(D0), view(D1)], demand(decode_1=1), Placement(D1, P0)),
        ([view(P0), view(D0), view(D1, assigned=1)], demand(decode_1=6), Placement(D0, P0)),
        # Room.
        ([view(P0, assigned=4), view(P1, queued=999), view(D0)], demand(), Placement(D0, P1)),
        ([view(P0), view(D0, 1, blocks=10), view(D1, 2)], demand(), Placement(D1, P0)),
        ([view(P0), view(D0, 1, blocks=10)], demand(), None),
        ([view(P0), view(D0, 1, blocks=9)], demand(), Placement(D0, P0)),
        ([view(P0, assigned=4), view(D0)], demand(), None),
        ([view(P0), view(D0)], demand(999), Placement(D0, P0)),
        # Layouts.
        ([view(P0, kv_layout_id=OTHER), view(P1), view(D0)], demand(), Placement(D0, P1)),
        ([view(P0, kv_layout_id=OTHER), view(D0)], demand(), Placement(D0)),
        # Without a prefill worker the decode workers do it all, if they can.
        ([view(D0, assigned=1), view(D1)], demand(), Placement(D1)),
        ([view(D0, prefill_budget_tokens=0)], demand(), None),
        ([view(P0, prefill_budget_tokens=0), view(D0)], demand(), Placement(D0)),
        ([view(P0)], demand(), None),
        ([], demand(), None),
        # A prefill worker that decodes too is no partner of itself.
        ([view(P0, accept_decode=True)], demand(), Placement(P0)),
        ([view(P0, accept_decode=True), view(P1)], demand(), Placement(P0, P1)),
    ],
)
def test_disaggregated(
    workers: list[WorkerView], wanted: Demand, placement: Placement | None
) -> None:
    for order in permutations(workers):
        assert place(wanted, order, disaggregated=True) == placement


@pytest.mark.parametrize(
    ("workers", "wanted", "placement"),
    [
        (ALL, demand(), Placement(D0)),
        ([view(D0, assigned=1), view(D1)], demand(), Placement(D1)),
        ([view(D0, assigned=1), view(D1)], demand(decode_0=3), Placement(D0)),
        ([view(D0, assigned=2), view(D1)], demand(decode_0=3), Placement(D1)),
        ([view(P0, accept_decode=True), view(D0, assigned=1)], demand(), Placement(P0)),
        ([view(D0, assigned=4)], demand(), None),
    ],
)
def test_each_worker_does_both(
    workers: list[WorkerView], wanted: Demand, placement: Placement | None
) -> None:
    for order in permutations(workers):
        assert place(wanted, order, disaggregated=False) == placement


def test_at_least_one_token_is_computed_whatever_the_index_says() -> None:
    assert demand(20, decode_0=999).uncached(D0) == 1
