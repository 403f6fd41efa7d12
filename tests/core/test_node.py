"""A machine and its sessions: frames in, frames and effects out, nothing malformed in between."""

from collections.abc import Callable, Sequence

import msgspec
import pytest

from core.builders import node_info
from slipstream.core.link import Transmit
from slipstream.core.machine import (
    Drain,
    Effect,
    Event,
    Exit,
    PeerDown,
    PeerUp,
    Received,
    Send,
    SetTimer,
    Started,
)
from slipstream.core.node import Action, Node, encode_header
from slipstream.messages import (
    SCHEDULER,
    Cancel,
    ChatPrompt,
    FrameHeader,
    Peers,
    StreamEnded,
    Tokenize,
)
from slipstream.types import Role, SamplingParams

FRONTEND, TOKENIZER = "frontend-0", "tokenizer-0"


def words(request_id: str) -> Cancel:
    return Cancel(request_id=request_id)


class Scripted:
    """A machine that keeps what it is told, and answers as the test says."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.answer: Callable[[Event], list[Effect]] = lambda event: []

    def handle(self, event: Event, now_s: float) -> Sequence[Effect]:
        self.events.append(event)
        return self.answer(event)

    def heard(self) -> list[str]:
        messages = [event.message for event in self.events if isinstance(event, Received)]
        return [message.request_id for message in messages if isinstance(message, Cancel)]

    def statistics(self) -> dict[str, float]:
        return {}

    def check(self) -> None:
        pass


class Wire:
    """Nodes on a bus without faults; time stands still while they speak."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.nodes: dict[str, Node] = {}
        self.machines: dict[str, Scripted] = {}
        self.effects: list[Effect] = []
        for node_id in (FRONTEND, TOKENIZER):
            self.start(node_id, epoch=1)

    def start(self, node_id: str, epoch: int) -> None:
        info = node_info(node_id, epoch)
        self.machines[node_id] = Scripted()
        self.nodes[node_id] = Node(info, self.machines[node_id], (SCHEDULER, SCHEDULER))
        for peer in (FRONTEND, TOKENIZER):
            self.nodes[node_id].link.know(peer, peer, 0)

    def run(self, actions: Sequence[Action]) -> None:
        """Deliver frames until nobody has anything to say at this moment."""
        pending = list(actions)
        while pending:
            action = pending.pop(0)
            if not isinstance(action, Transmit):
                self.effects.append(action)
            elif action.address in self.nodes:
                node = self.nodes[action.address]
                header = encode_header(action.header)
                pending += node.receive(header, action.payload, None, self.now_s)
                node.check()
            if not pending:
                for node in self.nodes.values():
                    if node.next_wake_s() <= self.now_s:
                        pending += node.wake(self.now_s)

    def post(self, node_id: str, event: Event) -> None:
        self.run(self.nodes[node_id].handle(event, self.now_s))

    def say(self, source: str, to: str, message: object) -> None:
        """Put a payload into the session of two nodes, whatever it is."""
        payload = message if isinstance(message, bytes) else msgspec.msgpack.encode(message)
        self.run(list(self.nodes[source].link.send(to, payload, self.now_s)))  # type: ignore[arg-type]


@pytest.fixture
def wire() -> Wire:
    return Wire()


def test_a_send_arrives_in_a_session(wire: Wire) -> None:
    wire.machines[FRONTEND].answer = lambda event: (
        [Send(TOKENIZER, words("a")), Send(TOKENIZER, words("b"))] if event == Started() else []
    )
    wire.post(FRONTEND, Started())
    assert wire.machines[TOKENIZER].events == [
        PeerUp(FRONTEND, 1),
        Received(FRONTEND, words("a")),
        Received(FRONTEND, words("b")),
    ]
    assert PeerUp(TOKENIZER, 1) in wire.machines[FRONTEND].events


def test_effects_that_are_no_messages_pass_in_order(wire: Wire) -> None:
    wire.machines[FRONTEND].answer = lambda event: [SetTimer("a", 1.0), SetTimer("b", 2.0), Exit()]
    wire.post(FRONTEND, Drain())
    assert wire.effects == [SetTimer("a", 1.0), SetTimer("b", 2.0), Exit()]


# --- Malformed ------------------------------------------------------------------------------------


def header(**changes: object) -> bytes:
    fields = {
        "version": 1,
        "source": FRONTEND,
        "epoch": 1,
        "address": FRONTEND,
        "session": 1,
        "peer_session": 0,
        "seq": 1,
        "ack": 0,
    }
    return msgspec.msgpack.encode(list({**fields, **changes}.values()))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1 no msgpack",
        header()[:-1],
        header(version=2),
        header(epoch="1"),
        header(source=TOKENIZER),  # its own name
        b"\x91" * 100_000,
        header(source="\0").replace(b"\xa1\0", b"\xa1\xff"),  # no UTF-8
    ],
    ids=["empty", "garbage", "cut", "version", "type", "own name", "nested", "utf-8"],
)
def test_a_malformed_header_is_counted_and_dropped(wire: Wire, frame: bytes) -> None:
    node = wire.nodes[TOKENIZER]
    assert msgspec.msgpack.decode(header(), type=FrameHeader), "well formed but for the change"
    assert node.receive(frame, b"", None, wire.now_s) == []
    assert node.frames_malformed == 1 and not wire.machines[TOKENIZER].events


def nested_without_end() -> bytes:
    message = Tokenize(
        request_id="r",
        prompt=ChatPrompt(messages=[{"content": "HERE"}]),
        sampling=SamplingParams(max_tokens=1, seed=1),
        timeout_s=1.0,
    )
    deep = b"\x91" * 100_000 + b"\xc0"
    return msgspec.msgpack.encode(message).replace(b"\xa4HERE", deep)


@pytest.mark.parametrize(
    "payload",
    [
        b"\xc1",
        msgspec.msgpack.encode(StreamEnded(request_id="r")),
        msgspec.msgpack.encode({"type": "Cancel"}),
        msgspec.msgpack.encode({"type": "Cancel", "request_id": 7}),
        nested_without_end(),
    ],
    ids=["garbage", "for the scheduler", "field missing", "type", "nested"],
)
def test_a_malformed_message_is_counted_and_the_session_goes_on(wire: Wire, payload: bytes) -> None:
    wire.say(FRONTEND, TOKENIZER, words("before"))
    wire.say(FRONTEND, TOKENIZER, payload)
    wire.say(FRONTEND, TOKENIZER, words("after"))
    assert wire.machines[TOKENIZER].heard() == ["before", "after"]
    assert wire.nodes[TOKENIZER].frames_malformed == 1


# --- Peers ----------------------------------------------------------------------------------------


def test_a_peer_without_an_address_is_down_at_once(wire: Wire) -> None:
    wire.machines[FRONTEND].answer = lambda event: (
        [Send("tokenizer-9", words("a")), Send(TOKENIZER, words("b")), SetTimer("t", 1.0)]
        if event == Started()
        else []
    )
    wire.post(FRONTEND, Started())
    events = wire.machines[FRONTEND].events
    assert events[:2] == [Started(), PeerDown("tokenizer-9")]
    assert wire.machines[TOKENIZER].heard() == ["b"], "what stood beside it was said"
    assert wire.effects == [SetTimer("t", 1.0)]


def test_what_is_said_at_the_news_of_a_lost_peer_follows_what_was_said_before(wire: Wire) -> None:
    def answer(event: Event) -> list[Effect]:
        match event:
            case Started():
                return [Send("tokenizer-9", words("x")), Send(TOKENIZER, words("first"))]
            case PeerDown():
                return [Send(TOKENIZER, words("then"))]
        return []

    wire.machines[FRONTEND].answer = answer
    wire.post(FRONTEND, Started())
    assert wire.machines[TOKENIZER].heard() == ["first", "then"]


def test_the_word_of_the_scheduler_gives_addresses(wire: Wire) -> None:
    wire.start(SCHEDULER, epoch=1)
    wire.start("tokenizer-1", epoch=4)
    strange = msgspec.structs.replace(node_info(FRONTEND, 9), address="elsewhere")
    peers = Peers(nodes=[node_info("tokenizer-1", 4), strange])
    wire.nodes[SCHEDULER].link.know(FRONTEND, FRONTEND, 0)
    wire.say(SCHEDULER, FRONTEND, peers)
    assert Received(SCHEDULER, peers) in wire.machines[FRONTEND].events
    assert wire.nodes[FRONTEND].link.addresses["tokenizer-1"] == "tokenizer-1"
    assert wire.nodes[FRONTEND].link.addresses[FRONTEND] == FRONTEND, "it knows itself better"


def test_what_is_said_at_the_news_of_a_restart_reaches_the_new_process(wire: Wire) -> None:
    wire.say(FRONTEND, TOKENIZER, words("old"))
    wire.machines[FRONTEND].answer = lambda event: (
        [Send(TOKENIZER, words("again"))] if event == PeerDown(TOKENIZER) else []
    )
    wire.start(TOKENIZER, epoch=2)
    wire.say(TOKENIZER, FRONTEND, Peers(nodes=[]))
    events = wire.machines[FRONTEND].events
    down, up = events.index(PeerDown(TOKENIZER)), events.index(PeerUp(TOKENIZER, 2))
    assert down < up < events.index(Received(TOKENIZER, Peers(nodes=[])))
    assert wire.machines[TOKENIZER].heard() == ["again"]


def test_a_silent_peer_is_down_when_the_node_wakes(wire: Wire) -> None:
    wire.say(FRONTEND, TOKENIZER, words("a"))
    del wire.nodes[TOKENIZER]
    node = wire.nodes[FRONTEND]
    while PeerDown(TOKENIZER) not in wire.machines[FRONTEND].events:
        wire.now_s = node.next_wake_s()
        assert wire.now_s <= 103.0
        node.wake(wire.now_s)
    assert node.next_wake_s() == float("inf"), "it waits for nobody"


def test_a_word_to_a_peer_that_is_just_being_lost_is_lost_with_it(wire: Wire) -> None:
    """PeerDown means that nothing said before it is still on its way."""
    wire.start("tokenizer-1", epoch=1)
    node, machine = wire.nodes[FRONTEND], wire.machines[FRONTEND]
    node.link.know("tokenizer-1", "tokenizer-1", 0)
    for peer in (TOKENIZER, "tokenizer-1"):
        wire.say(FRONTEND, peer, words("a"))
    machine.answer = lambda event: (
        [Send("tokenizer-1", words("late"))] if event == PeerDown(TOKENIZER) else []
    )
    node.wake(wire.now_s + 10.0)
    assert machine.events[-2:] == [PeerDown(TOKENIZER), PeerDown("tokenizer-1")]
    wire.now_s += 10.0
    wire.say(FRONTEND, "tokenizer-1", words("new"))
    assert wire.machines["tokenizer-1"].heard() == ["a", "new"]


def test_a_frame_bears_the_name_of_the_role_that_was_proved(wire: Wire) -> None:
    node = wire.nodes[TOKENIZER]
    assert node.receive(header(), b"", Role.DECODE, wire.now_s) == []
    assert node.frames_malformed == 1
    node.receive(header(), b"", Role.FRONTEND, wire.now_s)
    assert node.frames_malformed == 1
