"""What moves and reads KV blocks beside the steps: READs, digests, and the measuring of peers."""

import asyncio
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from slipstream.core.machine import BlocksDigested, DigestBlocks, Event, PullBlocks, PullDone
from slipstream.engine.effect_threads import EffectThreads, one_line
from slipstream.kv.choice import Transports
from slipstream.kv.device import PoolBlocks
from slipstream.kv.digest import block_digests
from slipstream.kv.transport import Digests, Read, TransferError, Transport
from slipstream.messages import NodeInfo
from slipstream.types import NodeId

TRANSFER_THREADS = 2
"""They begin READs and copy; nothing that waits for a peer holds one of them."""
WARM_UP_THREADS = 2
SWEEP_PERIOD_S = 0.25

_LOG = logging.getLogger(__name__)


class Transfers:
    """`PullBlocks` and `DigestBlocks`; each ends as exactly one event, whatever happens."""

    def __init__(
        self,
        blocks: PoolBlocks,
        transports: Transports,
        directory: Callable[[], Mapping[NodeId, NodeInfo]],
    ):
        """`blocks`: the pool as bytes. `directory`: who is there now."""
        self._blocks, self._transports, self._directory = blocks, transports, directory
        self._threads = ThreadPoolExecutor(TRANSFER_THREADS, "transfer")
        self._digesting = EffectThreads(1, "digest")
        self._warming = ThreadPoolExecutor(WARM_UP_THREADS, "warm-up")
        self._measuring: set[NodeId] = set()
        self._post: Callable[[Event], None] = lambda event: None
        self._sweeping: asyncio.Task[None] | None = None
        self._counters: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    def start(self, post: Callable[[Event], None]) -> None:
        """Of a running loop."""
        self._post = post
        self._sweeping = asyncio.create_task(self._sweep())

    def execute(self, effect: PullBlocks | DigestBlocks) -> None:
        if isinstance(effect, DigestBlocks):
            self._digesting.submit(
                *(self._post, f"digest of {effect.op_id}"),
                work=lambda: self._digest(effect),
                failed=lambda _: BlocksDigested(effect.op_id, None),
            )
            return
        pull = _Pull(effect, self._directory().get(effect.peer), time.monotonic())
        self._threads.submit(self._begin, pull)

    async def close(self) -> None:
        """Ends READs under way; waits until their threads are gone."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        await asyncio.to_thread(self._stop)

    def statistics(self) -> dict[str, float]:
        """Reads, bytes, seconds and failures by cause of each transport, and its rate. Any
        thread."""
        with self._lock:
            return self._transports.statistics() | self._counters

    def _digest(self, effect: DigestBlocks) -> BlocksDigested:
        return BlocksDigested(effect.op_id, block_digests(self._blocks, effect.blocks))

    def _begin(self, pull: "_Pull") -> None:
        effect, peer = pull.effect, pull.peer
        deadline_s = pull.began_s + effect.timeout_s
        try:
            if peer is None or peer.epoch != effect.epoch:
                raise TransferError("epoch", f"{effect.peer} is not what it was")
            if deadline_s <= time.monotonic():
                raise TransferError("timeout", "no transfer thread came free")
            pull.transport = self._transports.choose(peer)
            pull.transport.read(
                Read(
                    peer,
                    effect.source_blocks,
                    self._blocks,
                    effect.local_blocks,
                    deadline_s,
                    lambda result: self._over(pull, result),
                )
            )
        except TransferError as error:
            self._over(pull, error)
        except Exception as error:  # noqa: BLE001 its blocks would be in quarantine for ever
            _LOG.exception("READ %s from %s failed", effect.pull_id, effect.peer)
            self._over(pull, TransferError("internal", one_line(error)))

    def _over(self, pull: "_Pull", result: Digests | TransferError) -> None:
        """Any thread."""
        effect, transport = pull.effect, pull.transport
        name = transport.name if transport else "none"
        elapsed_s = time.monotonic() - pull.began_s
        if isinstance(result, TransferError):
            _LOG.warning("READ %s from %s failed: %s", effect.pull_id, effect.peer, result)
            if transport is not None and pull.peer is not None:
                self._transports.failed(pull.peer, transport, result.cause)
            self._count(f"transfer_{name}_failures_{result.cause}_total")
            self._post(PullDone(effect.pull_id, (), result.cause, name, elapsed_s))
            return
        num_bytes = len(effect.local_blocks) * self._blocks.shape[1]
        self._count(f"transfer_{name}_reads_total")
        self._count(f"transfer_{name}_bytes_total", num_bytes)
        self._count(f"transfer_{name}_seconds_total", elapsed_s)
        self._post(PullDone(effect.pull_id, result, None, name, elapsed_s))

    async def _sweep(self) -> None:
        while True:
            try:
                self._look()
            except Exception:  # noqa: BLE001 nobody would be measured, or let go, any more
                _LOG.exception("looking at peers")
            await asyncio.sleep(SWEEP_PERIOD_S)

    def _look(self) -> None:
        """Lets go of dead peers, whose memory a mapping would keep; measures new ones."""
        directory = self._directory()
        for node_id, epoch in self._transports.peers.items():
            peer = directory.get(node_id)
            if peer is None or peer.epoch != epoch:
                self._threads.submit(self._transports.forget, node_id)
        for peer in list(directory.values()):
            due = self._transports.due(peer, time.monotonic())
            if due and peer.node_id not in self._measuring:
                self._measuring.add(peer.node_id)
                self._warming.submit(self._measure, peer)

    def _measure(self, peer: NodeInfo) -> None:
        try:
            self._transports.measure(peer)
        except Exception:  # noqa: BLE001 a thread pool would keep it to itself
            _LOG.exception("measuring %s", peer.node_id)
        finally:
            self._measuring.discard(peer.node_id)

    def _stop(self) -> None:
        self._transports.close()
        self._warming.shutdown(cancel_futures=True)
        self._threads.shutdown(cancel_futures=True)
        self._digesting.close()

    def _count(self, name: str, amount: float = 1) -> None:
        with self._lock:
            self._counters[name] += amount


class _Pull:
    """A `PullBlocks` on its way."""

    def __init__(self, effect: PullBlocks, peer: NodeInfo | None, began_s: float):
        self.effect, self.peer, self.began_s = effect, peer, began_s
        self.transport: Transport | None = None
