"""A tokenizer machine with a codec whose ids are bytes, and who talks to it."""

from collections.abc import Sequence
from typing import TypeVar

import msgspec

from slipstream.core.machine import (
    Effect,
    Encoded,
    EncodePrompt,
    Event,
    PeerUp,
    Received,
    Send,
    SetTimer,
    Started,
    TimerFired,
)
from slipstream.errors import Problem
from slipstream.messages import (
    INBOXES,
    SCHEDULER,
    AnyMessage,
    ModelState,
    NodeInfo,
    Peers,
    TextOut,
    TextPrompt,
    Tokenize,
    TokenizerInfo,
    TokensOut,
    TokenSpan,
    WorkerInfo,
)
from slipstream.tokenizer.machine import TokenizerMachine
from slipstream.tokenizer.settings import TokenizerSettings
from slipstream.types import FinishReason, NodeId, Role, SamplingParams, pack_tokens

M = TypeVar("M")

EOS = 256
VOCAB_SIZE = 257
MAX_MODEL_LEN = 1000


class ByteCodec:
    """Token ids are bytes; 256 ends a text."""

    special_ids = frozenset({EOS})
    strip_leading = 0

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if 0 <= token_id < 256 else b"<eos>" if token_id == EOS else b""


def ids(text: str) -> list[int]:
    return list(text.encode())


def worker(node_id: NodeId = "decode-0", max_model_len: int = MAX_MODEL_LEN) -> NodeInfo:
    info = WorkerInfo(
        model=MODEL,
        kv_layout_id="layout",
        num_blocks=64,
        block_bytes=64,
        max_model_len=max_model_len,
        vocab_size=VOCAB_SIZE,
        max_num_seqs=8,
        prefill_budget_tokens=64,
        accept_decode=True,
    )
    return NodeInfo(node_id=node_id, role=Role.DECODE, epoch=1, address="a", worker=info)


MODEL = "bytes"


def plain(node_id: NodeId, role: Role, epoch: int = 1) -> NodeInfo:
    knows = TokenizerInfo(model=MODEL) if role is Role.TOKENIZER else None
    return NodeInfo(node_id=node_id, role=role, epoch=epoch, address=node_id, tokenizer=knows)


def peers(*nodes: NodeInfo, missing: str = "") -> Peers:
    """What the scheduler says of a cluster that serves one model."""
    state = ModelState(name=MODEL, missing=missing)
    return Peers(nodes=list(nodes), ready=not missing, reason=missing, models=[state])


def submission(
    request_id: str = "r",
    prompt: str = "Hi",
    *,
    accepted: Sequence[int] = (),
    attempt: int = 1,
    timeout_s: float = 100.0,
    clamp: bool = False,
    **sampling: object,
) -> Tokenize:
    params = {"max_tokens": 100, "seed": 1, **sampling}
    return Tokenize(
        request_id=request_id,
        prompt=TextPrompt(text=prompt),
        sampling=msgspec.convert(params, SamplingParams),
        timeout_s=timeout_s,
        model=MODEL,
        attempt=attempt,
        accepted=pack_tokens(list(accepted)),
        clamp_max_tokens=clamp,
    )


def span(
    tokens: Sequence[int],
    position: int = 0,
    *,
    request_id: str = "r",
    attempt: int = 1,
    finish: FinishReason | None = None,
    stop_token: int | None = None,
    path: str = "decode-0",
    cached: int = 0,
) -> TokenSpan:
    return TokenSpan(
        request_id=request_id,
        attempt=attempt,
        position=position,
        tokens=pack_tokens(list(tokens)),
        finish_reason=finish,
        stop_token=stop_token,
        cached_tokens=cached,
        path=path,
    )


class Rig:
    """Drives one tokenizer; `sent` holds what the last event made it say."""

    def __init__(self, *, scheduler_up: bool = True, encode: bool = True, **settings: object):
        self.machine = TokenizerMachine(
            plain("tokenizer-0", Role.TOKENIZER),
            TokenizerSettings(eos_token_ids=frozenset({EOS}), **settings),  # type: ignore[arg-type]
            ByteCodec(),
        )
        self.now_s = 0.0
        self.encode = encode
        self.sent: list[tuple[NodeId, AnyMessage]] = []
        self.effects: list[Effect] = []
        self.tick_s: float | None = None
        self.handle(Started())
        if scheduler_up:
            self.handle(PeerUp(SCHEDULER, 1))
        self.hear(SCHEDULER, Peers(nodes=[worker()], ready=True))

    def handle(self, event: Event) -> None:
        self.sent, self.effects = [], []
        pending = [event]
        while pending:
            effects = self.machine.handle(pending.pop(0), self.now_s)
            self.machine.check()
            for effect in effects:
                match effect:
                    case Send(to, message):
                        self.sent.append((to, _travelled(to, message)))
                    case SetTimer("tick", at_s):
                        self.tick_s = at_s
                    case SetTimer():
                        pass  # the membership's
                    case EncodePrompt(key, TextPrompt(text=text)) if self.encode:
                        pending.append(Encoded(key, tuple(ids(text))))
                    case _:
                        self.effects.append(effect)

    def hear(self, source: NodeId, message: AnyMessage) -> None:
        self.handle(Received(source, message))

    def ask(self, message: Tokenize) -> None:
        self.hear("frontend-0", message)

    def spans(self, *spans: TokenSpan, worker: NodeId = "decode-0") -> None:
        self.hear(worker, TokensOut(spans=list(spans)))

    def pass_time(self, seconds: float) -> list[tuple[NodeId, AnyMessage]]:
        """All that is said meanwhile."""
        said = []
        end_s = self.now_s + seconds
        while self.tick_s is not None and self.tick_s <= end_s:
            self.now_s, self.tick_s = self.tick_s, None
            self.handle(TimerFired("tick"))
            said += self.sent
        self.now_s = end_s
        return said

    def one(self, kind: type[M], to: NodeId | None = None) -> M:
        """The only message of a kind among what was said."""
        found = self.all(kind, to)
        assert len(found) == 1, self.sent
        return found[0]

    def all(self, kind: type[M], to: NodeId | None = None) -> list[M]:
        return [m for node, m in self.sent if isinstance(m, kind) and to in (None, node)]

    def text(self) -> str:
        return "".join(delta.text for out in self.all(TextOut) for delta in out.deltas)


def _travelled(to: NodeId, message: AnyMessage) -> AnyMessage:
    """As its receiver decodes it."""
    role = to.partition("-")[0]
    decoded: AnyMessage = msgspec.msgpack.decode(
        msgspec.msgpack.encode(message), type=INBOXES[Role(role)]
    )
    return decoded


def failure(message: object) -> Problem:
    problem = getattr(message, "problem", None)
    assert isinstance(problem, Problem)
    return problem
