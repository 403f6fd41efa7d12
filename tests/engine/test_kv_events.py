"""KV events as other routers read them: frames, past, and vLLM's own bytes."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from slipstream.config import StartError
from slipstream.core.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent
from slipstream.engine import kv_events
from slipstream.engine.kv_events import END, KvEventPublisher, encode

WAIT_MS = 30_000
A, B, C = (letter * 16 for letter in (b"a", b"b", b"c"))
AT_S = 1763708000.5


def stored(
    hashes: tuple[bytes, ...],
    parent: bytes | None,
    tokens: range,
    medium: str = "GPU",
) -> BlockStored:
    return BlockStored(
        block_hashes=hashes,
        parent_block_hash=parent,
        token_ids=tuple(tokens),
        block_size=16 if tokens else 0,
        lora_id=None,
        medium=medium,
        lora_name=None,
    )


EVENTS: tuple[KvEvent, ...] = (
    AllBlocksCleared(),
    stored((A, B), None, range(32)),
    stored((C,), B, range(300, 316)),
    stored((A,), None, range(0), "CPU"),
    BlockRemoved(block_hashes=(A,), medium="GPU"),
)
VLLM_0_32 = bytes.fromhex(
    "93cb41da4803182000009581a474797065b0416c6c426c6f636b73436c656172656488a474797065ab426c6f"
    "636b53746f726564ac626c6f636b5f68617368657392c41061616161616161616161616161616161c4106262"
    "6262626262626262626262626262b1706172656e745f626c6f636b5f68617368c0a9746f6b656e5f696473dc"
    "0020000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1faa626c6f636b5f73697a"
    "6510a76c6f72615f6964c0a66d656469756da3475055a96c6f72615f6e616d65c088a474797065ab426c6f63"
    "6b53746f726564ac626c6f636b5f68617368657391c41063636363636363636363636363636363b170617265"
    "6e745f626c6f636b5f68617368c41062626262626262626262626262626262a9746f6b656e5f696473dc0010"
    "cd012ccd012dcd012ecd012fcd0130cd0131cd0132cd0133cd0134cd0135cd0136cd0137cd0138cd0139cd01"
    "3acd013baa626c6f636b5f73697a6510a76c6f72615f6964c0a66d656469756da3475055a96c6f72615f6e61"
    "6d65c088a474797065ab426c6f636b53746f726564ac626c6f636b5f68617368657391c41061616161616161"
    "616161616161616161b1706172656e745f626c6f636b5f68617368c0a9746f6b656e5f69647390aa626c6f63"
    "6b5f73697a6500a76c6f72615f6964c0a66d656469756da3435055a96c6f72615f6e616d65c083a474797065"
    "ac426c6f636b52656d6f766564ac626c6f636b5f68617368657391c410616161616161616161616161616161"
    "61a66d656469756da347505500"
)
"""`EVENTS` at `AT_S`, made with the classes of `vllm.distributed.kv_events` 0.32.0, encoded by
`msgspec.msgpack` as its publisher does. Its rank is 0 there too."""


def test_the_map_form_is_vllms_byte_for_byte() -> None:
    assert encode(EVENTS, AT_S, "map") == VLLM_0_32


def test_vllm_reads_it_where_it_is_installed() -> None:
    """Its own classes if there are any, else what they are made of."""
    batch = msgspec.msgpack.decode(encode(EVENTS, AT_S, "map"), type=_vllm_batch())
    assert (batch.ts, batch.data_parallel_rank) == (AT_S, 0)
    names = [type(event).__name__ for event in batch.events]
    assert names == ["AllBlocksCleared", *["BlockStored"] * 3, "BlockRemoved"]
    _, first, second, lower, removed = batch.events
    assert first.block_hashes == [A, B] and first.token_ids == list(range(32))
    assert second.parent_block_hash == B and second.block_size == 16
    assert (lower.medium, lower.token_ids, removed.block_hashes) == ("CPU", [], [A])


def _vllm_batch() -> Any:
    try:
        return importlib.import_module("vllm.distributed.kv_events").KVEventBatch
    except ImportError:
        return _CopiedBatch


class _Copied(msgspec.Struct, omit_defaults=True, tag=True):
    pass


class _CopiedStored(_Copied, tag="BlockStored"):
    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None


class _CopiedRemoved(_Copied, tag="BlockRemoved"):
    block_hashes: list[bytes | int]
    medium: str | None


class _CopiedCleared(_Copied, tag="AllBlocksCleared"):
    pass


_CopiedStored.__name__, _CopiedRemoved.__name__ = "BlockStored", "BlockRemoved"
_CopiedCleared.__name__ = "AllBlocksCleared"


class _CopiedBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    ts: float
    events: list[_CopiedStored | _CopiedRemoved | _CopiedCleared]
    data_parallel_rank: int | None = None


def test_the_array_form_is_tag_and_fields_in_order() -> None:
    assert msgspec.msgpack.decode(encode(EVENTS, AT_S, "array")) == [
        AT_S,
        [
            ["AllBlocksCleared"],
            ["BlockStored", [A, B], None, list(range(32)), 16, None, "GPU", None],
            ["BlockStored", [C], B, list(range(300, 316)), 16, None, "GPU", None],
            ["BlockStored", [A], None, [], 0, None, "CPU", None],
            ["BlockRemoved", [A], "GPU"],
        ],
        0,
    ]


class Listener:
    """A router: subscribed to everything, and able to ask for the past."""

    def __init__(self, folder: Path) -> None:
        self.context = zmq.Context()
        self.endpoint, self.replay = (f"ipc://{folder}/{name}" for name in ("pub", "replay"))

    def subscribe(self, address: str = "", bind: bool = False) -> "zmq.Socket[bytes]":
        socket = self.context.socket(zmq.SUB)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.setsockopt(zmq.RCVTIMEO, WAIT_MS)
        (socket.bind if bind else socket.connect)(address or self.endpoint)
        return socket

    def past(self, first: int) -> list[tuple[bytes, int, bytes]]:
        socket = self.context.socket(zmq.DEALER)
        socket.setsockopt(zmq.RCVTIMEO, WAIT_MS)
        socket.connect(self.replay)
        socket.send_multipart([b"", first.to_bytes(8, "big")])
        found = []
        while (frames := socket.recv_multipart())[2] != END:
            assert frames[0] == b""
            found.append((frames[1], int.from_bytes(frames[2], "big"), frames[3]))
        assert frames == [b"", b"", END, b""]
        return found


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    listener = Listener(tmp_path)
    yield listener
    listener.context.destroy(linger=0)


def until_heard(publisher: KvEventPublisher, socket: "zmq.Socket[bytes]") -> int:
    """Publishes until the subscription holds; the number of the first batch that was heard."""
    for _ in range(3000):
        publisher.publish((AllBlocksCleared(),))
        if socket.poll(10):
            return int.from_bytes(socket.recv_multipart()[1], "big")
    raise AssertionError("not heard")


def test_frames_and_the_past(listener: Listener) -> None:
    publisher = KvEventPublisher(listener.endpoint, listener.replay, "kv@decode-0@toy")
    socket = listener.subscribe()
    until_heard(publisher, socket)
    while socket.poll(100):
        socket.recv()
    publisher.publish(EVENTS)
    topic, number, payload = socket.recv_multipart()
    assert topic == b"kv@decode-0@toy"
    assert msgspec.msgpack.decode(payload)[1] == msgspec.msgpack.decode(VLLM_0_32)[1]
    seq = int.from_bytes(number, "big")
    past = listener.past(0)
    assert [entry[1] for entry in past] == list(range(seq + 1)), "from the first on"
    assert past[-1] == (topic, seq, payload)
    assert listener.past(seq) == past[-1:]
    assert listener.past(seq + 1) == []
    nonsense = listener.context.socket(zmq.DEALER)
    nonsense.connect(listener.replay)
    nonsense.send_multipart([b"what", b"is", b"this"])
    nonsense.send(b"")
    assert listener.past(seq) == past[-1:], "it goes on answering"
    publisher.close()
    publisher.close()


def test_what_is_kept_is_bounded(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_events, "KEPT_BATCHES", 5)
    monkeypatch.setattr(kv_events, "KEPT_BYTES", 1000)
    publisher = KvEventPublisher(listener.endpoint, listener.replay, "t")
    for _ in range(20):
        publisher.publish((AllBlocksCleared(),))
    assert [seq for _, seq, _ in listener.past(0)] == list(range(15, 20))
    for _ in range(5):
        publisher.publish(EVENTS)
    assert 0 < len(listener.past(0)) < 5
    assert [seq for _, seq, _ in listener.past(24)] == [24]
    publisher.close()


def test_an_address_without_a_star_is_connected_to(listener: Listener) -> None:
    probe = listener.context.socket(zmq.SUB)
    port = probe.bind_to_random_port("tcp://127.0.0.1")
    probe.setsockopt(zmq.SUBSCRIBE, b"")
    publisher = KvEventPublisher(f"tcp://127.0.0.1:{port}", "", "t")
    until_heard(publisher, probe)
    publisher.close()


def test_an_address_that_is_taken_is_one_line(listener: Listener) -> None:
    probe = listener.context.socket(zmq.SUB)
    port = probe.bind_to_random_port("tcp://*")
    with pytest.raises(StartError, match="each worker needs an address of its own") as caught:
        KvEventPublisher(f"tcp://*:{port}", "", "t")
    assert caught.value.exit_code == 5
    with pytest.raises(StartError, match="KV events"):
        KvEventPublisher("tcp://nonsense", "", "t")
