"""Who is there, and whether that is enough to serve."""

import pytest

from scheduler.rig import WORKING, node
from slipstream.core.machine import Send
from slipstream.messages import ClusterLoad, Hello, NodeInfo, Peers, WorkerLoad
from slipstream.scheduler.fleet import GONE_MAX, Fleet
from slipstream.types import Role

FOREIGN = "another/float32/l1"


def fleet_of(*nodes: NodeInfo | str) -> Fleet:
    fleet = Fleet()
    for info in nodes:
        say(fleet, node(info) if isinstance(info, str) else info)
    return fleet


def say(fleet: Fleet, info: NodeInfo) -> bool:
    return fleet.hello(info.node_id, Hello(node=info))


def peers(fleet: Fleet) -> Peers:
    """What everybody is told, the same to each."""
    sends = fleet.announce()
    told = {send.to: send.message for send in sends if isinstance(send, Send)}
    assert list(told) == sorted(fleet.nodes)
    (peers, *others) = told.values()
    assert isinstance(peers, Peers) and all(other == peers for other in others)
    return peers


NO_DECODE, NO_PROMPT, NO_TOKENIZER = (
    "no decode worker",
    "no worker that computes prompts",
    "no tokenizer",
)


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        (WORKING, ""),
        (("tokenizer-0", "decode-0"), ""),
        (("tokenizer-0", "prefill-0"), NO_DECODE),
        (("tokenizer-0", "prefill-0", node("decode-0", draining=True)), NO_DECODE),
        (("tokenizer-0", node("decode-0", prefill_budget_tokens=0)), NO_PROMPT),
        (("tokenizer-0", "prefill-0", node("decode-0", prefill_budget_tokens=0)), ""),
        (
            (
                "tokenizer-0",
                node("prefill-0", kv_layout_id="fake/bfloat16/l1"),
                node("decode-0", prefill_budget_tokens=0),
            ),
            NO_PROMPT,
        ),
        (("prefill-0", "decode-0"), NO_TOKENIZER),
        ((node("tokenizer-0", draining=True), "prefill-0", "decode-0"), NO_TOKENIZER),
        (("tokenizer-0", node("prefill-0", kv_layout_id=FOREIGN), "decode-0"), NO_DECODE),
    ],
)
def test_what_is_missing(nodes: tuple[NodeInfo | str, ...], reason: str) -> None:
    said = peers(fleet_of(*nodes))
    assert (said.reason, said.ready) == (reason, not reason)


def test_everybody_hears_of_everybody_and_of_who_is_gone() -> None:
    fleet = fleet_of(*WORKING, node("decode-1", epoch=8))
    assert {info.node_id for info in peers(fleet).nodes} == {*WORKING, "decode-1"}
    assert fleet.down("decode-1") is not None
    assert fleet.down("decode-1") is None, "known already"
    assert peers(fleet).gone == {"decode-1": 8}
    say(fleet, node("decode-1", epoch=9))
    assert peers(fleet).gone == {}


def test_only_the_first_word_of_a_session_is_news() -> None:
    fleet = Fleet()
    assert say(fleet, node("decode-0"))
    assert not say(fleet, node("decode-0", draining=True))
    assert fleet.nodes["decode-0"].draining, "but it counts"
    fleet.down("decode-0")
    assert say(fleet, node("decode-0", epoch=2))


def test_a_foreign_model_takes_no_part() -> None:
    foreign = node("decode-1", kv_layout_id=FOREIGN, num_blocks=99)
    fleet = fleet_of(*WORKING, foreign)
    assert [info.node_id for info in fleet.workers("fake")] == ["prefill-0", "decode-0"]
    assert fleet.largest_pool_blocks("fake") == 16
    assert foreign in peers(fleet).nodes, "it is told who is there, and may drain"


def test_a_model_goes_with_its_last_worker() -> None:
    fleet = fleet_of("decode-0", "decode-1")
    for name in ("decode-0", "decode-1"):
        fleet.down(name)
        say(fleet, node(name, kv_layout_id=FOREIGN))
    assert [worker.node_id for worker in fleet.workers("fake")] == ["decode-0", "decode-1"]


def test_a_cluster_without_workers_takes_any_model() -> None:
    fleet = fleet_of(*WORKING)
    fleet.down("prefill-0")
    fleet.down("decode-0")
    assert fleet.largest_pool_blocks("fake") == 0
    say(fleet, node("decode-1", kv_layout_id=FOREIGN))
    assert [info.node_id for info in fleet.workers("fake")] == ["decode-1"]


def test_a_role_is_listed_by_name_without_those_that_drain() -> None:
    fleet = fleet_of("tokenizer-1", node("tokenizer-2", draining=True), "tokenizer-0", "decode-0")
    assert fleet.of_role(Role.TOKENIZER) == ["tokenizer-0", "tokenizer-1"]


def test_gauges_are_the_last_word_of_each_worker() -> None:
    fleet = fleet_of("decode-0", "frontend-0")
    names = ("steps", "running", "waiting", "waiting_tokens")
    blocks = ("blocks_free", "blocks_used", "blocks_cached", "blocks_leased")
    numbers = {name: index for index, name in enumerate((*names, *blocks))}
    load = WorkerLoad(**numbers, counters={"preemptions_total": 3.0})
    fleet.loaded("decode-0", load, 0.0)
    own = {"scheduler": {"nodes": 2.0}}
    requests = {"fake": {"queued": 3}}
    (told,) = fleet.tell_load(own, requests)
    gauges = own | {"decode-0": {**numbers, "preemptions_total": 3.0}}
    assert told == Send("frontend-0", ClusterLoad(gauges=gauges, requests=requests))
    fleet.down("decode-0")
    assert fleet.tell_load(own, {}) == [Send("frontend-0", ClusterLoad(gauges=own))]


def test_the_memory_of_the_gone_is_bounded() -> None:
    fleet = fleet_of("tokenizer-0")
    for number in range(GONE_MAX + 1):
        say(fleet, node(f"decode-{number}"))
        fleet.down(f"decode-{number}")
    gone = peers(fleet).gone
    assert len(gone) == GONE_MAX and "decode-0" not in gone
