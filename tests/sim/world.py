"""Time, the network and the processes of a simulated cluster. All choices come from one seed."""

import heapq
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from random import Random

import msgspec

from sim.device import VOCAB, Device
from sim.faults import Faults
from sim.tier import Tier
from slipstream.core import machine as m
from slipstream.core.link import Transmit
from slipstream.core.machine import Effect, Event, Machine
from slipstream.core.node import Node, encode_header
from slipstream.core.span_recorder import SpanRecorder
from slipstream.kvindex.memory import MemoryStore
from slipstream.messages import SCHEDULER, AdapterInfo, NodeInfo, TokenPrompt
from slipstream.spans import Trace
from slipstream.types import BlockId, NodeId, RequestId, Role, unpack_tokens

STEP_S, TOKEN_S = 0.004, 0.0002
READ_BLOCK_S = 0.0005


class Checked:
    """A machine that asserts its invariants after every event, and the recorder beside it."""

    def __init__(
        self,
        machine: Machine,
        spans: SpanRecorder,
        note: Callable[[Event, Sequence[Effect]], None],
    ):
        self.inner, self.spans, self._note = machine, spans, note

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        effects = list(self.inner.handle(event, now_s))
        self.inner.check()
        effects += self.spans.saw(event, effects, now_s)
        self.spans.check()
        self._note(event, effects)
        return effects

    def statistics(self) -> dict[str, float]:
        return self.inner.statistics()

    def check(self) -> None:
        self.inner.check()


class World:
    def __init__(self, seed: int, faults: Faults, network: Random):
        self.seed, self.faults, self.network = seed, faults, network
        self.now_s = 0.0
        self.events = 0
        self.trace = 0
        """Running checksum of all that happened: two runs of one seed must agree."""
        self.exited: Callable[[NodeId], None] = lambda node_id: None
        """A process has ended by itself: its supervisor wants to know."""
        self.exported: Callable[[Trace], None] = lambda trace: None
        self.show: Callable[[str], None] | None = None
        """Where to tell every event and what came of it, for one's eyes."""
        self.processes: dict[NodeId, Process] = {}
        self.store = MemoryStore()
        self.cut: dict[frozenset[NodeId], float] = {}
        """Pairs that cannot hear each other, and until when."""
        self.poison: dict[RequestId, tuple[int, bool]] = {}
        """Requests that kill the worker which computes their token of this position, or else fail
        its step."""
        self.poisoned: Counter[RequestId] = Counter()
        self.files: dict[str, int] = {}
        """Path of an adapter -> which one lies there."""
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._last_arrival: dict[tuple[NodeId, str], float] = {}

    def at(self, at_s: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (max(at_s, self.now_s), self._count, action))

    def run(self, until_s: float) -> None:
        while self._heap and self._heap[0][0] <= until_s:
            self.now_s, _, action = heapq.heappop(self._heap)
            self.events += 1
            action()
        self.now_s = until_s

    def adapter_id(self, name: str, path: str) -> str:
        """Of the version that lies there."""
        return f"{name}@{zlib.crc32(f'{path} {self.files[path]}'.encode()):08x}"

    def note(self, what: str) -> None:
        self.trace = zlib.crc32(what.encode(), self.trace)

    def transmit(self, source: NodeId, frame: Transmit) -> None:
        """Put a frame on the network, which may do to it what networks do."""
        faults, rng = self.faults, self.network
        if self.cut.get(frozenset((source, frame.address)), 0.0) > self.now_s:
            faults.counts["partition"] += 1
            return
        if faults.strikes("loss", 0.08, self.now_s):
            return
        copies = 2 if faults.strikes("duplication", 0.08, self.now_s) else 1
        for _ in range(copies):
            arrival_s = self.now_s + 0.0002 + rng.expovariate(2000.0)
            if faults.strikes("delay", 0.1, self.now_s):
                # Most are late; some come back from the dead, after both ends have given up.
                arrival_s += rng.uniform(0.0, 2.5) if rng.random() < 0.9 else rng.uniform(2.5, 12.0)
            way = (source, frame.address)
            if arrival_s < self._last_arrival.get(way, 0.0):
                faults.counts["reordering"] += 1
            self._last_arrival[way] = arrival_s
            self.at(arrival_s, lambda: self._deliver(frame))

    def _deliver(self, frame: Transmit) -> None:
        process = self.processes.get(frame.address)
        if process is not None:
            process.receive(encode_header(frame.header), frame.payload)


Step = Callable[[float], list[m.Effect | Transmit]]
"""At this time -> what a node does."""


class Process:
    """One service process: its node, and a shell that carries out effects in simulated time."""

    def __init__(
        self,
        world: World,
        info: NodeInfo,
        machine: Machine,
        spans: SpanRecorder,
        deliver: Callable[..., None],
    ):
        self.world, self.info, self.deliver = world, info, deliver
        self.alive, self.frozen_until_s = True, 0.0
        self.spans = spans
        checked = Checked(machine, spans, self._note)
        scheduler = None if info.role is Role.SCHEDULER else (SCHEDULER, SCHEDULER)
        self.node = Node(info, checked, scheduler)
        self.device = (
            Device(info.worker.num_blocks, info.model) if info.worker is not None else None
        )
        self.tier = Tier(self)
        self._found: deque[Step] = deque()
        self._steps: deque[m.BatchPlan] = deque()
        """Given to the device, the first one is computed."""
        self._timers: dict[str, int] = {}
        self._timer_count = 0
        self._wake_at_s = float("inf")
        world.processes[info.node_id] = self
        self.post(m.Started())

    @property
    def machine(self) -> Machine:
        assert isinstance(self.node.machine, Checked)
        return self.node.machine.inner

    def kill(self) -> None:
        if self.alive:
            self.alive = False
            del self.world.processes[self.info.node_id]

    def post(self, event: Event) -> None:
        self._run(lambda now_s: self.node.handle(event, now_s))

    def receive(self, header: bytes, payload: bytes) -> None:
        self._run(lambda now_s: self.node.receive(header, payload, None, now_s))

    def later(self, delay_s: float, event: Event) -> None:
        self.world.at(self.world.now_s + delay_s, lambda: self.post(event))

    def _run(self, step: Step) -> None:
        self._found.append(step)
        self._go_on()

    def _go_on(self) -> None:
        """SIGSTOP: it finds everything when it goes on, in the order in which it came."""
        while self._found and self.alive:
            if self.frozen_until_s > self.world.now_s:
                self.world.at(self.frozen_until_s, self._go_on)
                return
            self._take(self._found.popleft())

    def _take(self, step: Step) -> None:
        world = self.world
        for action in step(world.now_s):
            self._perform(action)
        if not self.alive:  # it has ended by itself
            for last in self.node.leave(world.now_s):
                world.transmit(self.info.node_id, last)
            return
        wake_at_s = self.node.next_wake_s()
        if wake_at_s < self._wake_at_s:
            self._wake_at_s = wake_at_s
            world.at(wake_at_s, lambda: self._wake(wake_at_s))

    def _wake(self, due_s: float) -> None:
        if due_s == self._wake_at_s:
            self._wake_at_s = float("inf")
            self._run(self.node.wake)

    def _note(self, event: Event, effects: Sequence[Effect]) -> None:
        world, name = self.world, self.info.node_id
        world.note(f"{world.now_s} {name} {type(event).__name__}")
        if world.show is not None:
            world.show(f"{world.now_s:9.4f} {name} <- {event}")
            for effect in effects:
                world.show(f"{'':9} {name} -> {effect}")

    def _perform(self, action: m.Effect | Transmit) -> None:
        world = self.world
        match action:
            case Transmit():
                world.transmit(self.info.node_id, action)
            case m.SetTimer(key, at_s):
                self._timer_count += 1
                version = self._timers[key] = self._timer_count
                world.at(at_s, lambda: self._fire(key, version))
            case m.CancelTimer(key):
                self._timers.pop(key, None)
            case m.RunBatch(plan):
                self._run_batch(plan)
            case m.PullBlocks():
                self._pull(action)
            case m.SaveBlocks():
                self.tier.save(action)
            case m.LoadBlocks():
                self.tier.load(action)
            case m.DigestBlocks(op_id, blocks):
                digests = tuple(self.device.digest(block) for block in blocks)
                self.later(0.0005 * len(blocks), m.BlocksDigested(op_id, digests))
            case m.LoadAdapter(name, path):
                self.unless_frozen(0.02, lambda: self.post(self._adapter(name, path)))
            case m.DropAdapter(adapter_id):
                self.device.adapters.remove(adapter_id)
            case m.EncodePrompt(prompt=prompt):
                assert isinstance(prompt, TokenPrompt)
                self.later(0.001, encoded(action))
            case m.Deliver() | m.DeliverCodec() | m.DeliverAdapter():
                self.deliver(action)
            case m.Note():
                pass  # `show` has shown it
            case m.ExportTrace(trace):
                world.exported(trace)
            case m.Exit(fault):
                self.kill()
                if fault:
                    world.exited(self.info.node_id)
            case _:
                self._store(action)

    def _fire(self, key: str, version: int) -> None:
        if self.alive and self.frozen_until_s > self.world.now_s:
            self.world.at(self.frozen_until_s, lambda: self._fire(key, version))
        elif self._timers.get(key) == version:
            del self._timers[key]
            self.post(m.TimerFired(key))

    # --- The worker's device ----------------------------------------------------------------------

    def _adapter(self, name: str, path: str) -> m.AdapterRead:
        """What lies there now."""
        adapter_id = self.world.adapter_id(name, path)
        self.device.adapters.add(adapter_id)
        return m.AdapterRead(name, path, AdapterInfo(adapter_id=adapter_id, name=name, path=path))

    def _run_batch(self, plan: m.BatchPlan) -> None:
        """One after another, in order."""
        self._steps.append(plan)
        if len(self._steps) == 1:
            self._compute()

    def _compute(self) -> None:
        world, device, plan = self.world, self.device, self._steps[0]
        assert device is not None
        tokens = sum(row.num_tokens + row.drafts for row in plan.rows)
        elapsed_s = STEP_S + TOKEN_S * tokens
        if world.faults.strikes("slow", 0.05, world.now_s):
            elapsed_s *= world.network.uniform(10, 300)

        poison = self._poison(plan)

        def finish() -> None:
            self.check_held(block for row in plan.rows for block in row.block_ids)
            device.admit(plan)
            done: m.Event = m.BatchFailed(plan.step, "simulated")
            if poison == "kills":
                self.kill()
                world.exited(self.info.node_id)
                return
            if poison or world.faults.strikes("step_failure", 0.01, world.now_s):
                device.fail(plan)
            else:
                done = m.BatchDone(plan.step, *device.run(plan), elapsed_s)
            self._steps.popleft()
            if self._steps:
                self._compute()
            self.post(done)

        if not world.faults.strikes("hang", 0.002, world.now_s):
            self.unless_frozen(elapsed_s, finish)

    def check_held(self, blocks: Iterable[BlockId]) -> None:
        """Whoever is about to write into them must still have a hold on them."""
        references = self.machine.pool.references  # type: ignore[attr-defined]
        assert all(references[block] for block in blocks), "a write into a block that nobody holds"

    def _poison(self, plan: m.BatchPlan) -> str:
        """What a row of this step does to its worker."""
        world = self.world
        for row in plan.rows:
            name = row.request_id.rstrip("'")
            position, kills = world.poison.get(name, (-1, False))
            if row.start <= position < row.start + row.num_tokens:
                world.faults.counts["poison"] += 1
                world.poisoned[name] += 1
                return "kills" if kills else "fails"
        return ""

    def unless_frozen(self, delay_s: float, action: Callable[[], None]) -> None:
        """A thread of this process: stops with it, dies with it."""

        def attempt() -> None:
            if self.alive and self.frozen_until_s > self.world.now_s:
                self.world.at(self.frozen_until_s, attempt)
            elif self.alive:
                action()

        self.world.at(self.world.now_s + delay_s, attempt)

    def _pull(self, pull: m.PullBlocks) -> None:
        """Copies half a block at a time, so that a READ can be torn by whoever writes meanwhile."""
        world, device = self.world, self.device
        assert device is not None
        source = world.processes.get(pull.peer)
        epoch_right = source is not None and source.info.epoch == pull.epoch
        if not epoch_right or world.faults.strikes("loss", 0.03, world.now_s):
            self.later(0.002, m.PullDone(pull.pull_id, error="unreachable"))
            return
        if world.faults.strikes("hang", 0.02, world.now_s):
            return
        halves = [
            (there, here, half)
            for there, here in zip(pull.source_blocks, pull.local_blocks, strict=True)
            for half in (slice(0, 8), slice(8, 16))
        ]
        slowness = world.network.choice((1, 1, 1, 20, 3000))
        self._copy(pull, source, halves, READ_BLOCK_S * slowness)

    def _copy(self, pull: m.PullBlocks, source: "Process", halves: list, pause_s: float) -> None:
        """The peer's memory stays mapped after its death; what lies in it then is still its own."""
        assert self.device is not None and source.device is not None
        if not halves:
            digests = tuple(self.device.digest(block) for block in pull.local_blocks)
            elapsed_s = 2 * READ_BLOCK_S * len(pull.local_blocks)
            self.post(m.PullDone(pull.pull_id, digests, transport="sim", elapsed_s=elapsed_s))
            return
        there, here, half = halves.pop(0)
        self.check_held([here])
        self.device.memory[here][half] = source.device.memory[there][half]
        if self.world.faults.strikes("corruption", 0.03, self.world.now_s):
            self.device.memory[here][half.start] ^= 1
        self.unless_frozen(pause_s, lambda: self._copy(pull, source, halves, pause_s))

    # --- The index's store ------------------------------------------------------------------------

    def _store(self, action: m.Effect) -> None:
        world, op_id = self.world, getattr(action, "op_id", None)
        if world.faults.strikes("store_outage", 0.2, world.now_s):
            if op_id is not None:
                self.later(1.0, m.StoreDone(op_id, ok=False))
            return
        done = world.store.apply(action)
        if done is None:
            return
        if isinstance(action, m.StoreFind) and world.faults.strikes("lie", 0.5, world.now_s):
            everywhere = dict.fromkeys(action.workers, m.Held(len(action.hashes)))
            done = msgspec.structs.replace(done, holders=everywhere)
        self.later(world.network.expovariate(500.0), done)


def encoded(asked: m.EncodePrompt) -> m.Encoded:
    """As the tokenizer's thread would: what the client wants of the answer is for the workers."""
    assert isinstance(asked.prompt, TokenPrompt)
    return m.Encoded(
        asked.request_id,
        tuple(unpack_tokens(asked.prompt.tokens)),
        grammar=asked.constraint.text if asked.constraint else "",
        bad_tokens=tuple(tuple(word.encode()) for word in asked.bad_words),
        answer_format="hermes" if asked.parse else "",
    )


def random_prompt(rng: Random, stems: list[list[int]], longest: int) -> list[int]:
    """A prompt that may share its beginning with others."""
    stem = rng.choice(stems) if rng.random() < 0.7 else []
    if rng.random() < 0.5:
        stem = stem[: rng.randrange(0, longest)]
    tail = [rng.randrange(1, VOCAB) for _ in range(rng.choice((1, 2, 15, 16, 17, 40)))]
    return (stem + tail)[:longest]
