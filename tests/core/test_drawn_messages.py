"""Whatever a peer says, a machine keeps its promises to itself: nothing that decodes breaks it."""

from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.builders import worker_info
from core.drawn import NAMES, messages
from sim.cluster import Cluster
from slipstream.core.machine import Machine, PeerDown, PeerUp, Received, Started, TimerFired
from slipstream.core.node import Node, encode_header
from slipstream.messages import INBOXES, FrameHeader, NodeInfo
from slipstream.types import Role

ROLES = list(INBOXES)
EXAMPLES = 60
TIMERS = ["tick", "reports", "recovered", "hello", "renew", "step", "resync", "locate r"]


def machine(role: Role) -> tuple[NodeInfo, Machine]:
    name = "scheduler" if role is Role.SCHEDULER else f"{role}-9"
    worker = worker_info() if role in (Role.PREFILL, Role.DECODE) else None
    info = NodeInfo(node_id=name, role=role, epoch=1, address=name, worker=worker)
    return info, Cluster(1)._machine(info)


def events(role: Role) -> st.SearchStrategy[Any]:
    peers = st.sampled_from(NAMES[3:])
    said = st.builds(Received, peers, messages(INBOXES[role]))
    met = st.builds(PeerUp, peers, st.integers(0, 3)) | st.builds(PeerDown, peers)
    return st.lists(
        st.one_of(said, said, said, met, st.sampled_from(TIMERS).map(TimerFired)), max_size=25
    )


@pytest.mark.parametrize("role", ROLES)
def test_no_message_breaks_a_machine(role: Role) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(events(role))
    def run(drawn: list[Any]) -> None:
        _, tried = machine(role)
        tried.handle(Started(), 0.0)
        for now, event in enumerate(drawn):
            tried.handle(event, 0.1 * now)
            tried.check()

    run()


@pytest.mark.parametrize("role", ROLES)
def test_no_frame_breaks_a_node(role: Role) -> None:
    """Bytes of all kinds: drawn, and messages with a byte that is another one."""
    encode = msgspec.msgpack.Encoder().encode

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        info, tried = machine(role)
        node = Node(info, tried, None)
        node.handle(Started(), 0.0)
        for seq in range(data.draw(st.integers(1, 6))):
            payload = data.draw(st.binary(max_size=40) | messages(INBOXES[role]).map(encode))
            if payload and data.draw(st.booleans()):
                at = data.draw(st.integers(0, len(payload) - 1))
                payload = payload[:at] + bytes([data.draw(st.integers(0, 255))]) + payload[at + 1 :]
            numbers = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
            header = FrameHeader(
                1, "decode-0", 5, "decode-0", 7, *numbers, data.draw(st.integers(0, 3))
            )
            head = data.draw(st.just(encode_header(header)) | st.binary(max_size=40))
            node.receive(head, payload, None, 0.01 * seq)
            node.check()

    run()
