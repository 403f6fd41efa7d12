"""What a worker's machine decides, done: steps on a compute thread, the rest in `transfers`."""

import asyncio
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial

from slipstream.core.machine import (
    AdapterRead,
    BatchDone,
    BatchFailed,
    BatchPlan,
    Counted,
    DigestBlocks,
    DropAdapter,
    Effect,
    Event,
    LoadAdapter,
    LoadBlocks,
    PublishKvEvents,
    PullBlocks,
    RunBatch,
    SaveBlocks,
)
from slipstream.engine.adapters import AdapterBook
from slipstream.engine.effect_threads import EffectThreads, one_line
from slipstream.engine.kv_events import KvEventPublisher
from slipstream.engine.offload import Offload
from slipstream.engine.step_loop import Outputs, StepLoop, StepRunner
from slipstream.engine.team import Team, TeamTransfers
from slipstream.engine.transfers import Transfers
from slipstream.errors import ErrorCode, Problem
from slipstream.kv.choice import Transports
from slipstream.kv.device import PoolBlocks
from slipstream.kv.digest import block_digests
from slipstream.messages import NodeInfo
from slipstream.types import NodeId

COUNTED_PERIOD_S = 0.5
_LOG = logging.getLogger(__name__)


class WorkerExecutor:
    """Steps and what `Transfers` does; each effect ends as exactly one event, whatever happens."""

    def __init__(
        self,
        runner: StepRunner,
        blocks: PoolBlocks,
        transports: Transports,
        directory: Callable[[], Mapping[NodeId, NodeInfo]],
        offload: Offload | None = None,
        kv_events: KvEventPublisher | None = None,
        team: Team | None = None,
        adapters: AdapterBook | None = None,
    ):
        """`blocks`: the runner's pool as bytes. `directory`: who is there now. `offload`,
        `kv_events`: where the machine's settings have them. `team`: the worker's other ranks.
        `adapters`: the runner's."""
        self._offload, self._kv_events = offload, kv_events
        self._blocks = blocks
        self._team = team
        self._adapters = adapters
        self._reads = EffectThreads(1, "adapters")
        own = Transfers(blocks, transports, directory)
        self._transfers = own if team is None else TeamTransfers(own, team, directory)
        self._post: Callable[[Event], None] = lambda event: None
        self._steps = StepLoop(runner, lambda event: self._post(event), self._done, self._failed)
        self._counters: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()
        self._telling: asyncio.Task[None] | None = None

    async def start(self, post: Callable[[Event], None]) -> None:
        self._post = post
        self._transfers.start(post)
        if self._offload is not None:
            self._offload.start(post)
        self._telling = asyncio.create_task(self._tell())

    def execute(self, effect: Effect) -> None:
        match effect:
            case RunBatch(plan):
                self._steps.submit(plan)
            case PullBlocks() | DigestBlocks():
                self._transfers.execute(effect)
            case SaveBlocks() | LoadBlocks() if self._offload is not None:
                self._offload.execute(effect)
            case LoadAdapter(name, path) if self._adapters is not None:
                self._load(self._adapters, name, path)
            case DropAdapter(adapter_id) if self._adapters is not None:
                _LOG.info("drops the LoRA adapter %s", adapter_id)
                place = self._adapters.leave(adapter_id)
                self._steps.between(partial(self._adapters.drop, adapter_id, place))
            case PublishKvEvents(events):
                assert self._kv_events is not None
                self._kv_events.publish(events)
            case _:
                raise TypeError(f"a worker does not execute {type(effect).__name__}")

    async def close(self) -> None:
        """Ends READs under way; waits for the step under way."""
        if self._telling is not None:
            self._telling.cancel()
        self._reads.cancel()
        await self._transfers.close()
        await asyncio.to_thread(self._steps.close)
        if self._offload is not None:
            await asyncio.to_thread(self._offload.close)

    def statistics(self) -> dict[str, float]:
        """Reads, bytes, seconds and failures by cause of each transport; steps, what was in them
        and their seconds.

        Any thread.
        """
        tiers = {} if self._offload is None else self._offload.store.statistics()
        with self._lock:
            return self._transfers.statistics() | tiers | self._counters

    async def _tell(self) -> None:
        """So that the frontends' /metrics have it too."""
        while True:
            await asyncio.sleep(COUNTED_PERIOD_S)
            self._post(Counted(self.statistics()))

    def _load(self, adapters: AdapterBook, name: str, path: str) -> None:
        """Read in a thread; rows may want it when it has been put in its place between two steps,
        and that is said then."""

        def failed(error: Exception) -> AdapterRead:
            line = f"the LoRA adapter {name} could not be loaded: {one_line(error)}"
            return AdapterRead(
                name,
                path,
                problem=Problem(code=ErrorCode.INTERNAL, message=line, param="lora_path"),
            )

        def put(read: Event) -> None:
            assert isinstance(read, AdapterRead)
            if read.adapter is not None:
                adapter_id = read.adapter.adapter_id
                try:
                    adapters.put(adapter_id)
                except Exception as error:  # noqa: BLE001 whatever a device says, it is one event
                    _LOG.exception("adapter %s", name)
                    adapters.drop(adapter_id, adapters.leave(adapter_id))
                    read = failed(error)
            self._post(read)

        self._reads.submit(
            lambda event: self._steps.between(lambda: put(event)),
            f"adapter {name}",
            lambda: adapters.read(name, path),
            failed,
        )

    def _done(self, plan: BatchPlan, outputs: Outputs, began_s: float) -> BatchDone:
        digests = block_digests(self._blocks, plan.digest_blocks)
        if self._team is not None:
            digests = self._team.digests(digests, plan.digest_blocks)
        elapsed_s = time.monotonic() - began_s
        self._count("steps_total")
        self._count("step_rows_total", len(plan.rows))
        prompt_tokens = sum(row.num_tokens for row in plan.rows if row.num_tokens > 1)
        self._count("prompt_tokens_total", prompt_tokens)
        self._count("tokens_total", sum(len(output.tokens) for output in outputs))
        self._count("draft_tokens_total", sum(output.drafted for output in outputs))
        right = sum(max(0, len(output.tokens) - 1) for output in outputs if output.drafted)
        self._count("draft_tokens_right_total", right)
        self._count("step_seconds_total", elapsed_s)
        by_block = dict(zip(plan.digest_blocks, digests, strict=True))
        return BatchDone(plan.step, outputs, by_block, elapsed_s)

    def _failed(self, plan: BatchPlan, error: Exception) -> BatchFailed:
        self._count("steps_failed_total")
        return BatchFailed(plan.step, one_line(error))

    def _count(self, name: str, amount: float = 1) -> None:
        with self._lock:
            self._counters[name] += amount
