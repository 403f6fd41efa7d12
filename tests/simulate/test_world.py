"""Simulated time: timers, messages in order, READs that wait for each other."""

import random

import msgspec
import pytest

from simulate.builders import HARDWARE
from slipstream.core import machine as m
from slipstream.messages import StreamEnded
from slipstream.simulate.world import Process, World


class Notebook:
    """A machine that does nothing but write down what it is told."""

    def __init__(self, world: World):
        self.world = world
        self.events: list[tuple[float, m.Event]] = []

    def handle(self, event: m.Event, now_s: float) -> list[m.Effect]:
        assert now_s == self.world.now_s
        self.events.append((now_s, event))
        return []

    def statistics(self) -> dict[str, float]:
        return {}

    def check(self) -> None:
        pass


def a_world(*names: str) -> tuple[World, list[Process]]:
    world = World(HARDWARE, 7, bus_latency_s=0.01)
    return world, [Process(world, name, Notebook(world)) for name in names]


def heard(process: Process) -> list[tuple[float, m.Event]]:
    assert isinstance(process.machine, Notebook)
    return process.machine.events


def finish(world: World) -> None:
    world.run(lambda: False)


def test_messages_arrive_in_order_after_the_latency() -> None:
    world, (one, other) = a_world("one", "other")
    sent = [StreamEnded(request_id=str(n)) for n in range(5)]
    one.perform([m.Send("other", message) for message in sent])
    finish(world)
    assert heard(other) == [(0.01, m.Received("one", message)) for message in sent]


@pytest.mark.parametrize("seed", range(20))
def test_timers_fire_at_their_last_deadline(seed: int) -> None:
    """Against a dictionary that is looked through: set, moved both ways, cancelled."""
    rng = random.Random(seed)
    world, (process,) = a_world("one")
    due: dict[str, float] = {}
    fired: list[tuple[float, str]] = []
    for step in range(200):
        now_s = step * 0.1
        world.at(now_s, lambda: None)
        world.run(lambda now_s=now_s: world.now_s >= now_s)
        fired += sorted((at_s, key) for key, at_s in due.items() if at_s <= now_s)
        due = {key: at_s for key, at_s in due.items() if at_s > now_s}
        key = rng.choice("abc")
        if rng.random() < 0.3:
            due.pop(key, None)
            process.perform([m.CancelTimer(key)])
        else:
            due[key] = now_s + rng.uniform(0.01, 3.0)
            process.perform([m.SetTimer(key, due[key])])
    finish(world)
    fired += sorted((at_s, key) for key, at_s in due.items())
    assert heard(process) == [(at_s, m.TimerFired(key)) for at_s, key in fired]


def pull(peer: str, name: str, num_blocks: int) -> m.PullBlocks:
    blocks = tuple(range(num_blocks))
    return m.PullBlocks(name, peer, 1, blocks, blocks, 10.0)


def test_a_read_waits_for_its_two_ways() -> None:
    """Two readers of one source, and a third that meets neither."""
    world, (source, other, *readers) = a_world("source", "other", "a", "b", "c")
    a, b, c = readers
    a.perform([pull("source", "1", 100), pull("other", "2", 50)])
    b.perform([pull("source", "3", 10)])
    c.perform([pull("b", "4", 10)])
    finish(world)
    first_s, small_s = HARDWARE.read_s(100), HARDWARE.read_s(10)
    ends_s = {e.pull_id: t for reader in readers for t, e in heard(reader)}
    assert ends_s["1"] == pytest.approx(first_s)
    assert ends_s["2"] == pytest.approx(first_s + HARDWARE.read_s(50))  # a's way in
    assert ends_s["3"] == pytest.approx(first_s + small_s)  # the source's way out
    assert ends_s["4"] == pytest.approx(small_s)
    assert not heard(source) and not heard(other)


def test_a_step_takes_what_the_model_says() -> None:
    world, (worker,) = a_world("worker")
    rows = (
        m.Row("a", 1, tuple(range(100)), 50, (0,), sample=False),
        m.Row("b", 2, (7,), 300, (1,), sample=True),
    )
    worker.perform([m.RunBatch(m.BatchPlan(4, rows, digest_blocks=(3,)))])
    finish(world)
    step = HARDWARE.step
    expected_s = (
        step.base_s
        + 100 * step.prefill_token_s
        + (150**2 - 50**2) * step.prefill_pair_s
        + step.decode_row_s
        + 301 * step.decode_context_s
    )
    ((at_s, done),) = heard(worker)
    assert isinstance(done, m.BatchDone)
    assert at_s == pytest.approx(expected_s) and worker.busy_s == pytest.approx(expected_s)
    assert worker.work_s == pytest.approx(expected_s - step.base_s)
    assert done.step == 4 and done.digests.keys() == {3}
    assert done.outputs == (m.RowOutput("b", 2, (7,)),)


def test_an_unknown_effect_is_an_error() -> None:
    class Strange(msgspec.Struct):
        pass

    _, (process,) = a_world("one")
    with pytest.raises(KeyError):
        process.perform([Strange()])  # type: ignore[list-item]
