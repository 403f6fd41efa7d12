"""Host memory below a pool: least recently used, one copy at a time each way."""

import random

import pytest

from simulate.builders import HARDWARE
from slipstream.core.machine import BlockMove, SavedBlock
from slipstream.simulate.tier import HostTier


def saved(*numbers: int) -> tuple[SavedBlock, ...]:
    return tuple(SavedBlock(0, bytes([n]), n, None) for n in numbers)


@pytest.mark.parametrize("seed", range(20))
def test_it_holds_what_was_used_last(seed: int) -> None:
    rng = random.Random(seed)
    tier, order = HostTier(HARDWARE, 4), []
    known: dict[bytes, int | None] = {}
    for _ in range(200):
        numbers = rng.sample(range(8), rng.randint(1, 6))
        if rng.random() < 0.5:
            for move in tier.save(saved(*numbers)):
                assert isinstance(move, BlockMove) and move.position == move.block_hash[0]
                known[move.block_hash] = move.tier
            order = [n for n in order if n not in numbers] + numbers
            order = order[-4:]
        else:
            run = next((i for i, n in enumerate(numbers) if n not in order), len(numbers))
            assert tier.load(tuple(bytes([n]) for n in numbers)) == run
            order = [n for n in order if n not in numbers[:run]] + numbers[:run]
        assert {n for (n,), where in known.items() if where == 1} == set(order)


def test_copies_wait_for_those_of_their_direction() -> None:
    tier = HostTier(HARDWARE, 4)
    one_s = HARDWARE.host_s(10)
    assert tier.down_s(10, 1.0) == pytest.approx(1.0 + one_s)
    assert tier.down_s(10, 1.0) == pytest.approx(1.0 + 2 * one_s)
    assert tier.up_s(10, 1.0) == pytest.approx(1.0 + one_s)
    assert tier.down_s(10, 9.0) == pytest.approx(9.0 + one_s)
