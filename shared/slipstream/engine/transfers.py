"""What moves and reads KV blocks beside the steps: READs and digests, on threads of their own."""

import asyncio
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from slipstream.core.machine import BlocksDigested, DigestBlocks, Event, PullBlocks, PullDone
from slipstream.kv.digest import block_digests
from slipstream.kv.segment import Blocks
from slipstream.kv.transport import TransferError, Transports
from slipstream.messages import NodeInfo
from slipstream.types import NodeId

TRANSFER_THREADS = 2
SWEEP_PERIOD_S = 1.0
CAUSE_CHARACTERS = 300

_LOG = logging.getLogger(__name__)


class Transfers:
    """`PullBlocks` and `DigestBlocks`; each ends as exactly one event, whatever happens."""

    def __init__(
        self,
        blocks: Blocks,
        transports: Transports,
        directory: Callable[[NodeId], NodeInfo | None],
    ):
        """`blocks`: the pool as bytes. `directory`: who a node id is now."""
        self._blocks, self._transports, self._directory = blocks, transports, directory
        self._threads = ThreadPoolExecutor(TRANSFER_THREADS, "transfer")
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
            self._threads.submit(self._digest, effect)
            return
        peer = self._directory(effect.peer)
        deadline_s = time.monotonic() + effect.timeout_s
        self._threads.submit(self._pull, effect, peer, deadline_s)

    async def close(self) -> None:
        """Ends READs under way; waits until their threads are gone."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        await asyncio.to_thread(self._stop)

    def statistics(self) -> dict[str, float]:
        """Reads, bytes, seconds and failures by cause of each transport. Any thread."""
        with self._lock:
            return dict(self._counters)

    def _digest(self, effect: DigestBlocks) -> None:
        self._post(BlocksDigested(effect.op_id, block_digests(self._blocks, effect.blocks)))

    def _pull(self, effect: PullBlocks, peer: NodeInfo | None, deadline_s: float) -> None:
        name = "none"
        began_s = time.monotonic()
        try:
            if peer is None or peer.epoch != effect.epoch:
                raise TransferError("epoch", f"{effect.peer} is not what it was")
            if deadline_s <= began_s:
                raise TransferError("timeout", "no transfer thread came free")
            transport = self._transports.choose(peer)
            name = transport.name
            left_s = deadline_s - time.monotonic()
            transport.read(peer, effect.source_blocks, effect.local_blocks, left_s)
            digests = block_digests(self._blocks, effect.local_blocks)
            elapsed_s = time.monotonic() - began_s
            done = PullDone(effect.pull_id, digests, None, name, elapsed_s)
        except TransferError as error:
            _LOG.warning("READ %s from %s failed: %s", effect.pull_id, effect.peer, error)
            self._count(f"transfer_{name}_failures_{error.cause}_total")
            done = PullDone(effect.pull_id, (), error.cause, name, time.monotonic() - began_s)
        except Exception as error:  # noqa: BLE001 its blocks would be in quarantine for ever
            _LOG.exception("READ %s from %s failed", effect.pull_id, effect.peer)
            self._count(f"transfer_{name}_failures_internal_total")
            cause = one_line(error)
            done = PullDone(effect.pull_id, (), cause, name, time.monotonic() - began_s)
        else:
            num_bytes = len(effect.local_blocks) * self._blocks.shape[1]
            self._count(f"transfer_{name}_reads_total")
            self._count(f"transfer_{name}_bytes_total", num_bytes)
            self._count(f"transfer_{name}_seconds_total", elapsed_s)
        self._post(done)

    async def _sweep(self) -> None:
        """A mapped segment of a dead peer would keep its memory."""
        while True:
            await asyncio.sleep(SWEEP_PERIOD_S)
            for node_id, epoch in self._transports.peers.items():
                peer = self._directory(node_id)
                if peer is None or peer.epoch != epoch:
                    self._threads.submit(self._transports.forget, node_id)

    def _stop(self) -> None:
        self._transports.close()
        self._threads.shutdown(cancel_futures=True)

    def _count(self, name: str, amount: float = 1) -> None:
        with self._lock:
            self._counters[name] += amount


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:CAUSE_CHARACTERS]
