"""Two links over a bus that loses, repeats, delays, reorders: exactly once, in order, or Down."""

import heapq
import itertools
import random

import pytest

from slipstream.core.link import Arrived, Down, Link, Output, Transmit, Up


class Bus:
    """A seeded network between links; everything a link says is kept per node."""

    def __init__(self, seed: int, loss: float = 0.0, names: str = "ab"):
        self.random = random.Random(seed)
        self.loss = loss
        self.now_s = 0.0
        self.cut = False
        self.epochs = itertools.count(1_000, 1_000)
        self.frames: list[tuple[float, int, Transmit]] = []
        self.ties = itertools.count()
        self.links: dict[str, Link] = {}
        self.said: dict[str, list[Output]] = {}
        for name in names:
            self.start(name)

    def start(self, name: str) -> None:
        link = self.links[name] = Link(name, next(self.epochs), f"bus-{name}")
        for peer in "ab":
            link.know(peer, f"bus-{peer}", 0)
        self.said[name] = []

    def apply(self, name: str, outputs) -> None:
        for output in outputs:
            if not isinstance(output, Transmit):
                self.said[name].append(output)
                continue
            copies = 2 if self.random.random() < self.loss else 1
            for _ in range(copies):
                if self.cut or self.random.random() < self.loss:
                    continue
                at = self.now_s + self.random.expovariate(1 / 0.05)
                heapq.heappush(self.frames, (at, next(self.ties), output))
        self.links[name].check()

    def send(self, name: str, peer: str, payload: bytes) -> None:
        self.apply(name, self.links[name].send(peer, payload, self.now_s))

    def run(self, until_s: float) -> None:
        while True:
            wake, name = min((link.next_wake_s(), name) for name, link in self.links.items())
            at = self.frames[0][0] if self.frames else float("inf")
            if min(wake, at) > until_s:
                self.now_s = until_s
                return
            if at <= wake:
                self.now_s, _, frame = heapq.heappop(self.frames)
                link = self.links[frame.peer]
                self.apply(frame.peer, link.receive(frame.header, frame.payload, self.now_s))
            else:
                self.now_s = max(wake, self.now_s)
                self.apply(name, self.links[name].wake(self.now_s))

    def arrived(self, name: str) -> list[bytes]:
        return [o.payload for o in self.said[name] if isinstance(o, Arrived)]


@pytest.mark.parametrize("seed", range(40))
def test_every_message_once_in_order(seed: int) -> None:
    bus = Bus(seed, loss=0.2)
    payloads = [b"%d" % i for i in range(200)]
    for i, payload in enumerate(payloads):
        bus.send("a", "b", payload)
        bus.send("b", "a", payload)
        bus.run(i * 0.01)
    assert bus.links["a"].unread_frames > 0
    bus.run(40.0)
    assert bus.arrived("a") == payloads
    assert bus.arrived("b") == payloads
    assert bus.links["a"].unread_frames == bus.links["b"].unread_frames == 0


def test_a_silent_peer_ends_the_session_within_the_deadline() -> None:
    bus = Bus(1)
    bus.send("a", "b", b"x")
    bus.run(1.0)
    assert bus.said["a"] == [Up("b", bus.links["b"].epoch)]
    bus.cut = True
    bus.frames.clear()
    bus.run(1.0 + bus.links["a"].dead_s + 0.1)
    assert bus.said["a"][-1] == Down("b")
    assert bus.said["b"][-1] == Down("a")


@pytest.mark.parametrize("seed", range(40))
def test_after_a_partition_nothing_old_arrives_and_new_messages_do(seed: int) -> None:
    bus = Bus(seed, loss=0.1)
    for i in range(20):
        bus.send("a", "b", b"old %d" % i)
        bus.send("b", "a", b"old %d" % i)
    bus.run(0.05)
    bus.cut = True
    bus.send("a", "b", b"lost")
    # One side may notice well before the other, or only one of them at all.
    bus.run(0.05 + bus.random.uniform(1.0, 6.0))
    bus.cut = False
    for name in "ab":
        bus.said[name].append(Arrived(name, b"-- healed --"))
    for i in range(20):
        bus.run(bus.now_s + 0.5)
        bus.send("a", "b", b"new %d" % i)
        bus.send("b", "a", b"new %d" % i)
    bus.run(bus.now_s + 30.0)
    for name in "ab":
        payloads = bus.arrived(name)
        assert payloads[-1] == b"new 19"
        assert len(set(payloads)) == len(payloads), "delivered twice"
        new = [p for p in payloads if p.startswith(b"new")]
        assert new == sorted(new, key=lambda p: int(p[4:])), "out of order"


@pytest.mark.parametrize("seed", range(40))
def test_a_restarted_peer_is_news_and_its_old_self_is_fenced(seed: int) -> None:
    bus = Bus(seed, loss=0.1)
    for i in range(10):
        bus.send("a", "b", b"%d" % i)
        bus.send("b", "a", b"%d" % i)
    bus.run(bus.random.uniform(0.01, 2.0))
    bus.start("b")
    bus.send("b", "a", b"reborn")
    bus.run(bus.now_s + 20.0)
    epoch = bus.links["b"].epoch
    said = bus.said["a"]
    assert Up("b", epoch) in said
    reborn = said.index(Up("b", epoch))
    assert bus.arrived("a").count(b"reborn") == 1
    assert [o for o in said[reborn:] if isinstance(o, Arrived)] == [Arrived("b", b"reborn")]


def test_a_peer_that_does_not_read_costs_a_bounded_amount() -> None:
    link = Link("a", 1, "bus-a")
    link.know("b", "bus-b", 0)
    outputs = []
    for _ in range(20_000):
        outputs = list(link.send("b", b"x", 0.0))
        link.check()
        if outputs == [Down("b")]:
            return
    raise AssertionError(f"no end: {outputs}")


def test_an_unknown_peer_is_down_at_once() -> None:
    assert list(Link("a", 1, "bus-a").send("b", b"x", 0.0)) == [Down("b")]


@pytest.mark.parametrize("seed", range(20))
def test_who_says_goodbye_is_down_at_once_but_not_before_its_last_word(seed: int) -> None:
    bus = Bus(seed, loss=0.3 * (seed % 2))
    payloads = [b"%d" % i for i in range(50)]
    bus.send("a", "b", payloads[0])
    bus.run(6.0)
    for payload in payloads[1:]:
        bus.send("a", "b", payload)
    bus.apply("a", bus.links["a"].leave(bus.now_s))
    bus.cut = True  # what is on its way arrives, and nothing else is said
    bus.run(bus.now_s + (bus.links["b"].dead_s if bus.loss else 0.0) + 1.0)
    arrived, heard = bus.arrived("b"), bus.said["b"]
    assert isinstance(heard[-1], Down) and sum(isinstance(one, Down) for one in heard) == 1
    assert arrived == (payloads[: len(arrived)] if bus.loss else payloads)
