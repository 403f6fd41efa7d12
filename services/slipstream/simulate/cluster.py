"""One run: the real machines of a cluster, put together and driven through a trace."""

import gc
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec

from slipstream.core.machine import Effect, Event, Machine, PeerUp, Send, Started
from slipstream.core.worker import WorkerMachine
from slipstream.core.worker_settings import WorkerSettings
from slipstream.kvindex.machine import KvIndexMachine, KvIndexSettings
from slipstream.messages import SCHEDULER, Decode, NodeInfo, TokenizerInfo, WorkerInfo
from slipstream.scheduler.machine import SchedulerMachine
from slipstream.scheduler.policy import Disaggregation, Policy
from slipstream.scheduler.settings import SchedulerSettings
from slipstream.simulate.driver import Driver, Limits
from slipstream.simulate.hardware import Hardware
from slipstream.simulate.prompts import Prompts
from slipstream.simulate.tier import HostTier
from slipstream.simulate.trace import TraceRequest, scaled
from slipstream.simulate.world import Process, World
from slipstream.types import BLOCK_TOKENS, NodeId, Role

START_S = 5.0
"""The first request comes when everybody knows everybody."""
LAYOUT_ID = "simulated"


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """All that decides what happens in one run, beside the requests."""

    policy: Policy
    disaggregation: Disaggregation
    rate_scale: float
    workers: int
    prefill: int
    """Workers among them that only compute prompts; 0: all do both."""
    hardware: Hardware
    host_cache_tokens: int
    """Host memory of each worker for evicted blocks; 0: none."""
    offload_after_hits: int
    limits: Limits
    timeout_s: float
    max_requests: int
    bus_latency_s: float


class TimedScheduler:
    """The scheduler's machine with a clock at its door: of processor time, since runs beside each
    other take turns on the cores."""

    def __init__(self, machine: SchedulerMachine):
        self.inner = machine
        self.placement_s = array("d")
        """Of each placement its share of the call that made it."""

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        begin_s = time.thread_time()
        effects = self.inner.handle(event, now_s)
        elapsed_s = time.thread_time() - begin_s
        placed = sum(isinstance(e, Send) and isinstance(e.message, Decode) for e in effects)
        self.placement_s.extend([elapsed_s / placed] * placed if placed else ())
        return effects

    def statistics(self) -> dict[str, float]:
        return self.inner.statistics()

    def check(self) -> None:
        self.inner.check()


def scheduler_settings(run: Run) -> SchedulerSettings:
    """The one place where a policy becomes the scheduler's."""
    return SchedulerSettings(
        policy=run.policy, disaggregation=run.disaggregation, max_requests=run.max_requests
    )


class Cluster:
    def __init__(self, run: Run, requests: Sequence[TraceRequest], prompts: Prompts):
        self.settings = run
        hardware = run.hardware
        self.world = World(hardware, hardware.vocab_size - 1, run.bus_latency_s)
        self.scheduler = TimedScheduler(
            SchedulerMachine(_node(SCHEDULER, Role.SCHEDULER), scheduler_settings(run))
        )
        knows = TokenizerInfo(model=hardware.model)
        node = msgspec.structs.replace(_node("tokenizer-0", Role.TOKENIZER), tokenizer=knows)
        timed = [
            msgspec.structs.replace(request, arrival_s=request.arrival_s + START_S)
            for request in scaled(requests, run.rate_scale)
        ]
        self.driver = Driver(node, timed, prompts, run.limits, run.timeout_s)
        index = KvIndexMachine(_node("kvindex-0", Role.KVINDEX), KvIndexSettings())
        self.workers = {info.node_id: self._worker(info) for info in self._workers()}
        machines: dict[NodeId, Machine] = {
            SCHEDULER: self.scheduler,
            "kvindex-0": index,
            node.node_id: self.driver,
            **self.workers,
        }
        self.processes = [
            Process(self.world, node_id, machine, self._tier(node_id))
            for node_id, machine in machines.items()
        ]
        self._introduce()
        drive = self.world.processes[node.node_id]
        for number, request in enumerate(timed):
            self.world.at(request.arrival_s, self._arrive, drive, number)

    def run(self, late_max: int | None = None) -> None:
        """Until every request has ended, or more than `late_max` outside of the limits."""
        driver = self.driver
        if late_max is None:
            self._run(lambda: not driver.open)
        else:
            self._run(lambda: not driver.open or driver.late > late_max)

    def settle(self, for_s: float) -> None:
        """Let time go by."""
        until_s = self.world.now_s + for_s
        self._run(lambda: self.world.now_s >= until_s)

    def _run(self, until: Callable[[], bool]) -> None:
        with _no_garbage_collection():
            self.world.run(until)

    def _arrive(self, drive: Process, number: int) -> None:
        drive.perform(self.driver.submit(number, self.world.now_s))

    def _introduce(self) -> None:
        """Sessions stand from the beginning to the end."""
        for process in self.processes:
            self.world.at(0.0, process.post, Started())
            for other in self.processes:
                if other is not process:
                    self.world.at(0.0, process.post, PeerUp(other.node_id, 1))

    def _worker(self, info: NodeInfo) -> WorkerMachine:
        run = self.settings
        after_hits = run.offload_after_hits if run.host_cache_tokens else None
        return WorkerMachine(info, WorkerSettings(offload_after_hits=after_hits))

    def _tier(self, node_id: NodeId) -> HostTier | None:
        run = self.settings
        if node_id not in self.workers or not run.host_cache_tokens:
            return None
        return HostTier(run.hardware, run.host_cache_tokens // BLOCK_TOKENS)

    def _workers(self) -> list[NodeInfo]:
        run = self.settings
        infos = []
        for index in range(run.workers):
            apart = index < run.prefill
            role = Role.PREFILL if apart else Role.DECODE
            number = index if apart else index - run.prefill
            infos.append(_node(f"{role}-{number}", role, _offer(run.hardware, not apart)))
        return infos


def _node(node_id: NodeId, role: Role, worker: WorkerInfo | None = None) -> NodeInfo:
    return NodeInfo(node_id=node_id, role=role, epoch=1, address=node_id, worker=worker)


def _offer(hardware: Hardware, accept_decode: bool) -> WorkerInfo:
    return WorkerInfo(
        model=hardware.model,
        kv_layout_id=LAYOUT_ID,
        num_blocks=hardware.kv_cache_tokens // BLOCK_TOKENS,
        block_bytes=hardware.kv_bytes_per_token * BLOCK_TOKENS,
        max_model_len=hardware.max_model_len,
        vocab_size=hardware.vocab_size,
        max_num_seqs=hardware.max_num_seqs,
        prefill_budget_tokens=hardware.prefill_budget_tokens,
        accept_decode=accept_decode,
        transports={"simulated": ""},
    )


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Nothing here grows in cycles, and the collector would go through millions of objects."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
