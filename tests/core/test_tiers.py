"""Blocks below the pool: what was hit is copied down, and comes back whole or not at all."""

import pytest

from core.builders import decode
from core.workers import PROMPT, Worker, answer
from slipstream.core import machine as m
from slipstream.core.fetcher import LOAD_SHARE
from slipstream.messages import Drop

LONG = list(range(1, 60))
OTHERS = [list(range(start, start + 58)) for start in (2, 3, 4, 5)]
PARAMS: dict[str, object] = {"max_tokens": 2, "ignore_eos": True}


class Below(Worker):
    """A worker with a tier that does what it is told at once, unless it is told to wait."""

    def __init__(self, after_hits: int = 1, num_blocks: int = 13):
        self.saves: list[m.SaveBlocks] = []
        self.loads: list[m.LoadBlocks] = []
        self.below: dict[bytes, tuple[list[int], bytes]] = {}
        super().__init__("decode-0", offload_after_hits=after_hits, num_blocks=num_blocks)

    def executes(self, effect: m.Effect) -> None:
        if isinstance(effect, m.SaveBlocks):
            self.saves.append(effect)
        elif isinstance(effect, m.LoadBlocks):
            self.loads.append(effect)

    def save(self) -> int:
        """End all saves; how many blocks went down."""
        moves = []
        while self.saves:
            effect = self.saves.pop(0)
            for saved in effect.blocks:
                slots = list(self.device.memory[saved.block])
                self.below[saved.block_hash] = slots, self.device.digest(saved.block)
                moves.append(m.BlockMove(saved.block_hash, saved.position, 1))
            self.handle(m.BlocksSaved(effect.op_id))
        self.handle(m.BlocksMoved(tuple(moves)))
        return len(moves)

    def load(self, count: int = 99) -> None:
        """End the load; only the first `count` blocks are whole."""
        effect = self.loads.pop()
        digests = []
        for block_hash, local in list(zip(effect.block_hashes, effect.local_blocks, strict=True)):
            slots, digest = self.below[block_hash]
            self.device.memory[local][:] = slots if len(digests) < count else [7] * 16
            digests.append(digest)
        self.handle(m.PullDone(effect.pull_id, tuple(digests[:count]), transport="tier"))

    def ask(self, name: str, prompt: list[int]) -> None:
        self.said = []
        self.hear(decode(name, prompt, **PARAMS))  # type: ignore[arg-type]

    def finish(self, prompt: list[int]) -> None:
        self.run()
        assert self.output() == answer(decode("x", prompt, **PARAMS))[0]  # type: ignore[arg-type]
        self.said = []

    def evict(self) -> None:
        """Others take all of the pool."""
        for number, prompt in enumerate(OTHERS):
            self.ask(f"o{number}", prompt)
            self.finish(prompt)
            self.save()


@pytest.fixture
def worker() -> Below:
    below = Below()
    below.ask("a", PROMPT)
    below.finish(PROMPT)
    assert not below.saves, "nobody has hit it yet"
    below.ask("b", PROMPT)
    below.finish(PROMPT)
    return below


def test_what_was_hit_goes_down_and_comes_back(worker: Below) -> None:
    assert worker.save() == 2
    worker.evict()
    worker.ask("c", PROMPT)
    assert not worker.plans and len(worker.loads[0].block_hashes) == 2
    worker.load()
    assert worker.plans[0].rows[0].num_tokens == len(PROMPT) - 32
    worker.finish(PROMPT)
    assert worker.load_of("blocks_loaded_total") == 2 and worker.held == 0


def test_a_block_that_is_copied_stays_until_it_is(worker: Below) -> None:
    assert worker.held == 2
    worker.handle(m.BlocksSaved(worker.saves.pop().op_id))
    assert worker.held == 0


@pytest.mark.parametrize(("after_hits", "asked"), [(0, 1), (1, 2), (2, 3), (3, 4)])
def test_hits_that_it_takes(after_hits: int, asked: int) -> None:
    below = Below(after_hits)
    for number in range(asked):
        assert not below.saves
        below.ask(f"r{number}", PROMPT)
        below.finish(PROMPT)
    assert below.save() == 2
    below.ask("again", PROMPT)
    below.finish(PROMPT)
    assert not below.saves, "it is there already"


@pytest.mark.parametrize("whole", [0, 1])
def test_what_is_not_whole_is_computed(worker: Below, whole: int) -> None:
    worker.save()
    worker.evict()
    worker.ask("c", PROMPT)
    worker.load(whole)
    assert worker.plans[0].rows[0].num_tokens == len(PROMPT) - 16 * whole
    worker.finish(PROMPT)
    assert worker.load_of("fetch_tier_total") == 1 and worker.held == 0


def test_what_the_store_dropped_is_not_asked_for(worker: Below) -> None:
    worker.save()
    worker.evict()
    gone = tuple(m.BlockMove(block_hash, 0, None) for block_hash in worker.below)
    worker.handle(m.BlocksMoved(gone))
    worker.ask("c", PROMPT)
    assert not worker.loads
    worker.finish(PROMPT)


def test_a_disk_that_hangs_is_not_waited_for_and_its_blocks_are_not_used(worker: Below) -> None:
    worker.save()
    worker.evict()
    worker.ask("c", PROMPT)
    worker.pass_time(11.0)
    worker.finish(PROMPT)
    assert worker.load_of("fetch_silent_total") == 1
    assert worker.held == 2, "it may still write into them"
    worker.load()
    assert worker.held == 0


def test_a_disk_that_hangs_is_asked_for_nothing_more(worker: Below) -> None:
    """However many ask: what was given up keeps its blocks, and the rest of the pool serves."""
    worker.save()
    worker.evict()
    worker.ask("c", PROMPT)
    assert len(worker.loads) == 1
    worker.pass_time(20.0)
    worker.finish(PROMPT)
    held = worker.held
    assert 0 < held <= worker.machine.pool.num_blocks // LOAD_SHARE
    for number in range(8):
        worker.ask(f"d{number}", PROMPT)
        worker.finish(PROMPT)
        worker.evict()
    assert len(worker.loads) == 1 and worker.held == held
    worker.load()
    assert worker.held == 0
    worker.evict()
    worker.ask("e", PROMPT)
    assert worker.loads, "it answers again"


def test_loads_leave_half_of_the_pool() -> None:
    below = Below(num_blocks=5)
    for name in ("a", "b"):
        below.ask(name, LONG)
        below.finish(LONG)
    below.save()
    below.evict()
    below.ask("c", LONG)
    (load,) = below.loads
    assert len(load.local_blocks) == 5 // LOAD_SHARE < len(LONG) // 16
    below.load()
    below.finish(LONG)


def test_a_drop_while_it_loads(worker: Below) -> None:
    worker.save()
    worker.evict()
    worker.ask("c", PROMPT)
    worker.hear(Drop(request_id="c", attempt=1))
    assert worker.held == 2
    worker.load()
    assert worker.held == 0 and not worker.plans


def test_without_a_tier_nothing_is_saved() -> None:
    worker = Worker()
    for name in "abc":
        worker.hear(decode(name, PROMPT, **PARAMS))  # type: ignore[arg-type]
        worker.run()
    assert not worker.machine.exchange.tiers.saving
