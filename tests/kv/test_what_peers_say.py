"""What a peer says of its pool is not believed: it is held against what can be."""

from typing import Any

import msgspec
import numpy as np
import pytest

from kv.conftest import Pair
from slipstream.kv.transport import TransferError, read_now

WAIT_S = 20.0


@pytest.mark.parametrize(
    ("cause", "lies"),
    [
        ("attach", {"transports": {}}),
        ("layout", {"block_bytes": 2048}),
        ("layout", {"block_bytes": 0}),
        ("malformed", {"num_blocks": 1 << 40}),
        ("malformed", {"num_blocks": -1}),
    ],
)
def test_what_a_peer_says_of_its_pool_has_to_be_possible(
    pair: Pair, cause: str, lies: dict[str, Any]
) -> None:
    source, transport, peer, ours = pair
    assert peer.worker is not None
    before = ours.blocks.copy()
    lying = msgspec.structs.replace(
        peer, node_id="liar", worker=msgspec.structs.replace(peer.worker, **lies)
    )
    with pytest.raises(TransferError) as raised:
        transport.connect(lying)
    assert raised.value.cause == cause
    with pytest.raises(TransferError):
        read_now(transport, lying, [0], ours.blocks, [0], WAIT_S)
    with pytest.raises(TransferError) as raised:
        read_now(transport, peer, [0], np.zeros((1, 2048), np.uint8), [0], WAIT_S)
    assert raised.value.cause == "layout"
    assert (ours.blocks == before).all()
    read_now(transport, peer, [5], ours.blocks, [0], WAIT_S)
    assert (ours.blocks[0] == source.blocks[5]).all()


def test_more_blocks_than_there_are(
    pair: Pair,
) -> None:
    """Said of a peer that is connected, and then of one that is to be."""
    _, transport, peer, ours = pair
    assert peer.worker is not None
    more = msgspec.structs.replace(peer.worker, num_blocks=41)
    before = ours.blocks.copy()
    with pytest.raises(TransferError) as raised:
        lying = msgspec.structs.replace(peer, worker=more)
        read_now(transport, lying, [40], ours.blocks, [0], WAIT_S)
    assert raised.value.cause == "range"
    lying = msgspec.structs.replace(peer, node_id="prefill-9", worker=more)
    with pytest.raises(TransferError) as raised:
        transport.connect(lying)
        read_now(transport, lying, [40], ours.blocks, [0], WAIT_S)
    assert raised.value.cause == ("range" if transport.name == "bus" else "attach")
    assert (ours.blocks == before).all()


@pytest.mark.parametrize("told", ["", "\0", "tcp://\0", "§", "x" * 5000])
def test_an_address_that_is_none(pair: Pair, told: str) -> None:
    _, transport, peer, ours = pair
    assert peer.worker is not None
    worker = msgspec.structs.replace(peer.worker, transports={transport.name: told})
    with pytest.raises(TransferError) as raised:
        transport.connect(msgspec.structs.replace(peer, node_id="liar", worker=worker))
    assert raised.value.cause == "attach"
    read_now(transport, peer, [5], ours.blocks, [0], WAIT_S)
