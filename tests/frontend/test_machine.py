"""The frontend's machine, event by event."""

from collections.abc import Sequence

import pytest

from slipstream.core.machine import (
    Closed,
    CodecAsked,
    Deliver,
    DeliverCodec,
    Drain,
    Effect,
    Event,
    Exit,
    Opened,
    PeerDown,
    PeerUp,
    Received,
    Send,
    SetTimer,
    Started,
    TimerFired,
)
from slipstream.core.membership import COOL_DOWN_S
from slipstream.errors import ErrorCode, Problem
from slipstream.frontend.machine import TICK_S, FrontendMachine
from slipstream.frontend.settings import FrontendSettings
from slipstream.messages import (
    SCHEDULER,
    AnyMessage,
    Cancel,
    ClusterLoad,
    Codec,
    CodecResult,
    Failed,
    Hello,
    NodeInfo,
    TextDelta,
    TextOut,
    TextPrompt,
    Tokenize,
    Tokenized,
)
from slipstream.types import FinishReason, NodeId, Role, pack_tokens, unpack_tokens
from tokenizer.machines import peers, plain, submission

T0, T1 = "tokenizer-0", "tokenizer-1"
PATIENCE_S = FrontendSettings().recovery_wait_s


def tokenizer(name: NodeId, epoch: int = 1) -> NodeInfo:
    return plain(name, Role.TOKENIZER, epoch)


def delta(
    tokens: Sequence[int], position: int = 0, attempt: int = 1, *, end: bool = False
) -> TextDelta:
    return TextDelta(
        request_id="r",
        attempt=attempt,
        position=position,
        tokens=pack_tokens(list(tokens)),
        text=bytes(tokens).decode(),
        finish_reason=FinishReason.STOP if end else None,
    )


class Rig:
    def __init__(self, *names: NodeId, **settings: object) -> None:
        self.machine = FrontendMachine(
            plain("frontend-0", Role.FRONTEND),
            FrontendSettings(**settings),  # type: ignore[arg-type]
        )
        self.now_s = 0.0
        self.tick_s: float | None = None
        self.effects: list[Effect] = []
        self.handle(Started())
        self.handle(PeerUp(SCHEDULER, 1))
        self.peers(*names)

    def handle(self, event: Event) -> None:
        self.effects = []
        for effect in self.machine.handle(event, self.now_s):
            match effect:
                case SetTimer("tick", at_s):
                    self.tick_s = at_s
                case SetTimer() | Send(_, Hello()):
                    pass  # the membership's
                case _:
                    self.effects.append(effect)
        self.machine.check()

    def hear(self, source: NodeId, message: AnyMessage) -> None:
        self.handle(Received(source, message))

    def peers(self, *names: NodeId, ready: bool = True) -> None:
        nodes = [tokenizer(name) for name in names]
        self.hear(SCHEDULER, peers(*nodes, missing="" if ready else "no worker"))

    def open(self, message: Tokenize | None = None) -> None:
        self.handle(Opened(message or submission("r")))

    def deltas(self, source: NodeId, *deltas: TextDelta) -> str:
        """What the client gets of them."""
        self.hear(source, TextOut(deltas=list(deltas)))
        items = [effect.item for effect in self.effects if isinstance(effect, Deliver)]
        return "".join(item.text for item in items if isinstance(item, TextDelta))

    def pass_time(self, seconds: float) -> list[Effect]:
        end_s, done = self.now_s + seconds, []
        while self.tick_s is not None and self.tick_s <= end_s:
            self.now_s, self.tick_s = self.tick_s, None
            self.handle(TimerFired("tick"))
            done += self.effects
        self.now_s = end_s
        return done

    def asked(self) -> tuple[NodeId, Tokenize]:
        """The only Tokenize among the last effects."""
        sends = [effect for effect in self.effects if isinstance(effect, Send)]
        ((to, message),) = [(send.to, send.message) for send in sends]
        assert isinstance(message, Tokenize)
        return to, message

    def problem(self) -> Problem:
        (effect,) = self.effects
        assert isinstance(effect, Deliver | DeliverCodec)
        problem = effect.item if isinstance(effect, Deliver) else effect.problem
        assert isinstance(problem, Problem)
        return problem


@pytest.fixture
def rig() -> Rig:
    """One tokenizer, one request with two tokens."""
    rig = Rig(T0)
    rig.open()
    rig.handle(PeerUp(T0, 1))
    rig.hear(T0, Tokenized(request_id="r", prompt_tokens=2))
    rig.deltas(T0, delta(b"ab"))
    return rig


def test_one_request() -> None:
    rig = Rig(T0)
    rig.open()
    assert rig.asked() == (T0, submission("r"))
    rig.open()
    assert not rig.effects  # said twice
    rig.hear(T0, Tokenized(request_id="r", prompt_tokens=2))
    assert rig.effects == [Deliver("r", 2)]
    rig.hear(T0, TextOut(deltas=[delta(b"ab"), delta(b"c", 2, end=True)]))
    assert rig.effects == [Deliver("r", delta(b"ab")), Deliver("r", delta(b"c", 2, end=True))]
    assert rig.deltas(T0, delta(b"d", 3)) == ""
    rig.handle(Closed("r"))
    assert not rig.effects
    statistics = rig.machine.statistics()
    assert (statistics["tokens_total"], statistics["requests_unclosed"]) == (3, 0)


def test_requests_are_spread() -> None:
    rig = Rig(T0, T1)
    targets = []
    for i in range(4):
        rig.open(submission(f"r{i}"))
        targets.append(rig.asked()[0])
    assert targets in ([T0, T1, T0, T1], [T1, T0, T1, T0])
    rig.handle(Closed("r1"))
    assert rig.effects == [Send(targets[1], Cancel(request_id="r1"))]
    rig.open(submission("r4"))
    assert rig.asked()[0] == targets[1]


def test_one_request_at_a_time_is_spread_too() -> None:
    rig = Rig(T0, T1)
    targets = []
    for i in range(6):
        rig.open(submission(f"r{i}"))
        targets.append(rig.asked()[0])
        rig.handle(Closed(f"r{i}"))
    assert sorted(targets) == [T0] * 3 + [T1] * 3


def test_refusals() -> None:
    rig = Rig(T0, max_requests=1)
    rig.peers(T0, ready=False)
    rig.now_s = PATIENCE_S
    rig.open()
    problem = rig.problem()
    assert (problem.code, problem.retry_after_s) == (ErrorCode.NOT_READY, 1.0)
    assert "no worker" in problem.message
    rig.peers(T0)
    rig.open()
    rig.open(submission("s"))
    assert (rig.problem().code, rig.problem().retry_after_s) == (ErrorCode.QUEUE_FULL, 1.0)
    rig.handle(Drain())
    rig.open(submission("t"))
    assert rig.problem().code is ErrorCode.DRAINING
    rig = Rig()
    rig.open()
    assert rig.problem().code is ErrorCode.NOT_READY


@pytest.mark.parametrize("away", ["worker", "scheduler", "tokenizer"])
def test_what_is_away_for_a_while_is_waited_for(away: str) -> None:
    rig = Rig(T0)
    lose = {
        "worker": lambda: rig.peers(T0, ready=False),
        "scheduler": lambda: rig.handle(PeerDown(SCHEDULER)),
        "tokenizer": lambda: rig.handle(PeerDown(T0)),
    }
    lose[away]()
    rig.now_s = COOL_DOWN_S - 0.1 if away == "tokenizer" else PATIENCE_S - 1.0
    assert rig.machine.patience.missing(rig.now_s), "the page of health says so at once"
    rig.open()
    assert not [e for e in rig.effects if isinstance(e, Deliver)], "it is taken"
    rig.handle(PeerUp(SCHEDULER, 2))
    rig.handle(PeerUp(T0, 1))
    rig.peers(T0)
    assert away != "tokenizer" or rig.machine.statistics()["requests_waiting"] == 0
    done = rig.pass_time(2 * PATIENCE_S)
    assert not [effect for effect in done if isinstance(effect, Deliver)]


def test_who_has_waited_long_enough_is_sent_away_unless_it_has_begun() -> None:
    rig = Rig(T0)
    rig.open()
    rig.hear(T0, Tokenized(request_id="r", prompt_tokens=3))
    assert rig.deltas(T0, delta(b"a")) == "a"
    rig.open(submission("waits"))
    rig.peers(T0, ready=False)
    ended = [effect for effect in rig.pass_time(PATIENCE_S + 1.0) if isinstance(effect, Deliver)]
    ((name, problem),) = [(effect.request_id, effect.item) for effect in ended]
    assert name == "waits" and isinstance(problem, Problem)
    assert problem.code is ErrorCode.NOT_READY and problem.retry_after_s == 1.0
    rig.open(submission("late"))
    assert rig.problem().code is ErrorCode.NOT_READY


def test_failure_is_the_end(rig: Rig) -> None:
    problem = Problem(code=ErrorCode.CONTEXT_LENGTH, message="long")
    rig.hear(T1, Failed(request_id="r", problem=problem))
    assert not rig.effects  # not its request
    rig.hear(T0, Failed(request_id="r", problem=problem))
    assert rig.effects == [Deliver("r", problem)]
    rig.hear(T0, Failed(request_id="r", problem=problem))
    assert not rig.effects


def test_deadline(rig: Rig) -> None:
    rig.pass_time(104.4)
    assert rig.machine.statistics()["requests_live"] == 1
    cancel, deliver = rig.pass_time(1.1)
    assert cancel == Send(T0, Cancel(request_id="r"))
    assert isinstance(deliver, Deliver) and isinstance(deliver.item, Problem)
    assert deliver.item.code is ErrorCode.DEADLINE


def test_a_lost_tokenizers_requests_move(rig: Rig) -> None:
    rig.peers(T0, T1)
    rig.now_s = 10.0
    rig.deltas(T0, delta(b"c", 2, attempt=3))  # the scheduler moved it twice
    rig.handle(PeerDown(T0))
    to, again = rig.asked()
    assert (to, again.attempt, again.timeout_s) == (T1, 1024, 90.0)
    assert unpack_tokens(again.accepted) == list(b"abc")
    assert rig.deltas(T0, delta(b"d", 3, attempt=3)) == ""  # from where it was
    assert rig.deltas(T1, delta(b"d", 3, attempt=3)) == ""
    rig.hear(T1, Tokenized(request_id="r", prompt_tokens=2))
    assert not rig.effects  # the client knows
    assert rig.deltas(T1, delta(b"d", 3, attempt=1024)) == "d"
    rig.handle(PeerUp(T0, 1))
    assert not rig.effects


def test_a_tokenizer_that_still_has_it_says_the_rest(rig: Rig) -> None:
    rig.handle(PeerDown(T0))
    assert not rig.effects
    rig.handle(PeerUp(T0, 1))
    to, again = rig.asked()
    assert (to, again.attempt, unpack_tokens(again.accepted)) == (T0, 1, list(b"ab"))
    assert rig.deltas(T0, delta(b"d", 3)) == ""  # ahead of what got lost
    assert rig.deltas(T0, delta(b"b", 1), delta(b"c", 2), delta(b"d", 3)) == "cd"


def test_a_tokenizer_that_started_anew_gets_a_new_attempt(rig: Rig) -> None:
    rig.handle(PeerDown(T0))
    rig.handle(PeerUp(T0, 2))
    to, again = rig.asked()
    assert (to, again.attempt) == (T0, 1024)
    rig.handle(PeerDown(T0))
    rig.handle(PeerUp(T0, 3))
    assert rig.asked()[1].attempt == 2048


def test_who_waits_takes_a_tokenizer_that_appears(rig: Rig) -> None:
    rig.handle(PeerDown(T0))
    rig.peers(T0, T1)
    assert rig.asked()[0] == T1


def test_who_waits_asks_again_after_the_cool_down(rig: Rig) -> None:
    rig.handle(PeerDown(T0))
    (again,) = rig.pass_time(2.6)
    assert isinstance(again, Send) and isinstance(again.message, Tokenize)
    assert (again.to, again.message.attempt) == (T0, 1024)


def test_many_large_requests_move_piece_by_piece() -> None:
    rig = Rig(T0)
    for i in range(4):
        rig.open(submission(f"r{i}", "x" * (10 << 20)))
    rig.peers(T0, T1)
    rig.handle(PeerDown(T0))
    assert len(rig.effects) == 2
    assert len(rig.pass_time(0.6)) == 2


def test_who_waits_can_leave(rig: Rig) -> None:
    rig.handle(PeerDown(T0))
    rig.handle(Closed("r"))
    assert not rig.effects
    rig.handle(PeerUp(T0, 1))
    assert not rig.effects


def test_nothing_before_the_length_of_the_prompt() -> None:
    """It was lost with a session, and will be said again before the text."""
    rig = Rig(T0)
    rig.open()
    assert rig.deltas(T0, delta(b"a")) == ""
    rig.hear(T0, Tokenized(request_id="r", prompt_tokens=2))
    assert rig.deltas(T0, delta(b"a")) == "a"


def test_drain_waits_for_clients(rig: Rig) -> None:
    rig.handle(Drain())
    assert rig.machine.draining and not rig.effects
    assert rig.deltas(T0, delta(b"c", 2, end=True)) == "c"
    assert Exit() not in rig.effects  # it is not written yet
    rig.handle(Closed("r"))
    assert rig.effects == [Exit()]
    rig.handle(Closed("r"))
    assert not rig.effects
    rig = Rig(T0)
    rig.handle(Drain())
    assert rig.effects == [Exit()]


def test_what_outlasts_the_drain_is_told_so(rig: Rig) -> None:
    rig.handle(Drain())
    drain_s = FrontendSettings().drain_timeout_s
    assert not any(isinstance(e, Deliver) for e in rig.pass_time(drain_s - TICK_S))
    effects = rig.pass_time(2 * TICK_S)
    (problem,) = (e.item for e in effects if isinstance(e, Deliver))
    assert isinstance(problem, Problem) and problem.code is ErrorCode.DRAINING
    assert f"{drain_s:g} s" in problem.message
    assert [type(e.message) for e in effects if isinstance(e, Send)] == [Cancel]
    rig.handle(Closed("r"))
    assert rig.effects == [Exit()]


def test_load_is_kept(rig: Rig) -> None:
    rig.hear(SCHEDULER, ClusterLoad(gauges={"decode-0": {"running": 2}}))
    assert rig.machine.load.gauges == {"decode-0": {"running": 2}}


# --- Codec calls ---


def test_codec_call(rig: Rig) -> None:
    prompt = TextPrompt(text="x")
    rig.handle(CodecAsked("c", prompt))
    assert rig.effects == [Send(T0, Codec(call_id="c", prompt=prompt))]
    result = CodecResult(call_id="c", tokens=b"abcd", token_texts=["x"], text="y")
    rig.hear(T0, result)
    assert rig.effects == [DeliverCodec("c", b"abcd", ("x",), "y")]
    rig.hear(T0, result)
    assert not rig.effects


def test_codec_call_that_nobody_answers() -> None:
    rig = Rig(T0, max_codec_calls=1)
    rig.handle(CodecAsked("c", tokens=b"abcd"))
    rig.handle(CodecAsked("d", tokens=b"abcd"))
    assert rig.problem().code is ErrorCode.QUEUE_FULL
    (late,) = rig.pass_time(31.0)
    assert isinstance(late, DeliverCodec) and late.problem is not None
    assert late.problem.code is ErrorCode.DEADLINE
    rig.handle(CodecAsked("e", tokens=b"abcd"))
    rig.handle(PeerDown(T0))
    assert rig.problem().code is ErrorCode.NOT_READY
    rig.handle(CodecAsked("f", tokens=b"abcd"))
    assert rig.problem().code is ErrorCode.NOT_READY
