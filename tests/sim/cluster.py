"""One run: a cluster, clients, faults, and at the end an account of every request and block."""

import math
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field
from functools import partial
from random import Random

import msgspec

from sim.device import EOS, VOCAB, prompt_scores, right_answer
from sim.faults import Faults
from sim.journal import Journals, Writer
from sim.operator import MODEL, NAMES, Operator
from sim.world import Process, World, random_prompt
from slipstream.core import machine as m
from slipstream.core.span_recorder import SpanRecorder
from slipstream.core.worker import WorkerMachine
from slipstream.core.worker_settings import WorkerSettings
from slipstream.core.worker_spans import WorkerSpans
from slipstream.errors import ErrorCode, Problem
from slipstream.frontend.machine import FrontendMachine
from slipstream.frontend.settings import FrontendSettings
from slipstream.frontend.spans import FrontendSpans
from slipstream.kvindex.machine import KvIndexMachine, KvIndexSettings
from slipstream.kvindex.spans import KvIndexSpans
from slipstream.messages import (
    SCHEDULER,
    NodeInfo,
    TextDelta,
    Tokenize,
    TokenizerInfo,
    TokenPrompt,
    WorkerInfo,
)
from slipstream.scheduler.machine import SchedulerMachine
from slipstream.scheduler.settings import SchedulerSettings
from slipstream.scheduler.spans import SchedulerSpans
from slipstream.spans import Trace, TraceContext
from slipstream.tokenizer.detokenizer import PROMPT_TAIL_TOKENS, Detokenizer
from slipstream.tokenizer.machine import TokenizerMachine
from slipstream.tokenizer.settings import TokenizerSettings
from slipstream.tokenizer.spans import TokenizerSpans
from slipstream.types import (
    Constraint,
    ConstraintKind,
    FinishReason,
    NodeId,
    Role,
    SamplingParams,
    TokenLogprobs,
    pack_tokens,
    unpack_tokens,
)

WORKERS = Role.PREFILL, Role.DECODE
MAX_MODEL_LEN = 256
SMALL_MODEL_LEN = 96
TIMEOUT_S = 300.0
PAUSES_S = (0.3, 2.0, 4.0, 14.0)
DEADLINE_SLACK_S = 8.0 + max(PAUSES_S)
"""The frontend waits 5 s for its tokenizer's word, looks twice a second, and may be stopped."""
QUIET_S = 150.0
"""Longest time after the last fault until everything has ended and nothing is held."""
POISONED_MAX = 3
"""Workers that a request may take with it: with others under suspicion there is one more, alone."""
LOSSES = {"crash", "pause", "partition", "step_failure", "hang", "slow", "loss", "drain"}
"""Faults by which workers are lost that no request is to blame for."""
REFUSALS = {ErrorCode.NOT_READY, ErrorCode.NO_WORKER, ErrorCode.QUEUE_FULL, ErrorCode.DRAINING}


class Letters:
    """A codec whose tokens are letters."""

    special_ids = frozenset({EOS})
    strip_leading = 0
    vocab_size = VOCAB

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([ord("a") + token_id % 26])

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode()


@dataclass
class Client:
    """One HTTP request, and what its caller has seen of the answer."""

    request_id: str
    model: str
    prompt: list[int]
    sampling: SamplingParams
    held: SamplingParams
    """The same, and what the answer is held to."""
    expected: list[int] = field(default_factory=list)
    reason: FinishReason = FinishReason.STOP
    text: str = ""
    adapter: str = ""
    """By its name; `adapter_id`: the version that it got."""
    adapter_id: str = ""
    frontend: NodeId = ""
    tokens: list[int] = field(default_factory=list)
    shown: str = ""
    ended: str = ""
    closes_after: int | None = None
    timeout_s: float = TIMEOUT_S
    priority: int = 0
    constraint: Constraint | None = None
    bad_words: tuple[str, ...] = ()
    parse: bool = False
    too_long: bool = False
    """For one of the workers."""
    suspect: bool = False
    """It is poison, or workers are lost for other reasons too."""
    opened_s: float = 0.0
    comes_back: bool = False
    """When its frontend is lost, it goes on at another one."""
    away: bool = False
    watched_s: float = 0.0
    journaled: bool = False
    """So said its latest frontend."""
    writer: Writer | None = None
    deltas: list[tuple[int, bytes, str]] = field(default_factory=list)
    """As they were told: position, tokens, text."""

    @classmethod
    def draw(cls, rng: Random, number: int, stems: list[list[int]], model: str) -> "Client":
        prompt = random_prompt(rng, stems, longest=150)
        sampling = SamplingParams(
            max_tokens=rng.choice((1, 1, 2, 5, 12, 40)),
            seed=rng.randrange(100),
            temperature=rng.choice((0.0, 1.0)),
            min_tokens=rng.choice((0, 0, 3)),
            ignore_eos=rng.random() < 0.3,
            logprobs=rng.choice((None, None, 0)),
            prompt_logprobs=rng.choice((None, None, None, 0)),
            stop=tuple(rng.choice(("ab", "q", "xyz", "e")) for _ in range(rng.choice((0, 0, 1)))),
        )
        grammar = f"start: {number}" if number % 4 == 1 else ""
        bad_words = ("no",) if number % 5 == 2 else ()
        bad_tokens = tuple(tuple(word.encode()) for word in bad_words)
        held = msgspec.structs.replace(sampling, grammar=grammar, bad_tokens=bad_tokens)
        client = cls(f"r{number}", model, prompt, sampling, held)
        client.expect()
        client.priority = rng.choice((0, 0, 0, -1, 3))
        if grammar:
            client.constraint = Constraint(kind=ConstraintKind.GRAMMAR, text=grammar)
        client.bad_words, client.parse = bad_words, number % 3 == 0
        if rng.random() < 0.12:
            client.closes_after = rng.randrange(0, 6)
        client.comes_back = rng.random() < 0.7
        if rng.random() < 0.12:
            client.timeout_s = rng.choice((0.05, 0.5, 2.0, 15.0))
        return client

    def expect(self) -> None:
        tokens, reason = right_answer(self.prompt, self.held, self.model, self.adapter_id)
        self.expected, self.text, self.reason = _shown(self.prompt, tokens, reason, self.sampling)

    @property
    def context(self) -> TraceContext:
        number = int(self.request_id.strip("r'"))
        return TraceContext(trace_id=f"{number + 1:032x}")

    def submission(self, now_s: float) -> Tokenize:
        number = int(self.request_id.strip("r'"))
        return Tokenize(
            request_id=self.request_id,
            prompt=TokenPrompt(tokens=pack_tokens(self.prompt)),
            sampling=self.sampling,
            timeout_s=max(0.0, self.opened_s + self.timeout_s - now_s),
            model=self.model,
            adapter=self.adapter_id,
            priority=self.priority,
            constraint=self.constraint,
            bad_words=self.bad_words,
            parse=self.parse,
            tenant=f"tenant-{number % 3}",
            weight=1 + number % 2,
        )

    def see(self, item: int | TextDelta | Problem, overwritten: Container[str]) -> None:
        """What arrives at the caller must be the right answer, from its beginning, once.
        `overwritten`: versions of adapters that end with the workers that have them."""
        if isinstance(item, int):
            assert item == len(self.prompt)
            return
        assert not self.ended, f"{self.request_id} went on after its end: {item}"
        if isinstance(item, Problem):
            late = item.code is ErrorCode.DEADLINE and self.timeout_s < TIMEOUT_S
            refused = item.code in REFUSALS and not self.tokens
            guilty = item.code is ErrorCode.QUARANTINED and self.suspect
            homeless = item.code is ErrorCode.NO_WORKER and self.adapter_id in overwritten
            gone = homeless and bool(self.tokens)
            unfit = item.code is ErrorCode.CONTEXT_LENGTH and self.too_long and not self.tokens
            assert late or refused or guilty or gone or unfit, f"{self.request_id}: {item}"
            self.ended = "cut off" if gone or unfit else item.code
            return
        assert item.position == len(self.tokens), f"{self.request_id}: {item}"
        new = unpack_tokens(item.tokens)
        self.tokens += new
        self.deltas.append((item.position, item.tokens, item.text))
        assert not (item.text if self.parse else item.parts), item
        self.shown += item.text + "".join(part.text for part in item.parts)
        assert self.tokens == self.expected[: len(self.tokens)], (
            f"{self.request_id}: wrong token {self.tokens} for {self.expected}"
        )
        assert self.text.startswith(self.shown), f"{self.request_id}: {self.shown} / {self.text}"
        if self.sampling.logprobs is not None and new:
            got = [logprob.token_id for logprob in item.logprobs or []]
            assert got == new, f"{self.request_id}: logprobs of {got} for {new}"
        if self.sampling.prompt_logprobs is not None and new and len(self.tokens) == len(new):
            heard = [TokenLogprobs(x.token_id, x.logprob) for x in item.prompt_logprobs or []]
            assert heard[1:] == prompt_scores(self.prompt), f"{self.request_id}: {heard}"
        if item.finish_reason is not None:
            whole = self.tokens == self.expected and self.shown == self.text
            assert whole and item.finish_reason == self.reason, f"{self.request_id}: {item}"
            assert item.usage is not None
            assert item.usage.prompt_tokens == len(self.prompt)
            assert item.usage.completion_tokens == len(self.tokens)
            self.ended = "done"


def _shown(
    prompt: list[int], tokens: list[int], reason: FinishReason, sampling: SamplingParams
) -> tuple[list[int], str, FinishReason]:
    """Tokens and text as a caller gets them, stop strings applied."""
    detokenizer = Detokenizer(
        Letters(),
        prompt[-PROMPT_TAIL_TOKENS:],
        stop=sampling.stop,
        min_tokens=sampling.min_tokens,
    )
    text = ""
    for count, token in enumerate(tokens, 1):
        if reason is FinishReason.STOP and count == len(tokens):
            break  # the end-of-sequence token is counted and not shown
        text += detokenizer.push(token)
        if detokenizer.stopped is not None:
            return tokens[:count], text, FinishReason.STOP
    return tokens, text + detokenizer.flush(), reason


class Cluster:
    def __init__(self, seed: int):
        rng = Random(seed)
        self.seed, self.rng = seed, rng
        self.faults = Faults.draw(Random(rng.random()))
        self.world = World(seed, self.faults, Random(rng.random()))
        self.world.exited = self._gone
        self.world.exported = self._exported
        self._exports: set[tuple[str, NodeId, int, int]] = set()
        """Spans that went to a collector, by request, node, epoch and number."""
        self.disaggregation = rng.choice(("always", "always", "never", "auto", "auto"))
        self.policy = rng.choice(
            ("cost", "cost", "cost", "prefix", "load", "random", "round-robin")
        )
        self.models = ("fake", "other") if seed % 3 == 0 else ("fake",)
        self.layout = self._draw_layout()
        self.small = "decode-1" if seed % 8 == 3 and "decode-1" in self.layout else ""
        """A worker that comes late and cannot hold what others can."""
        self.num_blocks = rng.choice((16, 16, 24, 64))
        self.offload_after_hits = rng.choice((None, 0, 1, 2))
        self.max_num_seqs = rng.choice((1, 3, 8))
        self.budget_tokens = rng.choice((16, 48, 256))
        asked = Random(f"models {seed}")
        stems = [[rng.randrange(1, VOCAB) for _ in range(150)] for _ in range(rng.choice((1, 3)))]
        self.clients: dict[str, Client] = {}
        for number in range(rng.randrange(6, 24)):
            client = Client.draw(rng, number, stems, asked.choice(self.models))
            self.clients[client.request_id] = client
            stems.append(client.prompt + client.expected)  # a chat may go on
        for node_id in self.layout:
            late_s = rng.uniform(0.0, 0.3) + 5.0 * (node_id == self.small)
            self.world.at(late_s, lambda node_id=node_id: self._start(node_id))
        for number, client in enumerate(self.clients.values()):
            if seed % 4 == 1 and client.model == MODEL and number % 2:
                client.adapter = NAMES[number // 2 % 2]
            longest = len(client.prompt) + client.sampling.max_tokens
            client.too_long = bool(self.small) and longest > SMALL_MODEL_LEN
            self.world.at(rng.uniform(1.0, 8.0), lambda client=client: self._open(client))
        self.operator = Operator(self, Random(f"adapters {seed}")) if seed % 4 == 1 else None
        self._plan_faults()
        self.journals = Journals()
        self.counts: Counter[str] = Counter()
        """Of streams that went on at another frontend."""
        self._poison()

    def _poison(self) -> None:
        """One client or two whose requests kill workers. Nobody else may suffer for it."""
        others = LOSSES & self.faults.active
        for client in self.clients.values():
            client.suspect = bool(others)
        if "poison" not in self.faults.active:
            return
        for client in self.rng.sample(list(self.clients.values()), self.rng.choice((1, 1, 2))):
            position = self.rng.randrange(len(client.prompt) + len(client.expected))
            self.world.poison[client.request_id] = position, self.rng.random() < 0.5
            client.suspect = True

    def _draw_layout(self) -> dict[NodeId, Role]:
        counts = {
            Role.SCHEDULER: (1,),
            Role.KVINDEX: (0, 1, 1, 2),
            Role.TOKENIZER: (1, 2),
            Role.FRONTEND: (1, 2),
            Role.PREFILL: (1, 2),
            Role.DECODE: (1, 2),
        }
        layout: dict[NodeId, Role] = {}
        for role, choices in counts.items():
            for index in range(self.rng.choice(choices)):
                layout[SCHEDULER if role is Role.SCHEDULER else f"{role}-{index}"] = role
        for model in self.models[1:]:
            layout |= {f"{role}-{model}": role for role in (Role.TOKENIZER, *WORKERS)}
        return layout

    def _model_of(self, node_id: NodeId) -> str:
        return next((model for model in self.models if node_id.endswith(f"-{model}")), "fake")

    # --- Processes --------------------------------------------------------------------------------

    def _start(self, node_id: NodeId) -> None:
        if node_id in self.world.processes:
            return
        role, model = self.layout[node_id], self._model_of(node_id)
        small = node_id == self.small
        worker = None
        if role in WORKERS:
            worker = WorkerInfo(
                model=model,
                kv_layout_id=f"{model}/float32/l1",
                num_blocks=max(8, self.num_blocks // 2) if small else self.num_blocks,
                block_bytes=128,
                max_model_len=SMALL_MODEL_LEN if small else MAX_MODEL_LEN,
                vocab_size=VOCAB,
                max_num_seqs=self.max_num_seqs,
                prefill_budget_tokens=self.budget_tokens,
                accept_decode=role is Role.DECODE or self.disaggregation == "never",
            )
        epoch = int((self.world.now_s + 1.0) * 1e9)
        info = NodeInfo(
            node_id=node_id,
            role=role,
            epoch=epoch,
            address=node_id,
            worker=worker,
            tokenizer=TokenizerInfo(model=model) if role is Role.TOKENIZER else None,
        )
        machine = self._machine(info)
        deliver = partial(self._deliver, node_id)
        Process(self.world, info, machine, _recorder(info, machine), deliver)

    def _machine(self, info: NodeInfo) -> m.Machine:
        match info.role:
            case Role.SCHEDULER:
                settings = SchedulerSettings(
                    policy=self.policy,
                    disaggregation=self.disaggregation,
                    max_migrations=100,
                    ttft_target_s=(0.2, 5.0, math.inf)[self.seed % 3],
                    index_stride=1 + self.seed % 3,
                )
                return SchedulerMachine(info, settings)
            case Role.TOKENIZER:
                eos = frozenset({EOS})
                return TokenizerMachine(info, TokenizerSettings(eos_token_ids=eos), Letters())
            case Role.FRONTEND:
                return FrontendMachine(info, FrontendSettings())
            case Role.KVINDEX:
                return KvIndexMachine(info, KvIndexSettings())
        settings = WorkerSettings(
            eos_token_ids=(EOS,),
            step_timeout_s=5.0,
            stuck_s=20.0,
            offload_after_hits=self.offload_after_hits,
            steps_in_flight=1 + self.seed % 2,
            draft_tokens=self.seed // 2 % 3 * 2,
        )
        return WorkerMachine(info, settings)

    # --- Clients ----------------------------------------------------------------------------------

    def _adapted(self, client: Client, frontend: NodeId) -> bool:
        """Whether what it asks for is there; what is to be expected, is that of its version."""
        client.adapter_id = ""
        if client.adapter:
            listed = self.operator.listed(frontend) if self.operator else {}
            if client.adapter not in listed:
                return False
            client.adapter_id = listed[client.adapter].adapter_id
        client.expect()
        return True

    def _open(self, client: Client) -> None:
        """Comes back until a frontend takes the request, as a client with retries does."""
        frontends = [n for n, r in self.layout.items() if r is Role.FRONTEND]
        process = self.world.processes.get(self.rng.choice(frontends))
        client.ended = ""
        if process is None or not self._adapted(client, process.info.node_id):
            self.world.at(self.world.now_s + 0.5, lambda: self._open(client))
            return
        client.frontend = process.info.node_id
        client.opened_s = self.world.now_s
        submission = client.submission(self.world.now_s)
        self._watch(client, submission)
        client.writer = self.journals.open(submission, client.frontend)
        process.post(m.Opened(submission, client.context))

    def _resume(self, client: Client, name: str) -> None:
        """With what another frontend finds of its stream, and only what it lacks is told to it."""
        now_s = self.world.now_s
        if client.ended or client.request_id != name:
            return
        if now_s >= client.opened_s + client.timeout_s:
            self._close(client, "cut off")
            return
        frontends = [n for n, r in self.layout.items() if r is Role.FRONTEND]
        process = self.world.processes.get(self.rng.choice(frontends))
        if process is None or process.frozen_until_s > now_s:
            self.world.at(now_s + 0.5, lambda: self._resume(client, name))
            return
        listed = self.operator.listed(process.info.node_id) if self.operator else {}
        now = listed.get(client.adapter)
        if now is not None and now.adapter_id != client.adapter_id:
            # Another version answers to the name now: that is another request.
            self.counts["not found"] += 1
            self._close(client, "cut off")
            return
        client.away = False
        before, client.frontend = client.frontend, process.info.node_id
        self._leave(before, client)
        submission = client.submission(now_s)
        fails = self.faults.strikes("store_outage", 0.2, now_s)
        least = int(now_s - client.opened_s) + 1
        client.writer, replay, taken = self.journals.take(submission, client.frontend, least, fails)
        self.counts["resumed"] += 1
        told, client.deltas, client.tokens, client.shown = client.deltas, [], [], ""
        for _, item in replay.items:
            client.see(item, ())
        both = min(len(told), len(client.deltas))
        assert client.deltas[:both] == told[:both], f"{name}: {client.deltas} for {told}"
        self.counts["beyond"] += len(told) > both
        assert not client.ended, f"{name} was over"
        client.journaled = taken.journaled
        self._watch(client, submission)
        process.post(m.Opened(submission, client.context, taken=taken))

    def _leave(self, frontend: NodeId, client: Client) -> None:
        """A frontend that still has its stream sees the connection break, some time."""
        process = self.world.processes.get(frontend)
        closed = m.Closed(client.request_id)

        def broken() -> None:
            # As in the service: who has come back meanwhile has a connection of its own there.
            if process is not None and frontend != client.frontend:
                process.post(closed)

        if process is not None and frontend != client.frontend:
            self.world.at(self.world.now_s + self.rng.choice((0.0, 5.0)), broken)

    def _deliver(self, node_id: NodeId, effect: m.Deliver | m.DeliverAdapter) -> None:
        if isinstance(effect, m.DeliverAdapter):
            assert self.operator is not None
            self.operator.heard(effect)
            return
        client = self.clients[effect.request_id]
        if client.ended in ("closed", "cut off") or node_id != client.frontend:
            if client.ended == "cut off" and node_id == client.frontend:
                self._close(client, client.ended)  # it was asked while it stood still
            return  # nobody reads any more
        fails = self.faults.strikes("store_outage", 0.02, self.world.now_s)
        assert client.writer is not None and client.writer.frontend == node_id
        assert self.journals.write(client.writer, effect.item, fails), client.request_id
        if isinstance(effect.item, Problem):
            if effect.item.code in REFUSALS and client.writer.owner:
                self._close_at(client)
                client.away, name = True, client.request_id
                self.world.at(self.world.now_s + 1.1, lambda: self._resume(client, name))
                return
            if effect.item.code is ErrorCode.STREAM_NOT_FOUND:
                assert not client.journaled, client.request_id
                self.counts["not found"] += 1
                self._close(client, "cut off")
                return
        client.see(effect.item, self.operator.overwritten if self.operator else ())
        if client.ended in REFUSALS:
            self._close(client, client.ended)
            client.request_id = self._renamed(client)
            self.world.at(self.world.now_s + 0.5, lambda: self._open(client))
        elif client.ended:
            self._close(client, client.ended)
        elif client.closes_after is not None and len(client.tokens) >= client.closes_after:
            self._close(client, "closed")

    def _exported(self, trace: Trace) -> None:
        """Each span goes out once, and only after its end."""
        assert trace.context is not None
        for process in trace.processes:
            for span in process.spans:
                key = trace.request_id, process.node_id, process.epoch, span.number
                assert span.end_ns >= span.begin_ns and key not in self._exports, key
                self._exports.add(key)

    def _watch(self, client: Client, submission: Tokenize) -> None:
        name, opened_s = client.request_id, self.world.now_s
        client.watched_s = opened_s

        def is_over() -> None:
            elsewhere = client.request_id != name or client.away or client.watched_s != opened_s
            assert client.ended or elsewhere, f"{name} outlives its time budget"

        self.world.at(opened_s + submission.timeout_s + DEADLINE_SLACK_S, is_over)

    def _renamed(self, client: Client) -> str:
        """Each try over HTTP is a request of its own."""
        del self.clients[client.request_id]
        name = client.request_id + "'"
        self.clients[name] = client
        return name

    def _close(self, client: Client, how: str) -> None:
        client.ended = how
        self._close_at(client)

    def _close_at(self, client: Client) -> None:
        process = self.world.processes.get(client.frontend)
        if process is not None:
            closed = m.Closed(client.request_id)
            self.world.at(self.world.now_s, lambda: process.post(closed))

    # --- Faults -----------------------------------------------------------------------------------

    def _plan_faults(self) -> None:
        rng, faults = self.rng, self.faults
        for kind, action in (
            ("crash", self._crash),
            ("pause", self._pause),
            ("partition", self._partition),
            ("drain", self._drain),
        ):
            if kind in faults.active:
                for _ in range(rng.randrange(1, 4)):
                    node_id = rng.choice(list(self.layout))
                    at_s = rng.uniform(0.8, faults.until_s)
                    self.world.at(at_s, lambda action=action, node_id=node_id: action(node_id))

    def _crash(self, node_id: NodeId) -> None:
        process = self.world.processes.get(node_id)
        if process is not None:
            self.faults.counts["crash"] += 1
            process.kill()
            self._gone(node_id)

    def _drain(self, node_id: NodeId) -> None:
        """SIGTERM, and ten seconds later what a supervisor does then."""
        process = self.world.processes.get(node_id)
        if process is None or self.layout[node_id] is Role.SCHEDULER:
            return
        self.faults.counts["drain"] += 1
        process.post(m.Drain())

        def end() -> None:
            if process.alive:
                process.kill()
            if self.world.processes.get(node_id) is None:
                self._gone(node_id)

        self.world.at(self.world.now_s + 10.0, end)

    def _gone(self, node_id: NodeId) -> None:
        """Its connections break; the supervisor starts it again."""
        for client in self.clients.values():
            if client.frontend == node_id and not client.ended:
                if client.comes_back:
                    self._come_back(client)
                else:
                    client.ended = "cut off"
        delay_s = self.rng.choice((0.05, 0.5, 2.0, 6.0))
        self.world.at(self.world.now_s + delay_s, lambda: self._start(node_id))

    def _come_back(self, client: Client) -> None:
        client.away = True
        name, after_s = client.request_id, self.rng.choice((0.1, 1.0, 4.0, 9.0, 20.0))
        self.world.at(self.world.now_s + after_s, lambda: self._resume(client, name))

    def _pause(self, node_id: NodeId) -> None:
        """Of a frontend's clients some do not wait; when it goes on, it finds itself replaced."""
        process = self.world.processes.get(node_id)
        if process is not None:
            self.faults.counts["pause"] += 1
            process.frozen_until_s = self.world.now_s + self.rng.choice(PAUSES_S)
            for client in self.clients.values():
                if client.frontend == node_id and client.comes_back and not client.ended:
                    self._come_back(client)

    def _partition(self, node_id: NodeId) -> None:
        others = [other for other in self.layout if other != node_id]
        cut = self.rng.sample(others, self.rng.randrange(1, len(others) + 1))
        until_s = self.world.now_s + self.rng.choice((0.5, 2.0, 5.0, 12.0))
        for other in cut:
            self.world.cut[frozenset((node_id, other))] = until_s

    # --- The account ------------------------------------------------------------------------------

    def run(self) -> None:
        """Everything must have ended, and nothing be held, some time after the last fault."""
        end_s = max(self.faults.until_s, 8.0) + QUIET_S
        while self.world.now_s < end_s:
            self.world.run(self.world.now_s + 2.0)
            if self.world.now_s > max(self.faults.until_s, 8.0) + 10.0 and not self.unsettled():
                break
        if not LOSSES & self.faults.active:
            assert all(n <= POISONED_MAX for n in self.world.poisoned.values()), "let go too late"
        unsettled = self.unsettled()
        assert not unsettled, "; ".join(unsettled)

    def unsettled(self) -> list[str]:
        """What is not as it should be at rest."""
        found = [
            f"{client.request_id} has not ended: {len(client.tokens)} of {len(client.expected)}"
            for client in self.clients.values()
            if not client.ended or client.ended in REFUSALS
        ]
        for node_id in self.layout:
            process = self.world.processes.get(node_id)
            if process is None:
                found.append(f"{node_id} is not there")
                continue
            held = {k: v for k, v in _held(process).items() if v}
            if process.spans.book.live:
                held["spans"] = 1
            if held:
                found.append(f"{node_id} holds {held}")
        return found + (self.operator.unsettled() if self.operator else [])


def _recorder(info: NodeInfo, machine: m.Machine) -> SpanRecorder:
    match machine:
        case SchedulerMachine():
            return SchedulerSpans(machine, lambda: 0, exports=True)
        case WorkerMachine():
            return WorkerSpans(info, lambda: 0, machine.batcher)
    kinds = {
        Role.FRONTEND: FrontendSpans,
        Role.TOKENIZER: TokenizerSpans,
        Role.KVINDEX: KvIndexSpans,
    }
    return kinds[info.role](info, lambda: 0)


def _held(process: Process) -> dict[str, float]:
    machine, statistics = process.machine, process.machine.statistics()
    match machine:
        case WorkerMachine():
            return {
                "referenced": sum(map(bool, machine.pool.references)),
                "leased": statistics["blocks_leased"],
                "used - cached": statistics["blocks_used"] - statistics["blocks_cached"],
                "jobs": len(machine.jobs),
                "ended": len(machine.log.ended),
            }
        case SchedulerMachine():
            return {"requests": len(machine.requests)}
        case TokenizerMachine():
            return {"streams": statistics["streams_live"]}
        case FrontendMachine():
            return {"requests": statistics["requests_live"]}
    return {}
