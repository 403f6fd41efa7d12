"""A router that follows the KV events knows the pool, and of each block its tokens and parent."""

from random import Random

import pytest

from core.builders import decode
from core.workers import Worker
from sim.device import EOS
from slipstream.core.blocks import BlockPool
from slipstream.core.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KvEvent,
    KvEvents,
)
from slipstream.core.machine import Effect, Event, PublishKvEvents, Started
from slipstream.core.prefix import block_hashes, namespace
from slipstream.core.worker import WorkerMachine
from slipstream.core.worker_settings import WorkerSettings

SPACE = namespace("toy", "")


class Follower:
    """What llm-d does with events: medium -> hash -> (parent, tokens)."""

    def __init__(self) -> None:
        self.held: dict[str, dict[bytes, tuple[bytes | None, tuple[int, ...]]]] = {}

    def follow(self, events: tuple[KvEvent, ...]) -> None:
        for event in events:
            match event:
                case AllBlocksCleared():
                    self.held.clear()
                case BlockRemoved():
                    for block_hash in event.block_hashes:
                        del self.held[event.medium][block_hash]
                case BlockStored():
                    self._store(event)

    def _store(self, event: BlockStored) -> None:
        parent = event.parent_block_hash
        held = self.held.setdefault(event.medium, {})
        for number, block_hash in enumerate(event.block_hashes):
            assert block_hash not in held, "said twice"
            tokens = event.token_ids[number * event.block_size : (number + 1) * event.block_size]
            held[block_hash] = parent, tokens
            parent = block_hash if event.block_size else None

    def of(self, medium: str) -> dict[bytes, tuple[bytes | None, tuple[int, ...]]]:
        return self.held.get(medium, {})


def commit(pool: BlockPool, tokens: list[int], events: KvEvents) -> None:
    """A job that computes all of this, as far as there is room, and ends."""
    hashes = block_hashes(tokens, SPACE)
    hits = pool.match(hashes)
    pool.take(hits)
    blocks = pool.allocate(len(hashes) - len(hits))
    if blocks is None:
        pool.release(hits)
        return
    for position, block in enumerate(hits + blocks):
        pool.commit(block, hashes[position], position)
    events.cached(tokens, hashes)
    pool.release(hits + blocks)


def test_a_chain_is_one_event_and_names_its_parent() -> None:
    pool, tokens = BlockPool(8), list(range(64))
    events, hashes = KvEvents(pool), block_hashes(list(range(64)), SPACE)
    assert events.flush() == (AllBlocksCleared(),)
    commit(pool, tokens[:40], events)
    (first,) = events.flush()
    assert isinstance(first, BlockStored)
    assert (first.block_hashes, first.parent_block_hash) == (tuple(hashes[:2]), None)
    assert (first.token_ids, first.block_size) == (tuple(range(32)), 16)
    commit(pool, tokens, events)
    (second,) = events.flush()
    assert isinstance(second, BlockStored)
    assert (second.block_hashes, second.parent_block_hash) == (tuple(hashes[2:]), hashes[1])
    assert second.token_ids == tuple(range(32, 64))
    events.cached(tokens, hashes)
    assert events.flush() == ()


@pytest.mark.parametrize("seed", range(30))
def test_who_follows_knows_the_pool(seed: int) -> None:
    draw = Random(seed)
    pool = BlockPool(12)
    events, follower = KvEvents(pool), Follower()
    lower: dict[bytes, int] = {}
    stems = [[draw.randrange(100) for _ in range(128)] for _ in range(3)]
    known: dict[bytes, tuple[bytes | None, tuple[int, ...]]] = {}
    for _ in range(200):
        kind = draw.random()
        stem = draw.choice(stems)
        tokens = stem[: draw.randrange(128)] + [draw.randrange(100) for _ in range(20)]
        hashes = block_hashes(tokens, SPACE)
        for number, block_hash in enumerate(hashes):
            parent = hashes[number - 1] if number else None
            known[block_hash] = parent, tuple(tokens[16 * number : 16 * number + 16])
        if kind < 0.6:
            commit(pool, tokens, events)
        elif kind < 0.75:
            tier = draw.choice((1, 2))
            some = draw.sample(sorted(known), min(3, len(known)))
            lower |= dict.fromkeys(some, tier)
            for block_hash in some:
                events.moved(block_hash, tier)
        elif kind < 0.85 and lower:
            block_hash = draw.choice(sorted(lower))
            del lower[block_hash]
            events.moved(block_hash, None)
        if draw.random() < 0.4:
            events.changed(pool.drain_changes())
            follower.follow(events.flush())
            assert follower.of("GPU") == {h: known[h] for h in pool.hashes()}
            assert follower.of("CPU").keys() == {h for h, tier in lower.items() if tier == 1}
            assert follower.of("STORAGE").keys() == {h for h, tier in lower.items() if tier == 2}


@pytest.mark.parametrize("wanted", [False, True])
def test_a_worker_publishes_them_if_it_is_told_to(wanted: bool) -> None:
    worker, follower, published = Worker(), Follower(), 0
    settings = WorkerSettings(eos_token_ids=(EOS,), kv_events=wanted)
    machine = WorkerMachine(worker.machine.membership.node, settings)

    class Listening:
        """The machine, and an ear for one effect of it."""

        check = machine.check

        def handle(self, event: Event, now_s: float) -> list[Effect]:
            nonlocal published
            effects = machine.handle(event, now_s)
            for effect in effects:
                if isinstance(effect, PublishKvEvents):
                    published += 1
                    follower.follow(effect.events)
            return effects

    worker.machine = Listening()  # type: ignore[assignment]
    worker.handle(Started())
    worker.hear(decode("a", range(1, 51), max_tokens=20))
    worker.run()
    assert len(machine.pool.hashes()) >= 3
    assert follower.of("GPU").keys() == (set(machine.pool.hashes()) if wanted else set())
    assert (published > 0) == wanted
