"""Simulated time: events in order, messages between machines, and the devices of the workers.

A message arrives a constant time after it was sent, so order holds between any two. A READ has its
source's way out and its reader's way in for itself; others wait for both.
"""

import heapq
from collections.abc import Callable, Iterable
from typing import Any

from slipstream.core import machine as m
from slipstream.core.step_model import sample_of
from slipstream.kvindex.memory import MemoryStore
from slipstream.scheduler.prices import OWN_TIER
from slipstream.simulate.hardware import Hardware
from slipstream.simulate.tier import HostTier
from slipstream.types import NodeId

DIGEST = bytes(16)
"""Of every block: nothing in here tears one."""
STORE_S = 3e-4
"""What an answer of Redis takes."""
DIGEST_BLOCK_S = 1e-5


class World:
    def __init__(self, hardware: Hardware, generated_token: int, bus_latency_s: float):
        self.hardware, self.generated_token = hardware, generated_token
        self.bus_latency_s = bus_latency_s
        self.now_s = 0.0
        self.events = 0
        self.processes: dict[NodeId, Process] = {}
        self.store = MemoryStore()
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def at(self, at_s: float, action: Callable[..., None], *arguments: Any) -> None:
        self._count += 1
        heapq.heappush(self._heap, (at_s, self._count, action, arguments))

    def run(self, until: Callable[[], bool]) -> None:
        """Event after event until it is so, or nothing happens any more."""
        heap = self._heap
        while heap and not until():
            self.now_s, _, action, arguments = heapq.heappop(heap)
            self.events += 1
            action(*arguments)


class Process:
    """One machine, and a shell that carries out its effects in simulated time."""

    def __init__(
        self, world: World, node_id: NodeId, machine: m.Machine, tier: HostTier | None = None
    ):
        self.world, self.node_id, self.machine = world, node_id, machine
        self.tier = tier
        self.slower = 1.0
        """How many times longer its steps take than the hardware's."""
        self.busy_s = 0.0
        """Time in which its device computed."""
        self.work_s = 0.0
        """The same without what a step costs that does nothing."""
        self.prefill_tokens = self.decode_rows = 0
        self._way_out_s = self._way_in_s = 0.0
        """From when on no READ is on it."""
        self._deadlines: dict[str, float] = {}
        self._armed: dict[str, float] = {}
        """Timer -> its next wake-up in the heap, not later than its deadline."""
        self._perform: dict[type, Callable[[Any], None]] = {
            m.Send: self._send,
            m.SetTimer: self._set_timer,
            m.CancelTimer: self._cancel_timer,
            m.RunBatch: self._run_batch,
            m.PullBlocks: self._pull,
            m.DigestBlocks: self._digest,
            m.Note: lambda effect: None,
            m.SaveBlocks: self._save_blocks,
            m.LoadBlocks: self._load_blocks,
            **dict.fromkeys(
                (m.StoreApply, m.StoreReplace, m.StoreFind, m.StoreAlive, m.StoreForget),
                self._store,
            ),
        }
        world.processes[node_id] = self

    def post(self, event: m.Event) -> None:
        self.perform(self.machine.handle(event, self.world.now_s))

    def perform(self, effects: Iterable[m.Effect]) -> None:
        for effect in effects:
            self._perform[type(effect)](effect)

    def _later(self, delay_s: float, event: m.Event) -> None:
        self.world.at(self.world.now_s + delay_s, self.post, event)

    def _send(self, effect: m.Send) -> None:
        world = self.world
        receiver = world.processes[effect.to]
        received = m.Received(self.node_id, effect.message)
        world.at(world.now_s + world.bus_latency_s, receiver.post, received)

    # --- Timers -----------------------------------------------------------------------------------

    def _set_timer(self, effect: m.SetTimer) -> None:
        """A deadline that only moves on costs nothing: the heap holds one wake-up for each timer,
        which looks what the deadline is by then."""
        key, at_s = effect.key, effect.at_s
        self._deadlines[key] = at_s
        armed_s = self._armed.get(key)
        if armed_s is None or at_s < armed_s:
            self._arm(key, at_s)

    def _cancel_timer(self, effect: m.CancelTimer) -> None:
        self._deadlines.pop(effect.key, None)

    def _arm(self, key: str, at_s: float) -> None:
        self._armed[key] = at_s
        self.world.at(at_s, self._fire, key, at_s)

    def _fire(self, key: str, due_s: float) -> None:
        if self._armed.get(key) != due_s:
            return
        del self._armed[key]
        deadline_s = self._deadlines.get(key)
        if deadline_s is None:
            return
        if deadline_s > due_s:
            self._arm(key, deadline_s)
            return
        del self._deadlines[key]
        self.post(m.TimerFired(key))

    # --- What takes time --------------------------------------------------------------------------

    def _run_batch(self, effect: m.RunBatch) -> None:
        plan, token = effect.plan, (self.world.generated_token,)
        work = sample_of(plan.rows)
        elapsed_s = self.world.hardware.step.step_s(work) * self.slower
        self.busy_s += elapsed_s
        self.work_s += elapsed_s - self.world.hardware.step.base_s * self.slower
        self.prefill_tokens += work.prefill_tokens
        self.decode_rows += work.decode_rows
        outputs = tuple(
            m.RowOutput(row.request_id, row.attempt, token) for row in plan.rows if row.sample
        )
        digests = dict.fromkeys(plan.digest_blocks, DIGEST)
        self._later(elapsed_s, m.BatchDone(plan.step, outputs, digests, elapsed_s))

    def _pull(self, effect: m.PullBlocks) -> None:
        world, source = self.world, self.world.processes[effect.peer]
        count = len(effect.source_blocks)
        begin_s = max(world.now_s, source._way_out_s, self._way_in_s)
        end_s = begin_s + world.hardware.read_s(count)
        source._way_out_s = self._way_in_s = end_s
        elapsed_s = end_s - world.now_s
        done = m.PullDone(
            effect.pull_id, (DIGEST,) * count, transport="simulated", elapsed_s=elapsed_s
        )
        self._later(elapsed_s, done)

    def _digest(self, effect: m.DigestBlocks) -> None:
        digests = (DIGEST,) * len(effect.blocks)
        delay_s = DIGEST_BLOCK_S * len(digests)
        self._later(delay_s, m.BlocksDigested(effect.op_id, digests))

    def _save_blocks(self, effect: m.SaveBlocks) -> None:
        world, tier = self.world, self.tier
        assert tier is not None
        world.at(tier.down_s(len(effect.blocks), world.now_s), self._saved, effect, tier)

    def _saved(self, effect: m.SaveBlocks, tier: HostTier) -> None:
        self.post(m.BlocksSaved(effect.op_id))
        self.post(m.BlocksMoved(tier.save(effect.blocks)))

    def _load_blocks(self, effect: m.LoadBlocks) -> None:
        world, tier = self.world, self.tier
        assert tier is not None
        count = tier.load(effect.block_hashes)
        elapsed_s = tier.up_s(count, world.now_s) - world.now_s
        done = m.PullDone(
            effect.pull_id, (DIGEST,) * count, transport=OWN_TIER, elapsed_s=elapsed_s
        )
        self._later(elapsed_s, done)

    def _store(self, effect: m.Effect) -> None:
        done = self.world.store.apply(effect)
        if done is not None:
            self._later(STORE_S, done)
