"""What a worker's machine decides, done: steps on a compute thread, READs on transfer threads."""

import asyncio
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from slipstream.core.machine import (
    BatchDone,
    BatchFailed,
    BatchPlan,
    Effect,
    Event,
    PublishKvEvents,
    PullBlocks,
    PullDone,
    RowOutput,
    RunBatch,
)
from slipstream.engine.kv_events import KvEventPublisher
from slipstream.kv.digest import block_digests
from slipstream.kv.segment import Blocks
from slipstream.kv.transport import TransferError, Transports
from slipstream.messages import NodeInfo
from slipstream.types import NodeId

TRANSFER_THREADS = 2
SWEEP_PERIOD_S = 1.0
CAUSE_CHARACTERS = 300

_LOG = logging.getLogger(__name__)


class StepRunner(Protocol):
    def run(self, plan: BatchPlan) -> tuple[RowOutput, ...]: ...


class WorkerExecutor:
    """`RunBatch` and `PullBlocks`; each ends as exactly one event, whatever happens."""

    def __init__(
        self,
        runner: StepRunner,
        blocks: Blocks,
        transports: Transports,
        directory: Callable[[NodeId], NodeInfo | None],
        kv_events: KvEventPublisher | None = None,
    ):
        """`blocks`: the runner's pool as bytes. `directory`: who a node id is now."""
        self._kv_events = kv_events
        self._runner, self._blocks = runner, blocks
        self._transports, self._directory = transports, directory
        self._compute = ThreadPoolExecutor(1, "compute")
        self._transfer = ThreadPoolExecutor(TRANSFER_THREADS, "transfer")
        self._post: Callable[[Event], None] = lambda event: None
        self._sweeping: asyncio.Task[None] | None = None
        self._counters: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    async def start(self, post: Callable[[Event], None]) -> None:
        self._post = post
        self._sweeping = asyncio.create_task(self._sweep())

    def execute(self, effect: Effect) -> None:
        match effect:
            case RunBatch(plan):
                self._compute.submit(self._run, plan)
            case PullBlocks():
                peer = self._directory(effect.peer)
                deadline_s = time.monotonic() + effect.timeout_s
                self._transfer.submit(self._pull, effect, peer, deadline_s)
            case PublishKvEvents(events):
                assert self._kv_events is not None
                self._kv_events.publish(events)
            case _:
                raise TypeError(f"a worker does not execute {type(effect).__name__}")

    async def close(self) -> None:
        """Ends READs under way; waits for the step under way."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        await asyncio.to_thread(self._stop)

    def statistics(self) -> dict[str, float]:
        """Reads, bytes, seconds and failures by cause of each transport; steps and their seconds.

        Any thread.
        """
        with self._lock:
            return dict(self._counters)

    def _run(self, plan: BatchPlan) -> None:
        began_s = time.monotonic()
        try:
            outputs = self._runner.run(plan)
            digests = block_digests(self._blocks, plan.digest_blocks)
        except Exception as error:  # noqa: BLE001 a step that says nothing would hang the machine
            _LOG.exception("step %d failed", plan.step)
            self._count("steps_failed_total")
            self._post(BatchFailed(plan.step, _one_line(error)))
            return
        elapsed_s = time.monotonic() - began_s
        self._count("steps_total")
        self._count("step_seconds_total", elapsed_s)
        by_block = dict(zip(plan.digest_blocks, digests, strict=True))
        self._post(BatchDone(plan.step, outputs, by_block, elapsed_s))

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
            done = PullDone(effect.pull_id, block_digests(self._blocks, effect.local_blocks))
        except TransferError as error:
            _LOG.warning("READ %s from %s failed: %s", effect.pull_id, effect.peer, error)
            self._count(f"transfer_{name}_failures_{error.cause}_total")
            done = PullDone(effect.pull_id, error=error.cause)
        except Exception as error:  # noqa: BLE001 its blocks would be in quarantine for ever
            _LOG.exception("READ %s from %s failed", effect.pull_id, effect.peer)
            self._count(f"transfer_{name}_failures_internal_total")
            done = PullDone(effect.pull_id, error=_one_line(error))
        else:
            num_bytes = len(effect.local_blocks) * self._blocks.shape[1]
            self._count(f"transfer_{name}_reads_total")
            self._count(f"transfer_{name}_bytes_total", num_bytes)
            self._count(f"transfer_{name}_seconds_total", time.monotonic() - began_s)
        self._post(done)

    async def _sweep(self) -> None:
        """A mapped segment of a dead peer would keep its memory."""
        while True:
            await asyncio.sleep(SWEEP_PERIOD_S)
            for node_id, epoch in self._transports.peers.items():
                peer = self._directory(node_id)
                if peer is None or peer.epoch != epoch:
                    self._transfer.submit(self._transports.forget, node_id)

    def _stop(self) -> None:
        self._transports.close()
        self._transfer.shutdown(cancel_futures=True)
        self._compute.shutdown(cancel_futures=True)

    def _count(self, name: str, amount: float = 1) -> None:
        with self._lock:
            self._counters[name] += amount


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:CAUSE_CHARACTERS]
