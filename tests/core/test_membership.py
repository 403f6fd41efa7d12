"""Who is there, by the scheduler's word and by what this process hears itself."""

import msgspec
import pytest

from core.builders import node_info
from slipstream.core.machine import (
    Effect,
    Event,
    PeerDown,
    PeerUp,
    Received,
    Send,
    SetTimer,
    Started,
    TimerFired,
)
from slipstream.core.membership import COOL_DOWN_S, HELLO_RETRY_S, HELLO_TIMER, Membership
from slipstream.messages import (
    SCHEDULER,
    Hello,
    LiveRequest,
    ModelState,
    NodeInfo,
    Peers,
    WorkerInfo,
)
from slipstream.types import Role

LIVE = [LiveRequest("r", 1)]
DECODE = Role.DECODE


@pytest.fixture
def membership() -> Membership:
    return Membership(node_info("frontend-0"), live=lambda: LIVE)


def hellos(effects: list[Effect]) -> list[Hello]:
    said = [effect.message for effect in effects if isinstance(effect, Send)]
    assert all(isinstance(message, Hello) for message in said)
    return said  # type: ignore[return-value]


def tell(membership: Membership, *nodes: tuple[str, int], now_s: float = 0.0, **gone: int) -> None:
    peers = Peers(
        nodes=[node_info(node_id, epoch) for node_id, epoch in nodes],
        gone={name.replace("_", "-"): epoch for name, epoch in gone.items()},
    )
    membership.handle(Received(SCHEDULER, peers), now_s)


@pytest.mark.parametrize("event", [Started(), TimerFired(HELLO_TIMER), PeerUp(SCHEDULER, 1)])
def test_hello_is_said_until_the_scheduler_answers_and_in_each_session(
    membership: Membership, event: Event
) -> None:
    effects = membership.handle(event, 10.0)
    assert hellos(effects) == [Hello(node=membership.node, live=LIVE)]
    assert SetTimer(HELLO_TIMER, 10.0 + HELLO_RETRY_S) in effects


def test_no_hello_is_repeated_while_the_session_stands(membership: Membership) -> None:
    membership.handle(PeerUp(SCHEDULER, 1), 0.0)
    assert membership.handle(TimerFired(HELLO_TIMER), 1.0) == []
    assert membership.handle(PeerDown(SCHEDULER), 2.0) == [SetTimer(HELLO_TIMER, 3.0)]
    assert not membership.scheduler_up
    assert hellos(membership.handle(TimerFired(HELLO_TIMER), 3.0))


def test_a_draining_node_says_so(membership: Membership) -> None:
    (hello,) = hellos(membership.drain(0.0))
    assert hello.node.draining and hello.live == LIVE
    (again,) = hellos(membership.handle(PeerUp(SCHEDULER, 2), 1.0))
    assert again.node.draining


def test_nodes_of_a_role_in_the_order_of_their_names(membership: Membership) -> None:
    tell(membership, ("decode-1", 1), ("tokenizer-0", 1), ("decode-0", 1))
    assert membership.alive(DECODE, 0.0) == ["decode-0", "decode-1"]


def test_a_young_scheduler_that_knows_few_does_not_make_the_others_gone(
    membership: Membership,
) -> None:
    tell(membership, ("decode-0", 1), ("decode-1", 1))
    tell(membership)
    assert membership.alive(DECODE, 0.0) == ["decode-0", "decode-1"]


@pytest.mark.parametrize(
    ("gone_epoch", "there"), [(4, ["decode-0"]), (5, []), (6, [])], ids=["older", "same", "newer"]
)
def test_only_the_process_that_fell_silent_is_gone(
    membership: Membership, gone_epoch: int, there: list[str]
) -> None:
    tell(membership, ("decode-0", 5))
    tell(membership, decode_0=gone_epoch, decode_9=1)
    assert membership.alive(DECODE, 0.0) == there


def test_of_two_processes_with_one_name_the_later_one_counts(membership: Membership) -> None:
    for epoch in (5, 6, 4):
        tell(membership, ("decode-0", epoch))
    assert membership.nodes["decode-0"].epoch == 6


def test_a_silent_peer_is_passed_over_for_a_while(membership: Membership) -> None:
    tell(membership, ("decode-0", 1), ("decode-1", 1))
    membership.handle(PeerDown("decode-0"), 10.0)
    assert membership.alive(DECODE, 10.0) == ["decode-1"]
    assert membership.alive(DECODE, 10.0 + COOL_DOWN_S) == ["decode-0", "decode-1"]
    membership.handle(PeerDown("decode-1"), 20.0)
    membership.handle(PeerUp("decode-1", 1), 20.1)
    assert membership.alive(DECODE, 20.1) == ["decode-0", "decode-1"]


def test_draining_nodes_get_nothing_new(membership: Membership) -> None:
    tell(membership, ("decode-0", 1))
    drained = msgspec.structs.replace(node_info("decode-0", 1), draining=True)
    membership.handle(Received(SCHEDULER, Peers(nodes=[drained])), 0.0)
    assert membership.alive(DECODE, 0.0) == []
    assert "decode-0" in membership.nodes, "its streams go on there"


def test_readiness_is_the_schedulers_word(membership: Membership) -> None:
    assert not membership.ready and membership.reason
    membership.handle(Received(SCHEDULER, Peers(nodes=[], ready=True)), 0.0)
    assert (membership.ready, membership.reason) == (True, "")
    membership.handle(Received(SCHEDULER, Peers(nodes=[], reason="no tokenizer")), 0.0)
    assert (membership.ready, membership.reason) == (False, "no tokenizer")


def test_workers_with_another_fingerprint_take_no_part(membership: Membership) -> None:
    def worker(name: str, layout: str, model: str = "m") -> NodeInfo:
        info = WorkerInfo(
            model=model,
            kv_layout_id=layout,
            accept_decode=True,
            **dict.fromkeys(
                ("num_blocks", "block_bytes", "max_model_len", "vocab_size", "max_num_seqs"), 1
            ),
            prefill_budget_tokens=1,
        )
        return NodeInfo(node_id=name, role=Role.DECODE, epoch=1, address="a", worker=info)

    nodes = [worker("ours", "x/float32"), worker("strange", "y/float32"), worker("else", "y", "n")]
    nodes.append(NodeInfo(node_id="frontend-0", role=Role.FRONTEND, epoch=1, address="a"))
    said = {"m": "x", "n": ""}
    models = [ModelState(name=name, fingerprint=said[name]) for name in said]
    membership.handle(Received(SCHEDULER, Peers(nodes=nodes, models=models)), 0.0)
    taking = {node.node_id for node in membership.taking_part()}
    assert taking >= {"ours", "else", "frontend-0"} and "strange" not in taking
