"""Frontend and tokenizer machines wired together in memory, with sessions that break.

A session keeps the promise of `core.link` and no more: messages arrive once and in order, until it
ends and takes what is on its way with it. Scheduler and worker are one simple stand-in.
"""

import random
from collections import deque
from dataclasses import dataclass, field

from slipstream.core.machine import (
    Closed,
    Deliver,
    Effect,
    Encoded,
    EncodePrompt,
    Event,
    Opened,
    PeerDown,
    PeerUp,
    Received,
    Send,
    SetTimer,
    Started,
    TimerFired,
)
from slipstream.errors import Problem
from slipstream.frontend.machine import FrontendMachine
from slipstream.frontend.settings import FrontendSettings
from slipstream.messages import (
    SCHEDULER,
    AnyMessage,
    ChatPrompt,
    Prompt,
    Resend,
    Resume,
    StreamAck,
    StreamEnded,
    Submit,
    TextDelta,
    TextPrompt,
    Tokenize,
    TokensOut,
)
from slipstream.tokenizer.machine import TokenizerMachine
from slipstream.tokenizer.settings import TokenizerSettings
from slipstream.types import FinishReason, NodeId, Role, unpack_tokens
from tokenizer.machines import EOS, ByteCodec, ids, peers, plain, span, worker

FRONTEND, WORKER = "frontend-0", "decode-0"
TOKENIZERS = ("tokenizer-0", "tokenizer-1")


@dataclass
class Answer:
    """What one client got."""

    text: str = ""
    last: TextDelta | Problem | None = None
    prompt_tokens: list[int] = field(default_factory=list)

    def take(self, item: TextDelta | Problem | int) -> None:
        assert self.last is None, "something after the end"
        if isinstance(item, int):
            self.prompt_tokens.append(item)
        elif isinstance(item, Problem) or item.finish_reason is not None:
            self.last = item
        self.text += item.text if isinstance(item, TextDelta) else ""


@dataclass
class Running:
    tokenizer: NodeId
    attempt: int
    start: int
    made: int
    resuming: bool = False
    orphan_s: float | None = None


class Cluster:
    """Scheduler and worker: answers a request with the text after the bar in its prompt."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.running: dict[str, Running] = {}
        self.past: dict[str, int] = {}
        self.log: dict[tuple[str, int], tuple[NodeId, int]] = {}
        """Of ended attempts: tokenizer, first position; until acknowledged."""
        self.tokens: dict[str, list[int]] = {}

    def scheduler(self, event: Event, now_s: float) -> None:
        match event:
            case PeerUp(peer, _):
                known = [worker(), *(plain(name, Role.TOKENIZER) for name in TOKENIZERS)]
                self.world.send(SCHEDULER, peer, peers(*known))
            case PeerDown(peer):
                for run in self.running.values():
                    if run.tokenizer == peer and run.orphan_s is None:
                        run.orphan_s = now_s
            case Received(source, Submit() as submit):
                self._submit(source, submit)
            case Received(source, StreamEnded(request_id=request_id)):
                run = self.running.get(request_id)
                if run is not None and run.tokenizer == source:
                    self._end(request_id)

    def worker(self, event: Event, now_s: float) -> None:
        match event:
            case PeerDown(peer):
                for (request_id, attempt), (tokenizer, start) in list(self.log.items()):
                    if tokenizer == peer:  # opens the next session
                        self._say(tokenizer, request_id, attempt, start, 1000)
            case Received(source, Resend() as resend):
                run = self.running.get(resend.request_id)
                if run is not None and run.attempt == resend.attempt:
                    self._say(source, resend.request_id, run.attempt, resend.position, 1000)
            case Received(_, StreamAck(request_id=request_id, attempt=attempt)):
                self.log.pop((request_id, attempt), None)

    def step(self, chance: random.Random, now_s: float) -> None:
        for request_id, run in list(self.running.items()):
            if run.orphan_s is not None and now_s > run.orphan_s + 10.0:
                self._end(request_id)
            elif not run.resuming and run.made < len(self.tokens[request_id]):
                count = chance.randint(1, 4)
                self._say(run.tokenizer, request_id, run.attempt, run.made, count)
                run.made = min(run.made + count, len(self.tokens[request_id]))
                if run.made == len(self.tokens[request_id]):
                    self.log[request_id, run.attempt] = run.tokenizer, run.start

    def lose_worker(self, request_id: str) -> None:
        run = self.running[request_id]
        if not run.resuming:
            run.attempt, run.resuming = run.attempt + 1, True
        self.world.send(
            SCHEDULER, run.tokenizer, Resume(request_id=request_id, attempt=run.attempt)
        )

    def _submit(self, source: NodeId, submit: Submit) -> None:
        request_id = submit.request_id
        answer = self.tokens.setdefault(
            request_id, [*bytes(unpack_tokens(submit.prompt)).partition(b"|")[2], EOS]
        )
        accepted = unpack_tokens(submit.accepted)
        assert accepted == answer[: len(accepted)]
        assert len(accepted) < len(answer)
        run = self.running.get(request_id)
        if run is None and submit.attempt <= self.past.get(request_id, 0):
            again = Resume(request_id=request_id, attempt=self.past[request_id] + 1)
            self.world.send(SCHEDULER, source, again)
            return
        if run is not None and submit.attempt < run.attempt:
            if run.tokenizer == source:
                run.orphan_s = None
                self.lose_worker(request_id)
            return
        if run is not None and submit.attempt == run.attempt and not run.resuming:
            run.orphan_s = None
            return
        have = len(accepted)
        self.running[request_id] = Running(source, submit.attempt, have, have)

    def _end(self, request_id: str) -> None:
        run = self.running.pop(request_id)
        self.past[request_id] = run.attempt

    def _say(self, to: NodeId, request_id: str, attempt: int, start: int, count: int) -> None:
        answer = self.tokens[request_id]
        end = start + count >= len(answer)
        made = span(
            answer[start : start + count],
            start,
            request_id=request_id,
            attempt=attempt,
            finish=FinishReason.STOP if end else None,
            stop_token=EOS if end else None,
        )
        self.world.send(WORKER, to, TokensOut(spans=[made]))


class World:
    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.now_s = 0.0
        self.epochs = dict.fromkeys([FRONTEND, *TOKENIZERS, SCHEDULER, WORKER], 1)
        self.cluster = Cluster(self)
        self.frontend = FrontendMachine(plain(FRONTEND, Role.FRONTEND), FrontendSettings())
        self.tokenizers: dict[NodeId, TokenizerMachine] = {}
        self.up: set[frozenset[NodeId]] = set()
        self.lines: dict[tuple[NodeId, NodeId], deque[AnyMessage]] = {}
        self.timers: dict[tuple[NodeId, str], float] = {}
        self.answers: dict[str, Answer] = {}
        self.handle(FRONTEND, Started())
        for name in TOKENIZERS:
            self._boot(name)
        self.run(1.0)

    # --- The client ---

    def open(self, submission: Tokenize) -> Answer:
        answer = self.answers[submission.request_id] = Answer()
        self.handle(FRONTEND, Opened(submission))
        return answer

    def close(self, request_id: str) -> None:
        self.handle(FRONTEND, Closed(request_id))

    # --- Faults ---

    def cut(self, one: NodeId, other: NodeId) -> None:
        """The session ends on both sides."""
        for pair in ((one, other), (other, one)):
            self.lines.pop(pair, None)
        self.up.discard(frozenset((one, other)))
        self.handle(one, PeerDown(other))
        self.handle(other, PeerDown(one))

    def crash(self, tokenizer: NodeId) -> None:
        """It starts anew at once; its peers notice."""
        self.epochs[tokenizer] += 1
        for source, to in [pair for pair in self.lines if tokenizer in pair]:
            # What began no session yet is sent again, to the new process.
            if source == tokenizer or frozenset((source, to)) in self.up:
                del self.lines[source, to]
        peers = {node for pair in self.up if tokenizer in pair for node in pair} - {tokenizer}
        self.up = {pair for pair in self.up if tokenizer not in pair}
        self._boot(tokenizer)
        for peer in sorted(peers):
            self.handle(peer, PeerDown(tokenizer))

    def forget_requests(self) -> None:
        """The scheduler starts anew, and knows nothing."""
        self.cluster.running.clear()
        self.cluster.past.clear()
        for tokenizer in TOKENIZERS:
            self.cut(SCHEDULER, tokenizer)

    # --- Machinery ---

    def send(self, source: NodeId, to: NodeId, message: AnyMessage) -> None:
        self.lines.setdefault((source, to), deque()).append(message)

    def handle(self, node: NodeId, event: Event) -> None:
        if node == SCHEDULER:
            self.cluster.scheduler(event, self.now_s)
            return
        if node == WORKER:
            self.cluster.worker(event, self.now_s)
            return
        machine = self.frontend if node == FRONTEND else self.tokenizers[node]
        pending = deque([event])
        while pending:
            for effect in machine.handle(pending.popleft(), self.now_s):
                match effect:
                    case Send(to, message):
                        self.send(node, to, message)
                    case SetTimer(key, at_s):
                        self.timers[node, key] = at_s
                    case EncodePrompt(key, prompt):
                        pending.append(Encoded(key, tuple(ids(_text(prompt)))))
                    case _:
                        self.execute(effect)
            machine.check()

    def execute(self, effect: Effect) -> None:
        """What the frontend's shell would do."""
        assert isinstance(effect, Deliver), effect
        self.answers[effect.request_id].take(effect.item)

    def run(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s += 0.05
            self.cluster.step(self.chance, self.now_s)
            due = [key for key, at_s in self.timers.items() if at_s <= self.now_s]
            for node, key in due:
                del self.timers[node, key]
                self.handle(node, TimerFired(key))
            self._carry()

    def _carry(self) -> None:
        for _ in range(self.chance.choice([3, 20, 60])):
            pairs = [pair for pair, line in self.lines.items() if line]
            if not pairs:
                return
            source, to = self.chance.choice(pairs)
            pair = frozenset((source, to))
            if pair not in self.up:
                self.up.add(pair)
                self.handle(source, PeerUp(to, self.epochs[to]))
                self.handle(to, PeerUp(source, self.epochs[source]))
            self.handle(to, Received(source, self.lines[source, to].popleft()))

    def _boot(self, name: NodeId) -> None:
        for timer in [timer for timer in self.timers if timer[0] == name]:
            del self.timers[timer]
        settings = TokenizerSettings(eos_token_ids=frozenset({EOS}))
        node = plain(name, Role.TOKENIZER, self.epochs[name])
        self.tokenizers[name] = TokenizerMachine(node, settings, ByteCodec())
        self.handle(name, Started())


def _text(prompt: Prompt) -> str:
    match prompt:
        case TextPrompt(text=text):
            return text
        case ChatPrompt(messages=messages):
            return str(messages[-1]["content"])
    raise AssertionError(prompt)
