"""A worker's machine with the simulator's device, one or two of them."""

import msgspec

from core.builders import EPOCH, decode, node_info, prefill, worker_info
from sim.device import EOS, Device, right_answer
from slipstream.core import machine as m
from slipstream.core.worker import (
    WorkerMachine,
    WorkerSettings,
)
from slipstream.messages import (
    SCHEDULER,
    AnyMessage,
    AttemptFailed,
    Decode,
    Hello,
    KvReady,
    Prefill,
    TokensOut,
    TokenSpan,
)
from slipstream.types import FinishReason, NodeId, unpack_tokens

TOKENIZER = "tokenizer-0"
PROMPT = list(range(1, 41))
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


class Worker:
    """A machine and its device; steps and READs end when the test says so."""

    def __init__(
        self, node_id: NodeId = "decode-0", offload_after_hits: int | None = None, **info: object
    ):
        epoch = 7 if node_id.startswith("prefill") else EPOCH
        self.node_id = node_id
        self.info = worker_info(**info)
        settings = WorkerSettings(eos_token_ids=(EOS,), offload_after_hits=offload_after_hits)
        self.machine = WorkerMachine(node_info(node_id, epoch, self.info), settings)
        self.device = Device(self.info.num_blocks)
        self.now_s, self.step_s = 0.0, 0.0
        self.plans: list[m.BatchPlan] = []
        self.pulls: list[m.PullBlocks] = []
        self.digesting: list[m.DigestBlocks] = []
        self.sent: list[tuple[NodeId, AnyMessage]] = []
        """What the last event made it say."""
        self.said: list[TokenSpan] = []
        self.timers: dict[str, float] = {}
        self.exits = False
        self.handle(m.Started())

    def handle(self, event: m.Event) -> None:
        self.sent, self.exits = [], False
        for effect in self.machine.handle(event, self.now_s):
            match effect:
                case m.Send(to, message):
                    self.sent.append((to, message))
                    self.said += message.spans if isinstance(message, TokensOut) else []
                case m.RunBatch(plan):
                    self.plans.append(plan)
                case m.PullBlocks():
                    self.pulls.append(effect)
                case m.DigestBlocks():
                    self.digesting.append(effect)
                case m.SetTimer(key, at_s):
                    self.timers[key] = at_s
                case m.CancelTimer(key):
                    self.timers.pop(key, None)
                case m.Exit():
                    self.exits = True
                case _:
                    self.executes(effect)
        self.machine.check()

    def executes(self, effect: m.Effect) -> None:
        """For who looks at more than steps and READs."""

    def hear(self, message: AnyMessage, source: NodeId = SCHEDULER) -> None:
        self.handle(m.Received(source, message))

    def pass_time(self, seconds: float) -> list[AnyMessage]:
        """All that is said meanwhile; less, if it ends itself."""
        sent, end_s = [], self.now_s + seconds
        while (due := min((at_s, key) for key, at_s in self.timers.items()))[0] <= end_s:
            self.now_s = self.timers.pop(due[1])
            self.handle(m.TimerFired(due[1]))
            sent += [message for _, message in self.sent]
            if self.exits:
                return sent
        self.now_s = end_s
        return sent

    def step(self, *tokens: int) -> None:
        """End the step in flight; with `tokens` every row has made these."""
        (plan,) = self.plans
        self.plans = []
        self.device.admit(plan)
        outputs, digests = self.device.run(plan)
        if tokens:
            outputs = tuple(m.RowOutput(o.request_id, o.attempt, tokens) for o in outputs)
        self.now_s += self.step_s
        self.handle(m.BatchDone(plan.step, outputs, digests, self.step_s))

    def run(self) -> list[AnyMessage]:
        """Steps until there is nothing to do; what was said to the scheduler meanwhile."""
        told = self.to(SCHEDULER)
        while self.plans:
            self.step()
            told += self.to(SCHEDULER)
        return told

    def fail_step(self, cause: str) -> None:
        plan = self.plans.pop()
        self.device.admit(plan)
        self.handle(m.BatchFailed(plan.step, cause))

    def read(self, source: "Worker", wrong: bool = False) -> None:
        """End all READs with what lies in the source's memory, or nearly."""
        while self.pulls:
            pull = self.pulls.pop()
            for there, here in zip(pull.source_blocks, pull.local_blocks, strict=True):
                self.device.memory[here][:] = source.device.memory[there]
                self.device.memory[here][3] ^= wrong
            found = tuple(self.device.digest(block) for block in pull.local_blocks)
            self.handle(m.PullDone(pull.pull_id, found))

    def digest(self) -> None:
        """End what the digests were wanted for."""
        while self.digesting:
            op_id, blocks = msgspec.structs.astuple(self.digesting.pop())
            digests = tuple(self.device.digest(block) for block in blocks)
            self.handle(m.BlocksDigested(op_id, digests))

    def to(self, node_id: NodeId) -> list[AnyMessage]:
        return [message for to, message in self.sent if to == node_id]

    def output(self) -> list[int]:
        """Tokens as a tokenizer puts them together; no gap."""
        tokens: list[int] = []
        for span in self.said:
            assert span.position <= len(tokens)
            tokens[span.position :] = unpack_tokens(span.tokens)
        return tokens

    def load_of(self, name: str) -> float:
        return self.machine.statistics()[name]

    @property
    def load(self) -> dict[str, float]:
        return self.machine.statistics()

    @property
    def held(self) -> int:
        return sum(count > 0 for count in self.machine.pool.references)


def answer(message: Decode | Prefill) -> tuple[list[int], FinishReason]:
    return right_answer(unpack_tokens(message.prompt), message.sampling)


def failed(cause: str, attempt: int = 1) -> AttemptFailed:
    return AttemptFailed(request_id="r", attempt=attempt, cause=cause)


def relay(source: Worker, target: Worker, kind: type[AnyMessage]) -> int:
    """Carry what the source's last event said to the target; how many of that kind."""
    messages = [said for said in source.to(target.node_id) if isinstance(said, kind)]
    for message in messages:
        target.hear(message, source.node_id)
    return len(messages)


def handed_over(source: Worker, target: Worker, **params: object) -> Decode:
    """Everything is announced and the READ runs."""
    message = decode(prompt=PROMPT, source="prefill-0", **params)  # type: ignore[arg-type]
    source.hear(prefill(prompt=PROMPT, **params))  # type: ignore[arg-type]
    while source.plans:
        source.step()
        relay(source, target, KvReady)
    target.hear(message)
    return message


def hello(worker: Worker) -> Hello:
    worker.handle(m.PeerUp(SCHEDULER, 1))
    (said,) = worker.to(SCHEDULER)
    assert isinstance(said, Hello)
    return said
