"""KV events on a PUB socket, and those of the recent past on a ROUTER, as vLLM offers them.

    PUB     [topic, sequence number, batch]       numbers: 8 bytes, big-endian, from 0
    ROUTER  asked [b"", first number]: [b"", topic, number, batch] for each that is kept, then
            [b"", b"", -1, b""]

A batch is msgpack: [s since 1970, [event, …], 0]. An event is a map (vLLM 0.32) or an array (llm-d,
vLLM before). Nobody has to listen: what a slow subscriber does not take is dropped for it alone.
"""

import errno
import logging
import threading
import time
from collections import deque
from typing import Literal, TypeAlias

import msgspec
import zmq

from slipstream.config import StartError
from slipstream.core.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent
from slipstream.errors import ExitCode

KEPT_BATCHES = 10_000
KEPT_BYTES = 64 << 20
HIGH_WATER = 100_000
END = (-1).to_bytes(8, "big", signed=True)
KvEventsFormat: TypeAlias = Literal["map", "array"]

_LOG = logging.getLogger(__name__)


class Batch(msgspec.Struct, frozen=True, array_like=True):
    ts: float
    events: list[msgspec.Raw]
    data_parallel_rank: int = 0


class _ArrayStored(BlockStored, frozen=True, array_like=True, tag="BlockStored"):
    pass


class _ArrayRemoved(BlockRemoved, frozen=True, array_like=True, tag="BlockRemoved"):
    pass


class _ArrayCleared(AllBlocksCleared, frozen=True, array_like=True, tag="AllBlocksCleared"):
    pass


_ARRAYS: dict[type[KvEvent], type[KvEvent]] = {
    BlockStored: _ArrayStored,
    BlockRemoved: _ArrayRemoved,
    AllBlocksCleared: _ArrayCleared,
}


def encode(events: tuple[KvEvent, ...], at_s: float, form: KvEventsFormat) -> bytes:
    """One batch."""
    if form == "array":
        events = tuple(_ARRAYS[type(e)](**msgspec.structs.asdict(e)) for e in events)
    packed = [msgspec.Raw(msgspec.msgpack.encode(event)) for event in events]
    return msgspec.msgpack.encode(Batch(at_s, packed))


class KvEventPublisher:
    """Owns both sockets; a thread of its own answers for the past."""

    def __init__(
        self, endpoint: str, replay_endpoint: str, topic: str, form: KvEventsFormat = "map"
    ):
        """As vLLM: an address with `*`, or ipc://, is bound, another one connected to.
        `replay_endpoint`: bound; empty: nothing is kept. StartError: an address cannot be used.
        """
        self._topic, self._form = topic.encode(), form
        self._context = zmq.Context()
        self._kept: deque[tuple[int, bytes]] = deque()
        self._kept_bytes = self._seq = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        try:
            self._publisher = self._socket(zmq.PUB, endpoint, _is_ours(endpoint))
            if replay_endpoint:
                replay = self._socket(zmq.ROUTER, replay_endpoint, True)
                stop = self._context.socket(zmq.PAIR)
                stop.bind("inproc://stop")
                self._stop = self._context.socket(zmq.PAIR)
                self._stop.connect("inproc://stop")
                arguments = (replay, stop)
                self._thread = threading.Thread(target=self._answer, args=arguments, name="replay")
        except BaseException:
            self._context.destroy(linger=0)
            raise
        if self._thread is not None:
            self._thread.start()

    def publish(self, events: tuple[KvEvent, ...]) -> None:
        """Never waits. One thread."""
        payload = encode(events, time.time(), self._form)
        seq, self._seq = self._seq, self._seq + 1
        if self._thread is not None:
            with self._lock:
                self._kept.append((seq, payload))
                self._kept_bytes += len(payload)
                while len(self._kept) > KEPT_BATCHES or self._kept_bytes > KEPT_BYTES:
                    self._kept_bytes -= len(self._kept.popleft()[1])
        self._publisher.send_multipart([self._topic, _packed(seq), payload])

    def close(self) -> None:
        """Idempotent."""
        if self._thread is not None and self._thread.is_alive():
            self._stop.send(b"")
            self._thread.join()
        self._context.destroy(linger=0)

    def _socket(self, kind: int, endpoint: str, bind: bool) -> "zmq.Socket[bytes]":
        socket = self._context.socket(kind)
        socket.set_hwm(HIGH_WATER)
        try:
            (socket.bind if bind else socket.connect)(endpoint)
        except zmq.ZMQError as error:
            code = ExitCode.PORT if error.errno == errno.EADDRINUSE else ExitCode.SETUP
            raise StartError(
                f"KV events: {endpoint}: {error.strerror}; each worker needs an address of its own",
                code,
            ) from None
        return socket

    def _answer(self, replay: "zmq.Socket[bytes]", stop: "zmq.Socket[bytes]") -> None:
        poller = zmq.Poller()
        poller.register(replay, zmq.POLLIN)
        poller.register(stop, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if stop in ready:
                replay.close(linger=0)
                stop.close(linger=0)
                return
            asked = replay.recv_multipart()
            if len(asked) != 3 or len(asked[2]) != 8:
                _LOG.warning("KV events: a replay request of %d frames is passed over", len(asked))
                continue
            client, first = asked[0], int.from_bytes(asked[2], "big")
            with self._lock:
                kept = [entry for entry in self._kept if entry[0] >= first]
            for seq, payload in kept:
                replay.send_multipart([client, b"", self._topic, _packed(seq), payload])
            replay.send_multipart([client, b"", b"", END, b""])


def _is_ours(endpoint: str) -> bool:
    return "*" in endpoint or "::" in endpoint or endpoint.startswith(("ipc://", "inproc://"))


def _packed(seq: int) -> bytes:
    return seq.to_bytes(8, "big")
