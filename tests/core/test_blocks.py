"""The block pool and leases against naive models, by drawn sequences of calls."""

import random

import pytest

from slipstream.core.blocks import BlockPool
from slipstream.core.lease import Lease, LeaseTable
from slipstream.core.prefix import block_hashes, extend_hashes, namespace, split_hashes


@pytest.mark.parametrize("seed", range(60))
def test_pool_keeps_its_invariants(seed: int) -> None:
    draw = random.Random(seed)
    pool = BlockPool(draw.randint(1, 12))
    held: list[list[int]] = []
    index: set[bytes] = set()
    for _ in range(400):
        choice = draw.random()
        if choice < 0.4:
            want = draw.randint(1, 5)
            free = pool.num_available
            blocks = pool.allocate(want)
            assert (blocks is None) == (want > free)
            if blocks is not None:
                assert not set(blocks) & {b for group in held for b in group}
                held.append(blocks)
        elif choice < 0.6 and held:
            group = draw.choice(held)
            if group:
                number = draw.randrange(8)
                pool.commit(draw.choice(group), bytes([number]) * 16, number)
        elif choice < 0.75:
            hits = pool.match([bytes([draw.randrange(8)]) * 16 for _ in range(3)])
            pool.take(hits)
            held.append(hits)
        elif held:
            pool.release(held.pop(draw.randrange(len(held))))
        pool.check()
        for block_hash, position in pool.drain_changes():
            assert position == block_hash[0]
            (index.add if block_hash in pool else index.discard)(block_hash)
        assert index == set(pool.hashes()), "changes do not add up to the cache"
        assert pool.named() == [(block_hash, block_hash[0]) for block_hash in pool.hashes()]
    for group in held:
        pool.release(group)
    assert pool.num_available == pool.num_blocks
    assert pool.num_empty + pool.count_hashed() == pool.num_blocks


def test_the_tail_is_evicted_before_the_head() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(4)
    assert blocks is not None
    hashes = [bytes([i]) * 16 for i in range(4)]
    for position, (block, block_hash) in enumerate(zip(blocks, hashes, strict=True)):
        pool.commit(block, block_hash, position)
    pool.release(blocks)
    assert pool.evicted == 0
    pool.allocate(2)
    assert pool.match(hashes) == blocks[:2]
    assert pool.evicted == 2


def test_releasing_twice_is_a_programmer_error() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(blocks)


def test_hashes_chain_and_keep_namespaces_apart() -> None:
    tokens = list(range(40))
    space = namespace("model", "")
    hashes = block_hashes(tokens, space)
    assert len(hashes) == 2, "only full blocks have a hash"
    grown = hashes[:1]
    extend_hashes(grown, tokens, space)
    assert grown == hashes
    assert split_hashes(b"".join(hashes)) == hashes
    assert block_hashes(tokens, namespace("model", "salt"))[0] != hashes[0]
    assert block_hashes([7, *tokens[1:]], space)[1] != hashes[1], "the parent is part of it"
    with pytest.raises(ValueError, match="multiple of 16"):
        split_hashes(b"torn")


def test_a_lease_runs_from_its_start_and_never_lives_twice() -> None:
    table = LeaseTable(term_s=10.0)
    table.grant(Lease("r/1", "r", 1, "decode-0"), [1, 2])
    table.renew("r/1", 0.0)
    assert table.lapse(1e9) == [], "its owner still works on it"
    table.grant(Lease("r/1", "r", 1, "decode-0"), [3])
    table.start("r/1", 100.0)
    table.renew("r/1", 105.0)
    assert table.lapse(114.9) == []
    table.renew("r/1", 115.0)  # too late: it ended at this very moment
    assert [lease.lease_id for lease in table.lapse(115.0)] == ["r/1"]
    assert table.end("r/1") is None
    assert table.lapsed == 1 and table.leased_blocks() == set()
