"""The prefix index is a hint: it leads to a worker, and nobody waits for it."""

import pytest

from scheduler.rig import INDEX, PREFILL, WORKING, Rig
from slipstream.messages import Locate, Located, Prefill

HASHES = bytes(range(64))


def test_hints_lead_to_the_worker_that_holds_the_prefix() -> None:
    rig = Rig(*WORKING, "prefill-1", INDEX)
    rig.submit(prompt=65, hashes=HASHES)
    to, locate = rig.one(Locate)
    assert (to, locate.block_hashes, locate.kv_layout_id) == (INDEX, HASHES, "fake/float32/l1")
    assert rig.state() == "locating"
    rig.hear(INDEX, Located(request_id="r", attempt=2, blocks={}))
    assert rig.state() == "locating"
    rig.hear(INDEX, Located(request_id="r", attempt=1, blocks={"prefill-1": 4, "gone": 9}))
    to, prefill = rig.one(Prefill)
    assert (to, prefill.claimed_blocks) == ("prefill-1", 4)


def test_with_a_stride_the_end_of_each_group_stands_for_it() -> None:
    rig = Rig(*WORKING, "prefill-1", INDEX, index_stride=2)
    rig.submit(prompt=65, hashes=HASHES)
    assert rig.one(Locate)[1].block_hashes == HASHES[16:32] + HASHES[48:]
    rig.hear(INDEX, Located(request_id="r", attempt=1, blocks={"prefill-1": 2}))
    assert rig.one(Prefill)[1].claimed_blocks == 4


def test_a_silent_index_is_not_waited_for() -> None:
    rig = Rig(*WORKING, INDEX, locate_timeout_s=0.05)
    rig.submit(hashes=HASHES)
    rig.pass_time(0.04)
    assert rig.state() == "locating"
    rig.pass_time(0.02)
    assert rig.state() == "prefilling" and rig.one(Prefill)[1].claimed_blocks == 0
    rig.hear(INDEX, Located(request_id="r", attempt=1, blocks={PREFILL: 4}))
    assert rig.sent == [], "too late"


@pytest.mark.parametrize(
    ("nodes", "hashes", "settings"),
    [
        (WORKING, HASHES, {}),
        ((*WORKING, INDEX), b"", {}),
        ((*WORKING, INDEX), HASHES, {"locate_timeout_s": 0.0}),
        ((*WORKING, INDEX), HASHES[:16], {"index_stride": 2}),
    ],
    ids=["absent", "no full block", "off", "fewer blocks than the stride"],
)
def test_without_an_index_or_a_question_it_is_placed_at_once(
    nodes: tuple[str, ...], hashes: bytes, settings: dict[str, float]
) -> None:
    rig = Rig(*nodes, **settings)
    rig.submit(hashes=hashes)
    assert rig.state() == "prefilling"


def test_indexes_are_asked_in_turn() -> None:
    rig = Rig(*WORKING, INDEX, "kvindex-1")
    asked = []
    for number in range(4):
        rig.submit(f"r{number}", hashes=HASHES)
        asked.append(rig.one(Locate)[0])
    assert asked[0] != asked[1] and asked[:2] == asked[2:]


def test_tiers_are_told_apart() -> None:
    rig = Rig(*WORKING, "prefill-1", INDEX, index_stride=2)
    rig.submit(prompt=65, hashes=HASHES)
    answer = Located(request_id="r", attempt=1, blocks={"prefill-1": 2}, lower={"prefill-1": 1})
    rig.hear(INDEX, answer)
    demand = rig.machine.requests["r"].demand()
    assert (demand.cached_blocks("prefill-1"), demand.lendable_blocks("prefill-1")) == (4, 2)
