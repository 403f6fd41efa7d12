"""What a tokenizer tells of a request."""

from core.recorded import beside, ms, named, tree
from slipstream.core.machine import Encoded, PeerDown, PeerUp
from slipstream.errors import ErrorCode, Problem
from slipstream.messages import SCHEDULER, Cancel, Codec, Failed, Resume, TextPrompt
from slipstream.spans import Span
from slipstream.tokenizer.spans import TokenizerSpans
from slipstream.types import FinishReason
from tokenizer.machines import Rig, ids, span, submission

STOP = FinishReason.STOP


def rig(**settings: object) -> tuple[Rig, TokenizerSpans]:
    rig = Rig(**settings)  # type: ignore[arg-type]
    spans = TokenizerSpans(rig.machine.membership.node, lambda: 0)
    beside(rig.machine, spans)
    return rig, spans


def told(spans: TokenizerSpans) -> list[Span]:
    assert not spans.book.live
    (request,) = spans.book.take(0.0, 0)
    return request.spans


def test_a_stream() -> None:
    tokenizer, spans = rig(encode=False)
    tokenizer.ask(submission("r", prompt="Hello"))
    tokenizer.now_s = 0.004
    tokenizer.handle(Encoded("r", tuple(ids("Hello"))))
    tokenizer.now_s = 0.100
    tokenizer.spans(span(ids("ab")))
    tokenizer.spans(span(ids("c"), 2))
    tokenizer.now_s = 0.300
    tokenizer.spans(span(ids("d"), 3, finish=STOP))
    found = told(spans)
    assert tree(found) == [("", "encode"), ("", "detokenize")]
    of = named(found)
    assert of["encode"].attributes == {"tokens": 5}
    assert of["detokenize"].attributes == {"tokens": 4, "finish_reason": "stop"}
    assert [round(at) for at in (*ms(of["encode"]), *ms(of["detokenize"]))] == [0, 4, 100, 200]


def test_a_prompt_that_is_refused() -> None:
    tokenizer, spans = rig(encode=False)
    tokenizer.ask(submission("r"))
    problem = Problem(code=ErrorCode.CONTEXT_LENGTH, message="m")
    tokenizer.handle(Encoded("r", problem=problem))
    assert named(told(spans))["encode"].attributes == {"error.type": "context_length_exceeded"}


def test_an_attempt_on_another_worker() -> None:
    tokenizer, spans = rig()
    tokenizer.ask(submission("r"))
    tokenizer.spans(span(ids("ab")))
    tokenizer.hear(SCHEDULER, Resume(request_id="r", attempt=2))
    tokenizer.spans(span(ids("c"), 2, attempt=2, finish=STOP), worker="decode-1")
    found = told(spans)
    assert [name for _, name in tree(found)] == ["encode", "detokenize", "submit again"]
    assert named(found)["submit again"].attributes == {"attempt": 2}


def test_whatever_ends_it_it_is_over() -> None:
    tokenizer, spans = rig()
    tokenizer.ask(submission("r"))
    tokenizer.hear("frontend-0", Cancel(request_id="r"))
    assert told(spans)
    tokenizer.ask(submission("s"))
    problem = Problem(code=ErrorCode.DEADLINE, message="m")
    tokenizer.hear(SCHEDULER, Failed(request_id="s", problem=problem))
    assert told(spans)
    tokenizer.ask(submission("s"))
    assert not spans.book.live, "said again, it opens nothing"


def test_a_call_of_tokenize_is_no_request() -> None:
    tokenizer, spans = rig()
    tokenizer.hear("frontend-0", Codec(call_id="c", prompt=TextPrompt(text="x")))
    assert not spans.book.live and not spans.book.take(0.0, 0)


def test_what_is_submitted_again_to_a_scheduler_that_comes_back() -> None:
    tokenizer, spans = rig()
    tokenizer.ask(submission("r"))
    tokenizer.spans(span(ids("ab")))
    tokenizer.handle(PeerDown(SCHEDULER))
    tokenizer.handle(PeerUp(SCHEDULER, 2))
    tokenizer.spans(span(ids("c"), 2, finish=STOP))
    assert [name for _, name in tree(told(spans))] == ["encode", "detokenize"]
