"""A scheduler with who talks to it; nodes, submissions and requests for the other tests too."""

from typing import TypeVar

import msgspec

from slipstream.core.machine import (
    Event,
    Exit,
    Note,
    PeerDown,
    Received,
    Send,
    SetTimer,
    Started,
    TimerFired,
)
from slipstream.errors import Problem
from slipstream.messages import (
    SCHEDULER,
    AnyMessage,
    Drop,
    Failed,
    Hello,
    LiveRequest,
    NodeInfo,
    Resume,
    Submit,
    TokenizerInfo,
    WorkerInfo,
)
from slipstream.scheduler.machine import SchedulerMachine
from slipstream.scheduler.settings import SchedulerSettings
from slipstream.types import NodeId, Role, SamplingParams

M = TypeVar("M")

TOKENIZER, PREFILL, DECODE, INDEX = "tokenizer-0", "prefill-0", "decode-0", "kvindex-0"
WORKING = (TOKENIZER, PREFILL, DECODE)
"""The smallest cluster that serves."""


def worker(role: str = "decode", **changes: object) -> WorkerInfo:
    fields = {
        "model": "fake",
        "kv_layout_id": "fake/float32/l1",
        "num_blocks": 16,
        "block_bytes": 64,
        "max_model_len": 256,
        "vocab_size": 64,
        "max_num_seqs": 4,
        "prefill_budget_tokens": 64,
        "accept_decode": role == "decode",
        **changes,
    }
    return msgspec.convert(fields, WorkerInfo)


def node(node_id: NodeId, epoch: int = 1, draining: bool = False, **info: object) -> NodeInfo:
    """A node of the role that its name begins with; `info` changes what a worker offers."""
    role = node_id.partition("-")[0]
    offered = worker(role, **info) if role in ("prefill", "decode") else None
    knows = TokenizerInfo(model="fake", **info) if role == "tokenizer" else None
    return NodeInfo(
        node_id=node_id,
        role=Role(role),
        epoch=epoch,
        address=node_id,
        draining=draining,
        worker=offered,
        tokenizer=knows,
    )


def submit(
    request_id: str = "r",
    attempt: int = 1,
    *,
    prompt: int = 20,
    accepted: int = 0,
    max_tokens: int = 20,
    timeout_s: float = 100.0,
    repeated: bool = False,
    hashes: bytes = b"",
    priority: int = 0,
    tenant: str = "",
    weight: int = 1,
    owner: int = 0,
    model: str = "fake",
) -> Submit:
    """A submission; `prompt` and `accepted` in tokens."""
    return Submit(
        request_id=request_id,
        attempt=attempt,
        repeated=repeated,
        prompt=bytes(4 * prompt),
        accepted=bytes(4 * accepted),
        sampling=SamplingParams(max_tokens=max_tokens, seed=1),
        timeout_s=timeout_s,
        block_hashes=hashes,
        priority=priority,
        tenant=tenant,
        weight=weight,
        owner=owner,
        model=model,
    )


def drop(*nodes: str, attempt: int = 1) -> list[tuple[str, Drop]]:
    return [(name, Drop(request_id="r", attempt=attempt)) for name in nodes]


def resume(attempt: int, request_id: str = "r", to: str = TOKENIZER) -> tuple[str, Resume]:
    return to, Resume(request_id=request_id, attempt=attempt)


class Rig:
    """Drives one scheduler; `sent` holds what the last event made it say."""

    def __init__(self, *nodes: NodeId, young: bool = False, **settings: object):
        info = NodeInfo(node_id=SCHEDULER, role=Role.SCHEDULER, epoch=1, address="a")
        settings = {"disaggregation": "always", **settings}
        self.machine = SchedulerMachine(info, msgspec.convert(settings, SchedulerSettings))
        self.now_s = 0.0
        self.timers: dict[str, float] = {}
        self.sent: list[tuple[NodeId, AnyMessage]] = []
        self.exits = False
        self.notes: list[str] = []
        self.handle(Started())
        if not young:
            self.pass_time(20.0)
        for node_id in nodes:
            self.join(node(node_id))

    def handle(self, event: Event) -> None:
        self.sent, self.exits = [], False
        for effect in self.machine.handle(event, self.now_s):
            match effect:
                case Send(to, message):
                    self.sent.append((to, message))
                case SetTimer(key, at_s):
                    self.timers[key] = at_s
                case Note(text):
                    self.notes.append(text)
                case Exit():
                    self.exits = True
                case _:
                    raise AssertionError(effect)
        self.machine.check()

    def hear(self, source: NodeId, message: AnyMessage) -> None:
        self.handle(Received(source, message))

    def join(self, info: NodeInfo, *live: LiveRequest) -> None:
        self.hear(info.node_id, Hello(node=info, live=list(live)))

    def lose(self, peer: NodeId) -> None:
        self.handle(PeerDown(peer))

    def pass_time(self, seconds: float) -> None:
        """`sent` then holds all that was said meanwhile."""
        sent: list[tuple[NodeId, AnyMessage]] = []
        end_s = self.now_s + seconds
        while (due := min((at_s, key) for key, at_s in self.timers.items()))[0] <= end_s:
            self.now_s = self.timers.pop(due[1])
            self.handle(TimerFired(due[1]))
            sent += self.sent
        self.now_s, self.sent = end_s, sent

    def submit(self, *args: object, source: NodeId = "tokenizer-0", **fields: object) -> None:
        self.hear(source, submit(*args, **fields))  # type: ignore[arg-type]

    def all(self, kind: type[M]) -> list[tuple[NodeId, M]]:
        return [(to, message) for to, message in self.sent if isinstance(message, kind)]

    def one(self, kind: type[M]) -> tuple[NodeId, M]:
        """The only message of a kind, with its receiver."""
        found = self.all(kind)
        assert len(found) == 1, self.sent
        return found[0]

    def problem(self) -> Problem:
        """Of the only failure that was said, to a tokenizer."""
        to, failed = self.one(Failed)
        assert to.startswith("tokenizer")
        return failed.problem

    def state(self, request_id: str = "r") -> str:
        request = self.machine.requests.get(request_id)
        return "" if request is None else request.state.value

    def count(self, name: str) -> float:
        return self.machine.statistics().get(name, 0)
