"""The tokenizer's machine, event by event."""

import math

import pytest

from slipstream.core.machine import (
    Drain,
    Encoded,
    EncodePrompt,
    Exit,
    PeerDown,
    PeerUp,
)
from slipstream.core.prefix import block_hashes, namespace
from slipstream.core.submission import TAKEN, digest
from slipstream.errors import ErrorCode, Problem
from slipstream.messages import (
    SCHEDULER,
    Cancel,
    Codec,
    CodecResult,
    Failed,
    Hello,
    Peers,
    Resend,
    Resume,
    Seek,
    Sought,
    StreamAck,
    StreamEnded,
    Submit,
    TextOut,
    TextPrompt,
    Tokenize,
    Tokenized,
    TokensOut,
    TokenSpan,
)
from slipstream.types import (
    ATTEMPTS_PER_MOVE,
    ATTEMPTS_PER_OWNER,
    FinishReason,
    TokenLogprobs,
    Usage,
    pack_tokens,
    unpack_tokens,
)
from tokenizer.machines import EOS, MAX_MODEL_LEN, Rig, failure, ids, span, submission, worker


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_from_prompt_to_end(rig: Rig) -> None:
    rig.ask(submission(prompt="x" * 40, seed=7))
    assert [to for to, _ in rig.sent] == [SCHEDULER, "frontend-0"], "what is waited for goes first"
    assert rig.one(Tokenized, "frontend-0").prompt_tokens == 40
    submit = rig.one(Submit, SCHEDULER)
    assert (submit.attempt, submit.accepted, submit.sampling.seed) == (1, b"", 7)
    assert unpack_tokens(submit.prompt) == ids("x" * 40)
    assert submit.timeout_s == 100.0
    assert submit.block_hashes == b"".join(block_hashes(ids("x" * 40), namespace("layout", "")))

    rig.spans(span(ids("He"), cached=16, path="prefill-0"))
    (delta,) = rig.one(TextOut, "frontend-0").deltas
    assert (delta.position, unpack_tokens(delta.tokens), delta.text) == (0, ids("He"), "He")
    assert (delta.path, delta.finish_reason, delta.usage) == ("prefill-0", None, None)

    end = span(
        [*ids("y"), EOS], 2, finish=FinishReason.STOP, stop_token=EOS, path="prefill-0>decode-0"
    )
    rig.spans(end)
    (delta,) = rig.one(TextOut).deltas
    assert (delta.text, unpack_tokens(delta.tokens)) == ("y", [*ids("y"), EOS])
    assert (delta.finish_reason, delta.stop_reason) == (FinishReason.STOP, None)
    assert delta.usage == Usage(prompt_tokens=40, completion_tokens=4, cached_tokens=16)
    assert delta.path == "prefill-0>decode-0"
    assert rig.one(StreamAck, "decode-0") == StreamAck(request_id="r", attempt=1)
    rig.one(StreamEnded, SCHEDULER)
    assert rig.machine.statistics()["tokens_total"] == 4

    rig.spans(end)  # its acknowledgement was lost
    assert [type(message) for _, message in rig.sent] == [StreamAck]


def test_one_message_to_each_frontend_for_a_step(rig: Rig) -> None:
    for i, frontend in enumerate(["frontend-0", "frontend-1", "frontend-0"]):
        rig.hear(frontend, submission(f"r{i}"))
    rig.spans(*(span(ids("a"), request_id=f"r{i}") for i in range(3)))
    said = {to: [d.request_id for d in m.deltas] for to, m in rig.sent if isinstance(m, TextOut)}
    assert said == {"frontend-0": ["r0", "r2"], "frontend-1": ["r1"]}
    assert len(rig.sent) == 2


def test_stop_string_ends_it_here(rig: Rig) -> None:
    rig.ask(submission(stop=["END"]))
    rig.spans(span(ids("one E")))
    assert rig.text() == "one "
    rig.spans(span(ids("NDxyz"), 5))
    (delta,) = rig.one(TextOut).deltas
    assert (delta.text, delta.stop_reason, delta.finish_reason) == ("", "END", FinishReason.STOP)
    assert unpack_tokens(delta.tokens) == ids("ND")
    assert delta.usage is not None and delta.usage.completion_tokens == 7
    rig.one(StreamEnded, SCHEDULER)
    assert not rig.all(StreamAck)
    rig.spans(span(ids("zz"), 10))
    assert not rig.sent
    rig.spans(span(ids("zz"), 12, finish=FinishReason.LENGTH))
    rig.one(StreamAck)


def test_what_was_held_back_comes_at_the_end(rig: Rig) -> None:
    rig.ask(submission(stop=["END"], max_tokens=5))
    rig.spans(span([*ids("abE"), 0xE4, 0xBD], finish=FinishReason.LENGTH))
    (delta,) = rig.one(TextOut).deltas
    assert (delta.text, delta.finish_reason) == ("abE\ufffd", FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("asked", "token", "reason"),
    [({}, EOS, None), ({"stop_token_ids": [ord("!")]}, ord("!"), ord("!"))],
)
def test_stop_token_is_counted_and_not_shown(
    rig: Rig, asked: dict[str, object], token: int, reason: int | None
) -> None:
    rig.ask(submission(skip_special_tokens=False, **asked))
    # The first token may come from the prefill worker without a word that it is the end.
    rig.spans(span([*ids("a"), token]))
    assert rig.text() == "a"
    rig.spans(span([*ids("a"), token], finish=FinishReason.STOP, stop_token=token))
    (delta,) = rig.one(TextOut).deltas
    assert (delta.position, delta.tokens, delta.text, delta.stop_reason) == (2, b"", "", reason)
    assert delta.usage is not None and delta.usage.completion_tokens == 2


@pytest.mark.parametrize(
    ("asked", "token", "text", "reason"),
    [
        ({"stop_token_ids": [ord("!")]}, ord("!"), "a!", ord("!")),
        ({"stop_token_ids": [ord("!")], "stop": ["!?"]}, ord("!"), "a!", ord("!")),
        ({}, EOS, "a", None),
        ({"skip_special_tokens": False}, EOS, "a<eos>", None),
    ],
)
def test_a_stop_token_is_shown_where_a_stop_string_would_be(
    rig: Rig, asked: dict[str, object], token: int, text: str, reason: int | None
) -> None:
    rig.ask(submission(include_stop_str_in_output=True, **asked))
    rig.spans(span([*ids("a"), token]))
    said = rig.text()
    rig.spans(span([*ids("a"), token], finish=FinishReason.STOP, stop_token=token))
    (delta,) = rig.one(TextOut).deltas
    assert (delta.position, said + delta.text, delta.stop_reason) == (2, text, reason)
    assert delta.finish_reason is FinishReason.STOP
    assert delta.usage is not None and delta.usage.completion_tokens == 2


def test_eos_is_text_where_it_does_not_stop(rig: Rig) -> None:
    rig.ask(submission(skip_special_tokens=False, ignore_eos=True))
    rig.spans(span([EOS, *ids("a")]))
    assert rig.text() == "<eos>a"


def test_logprobs_have_their_text(rig: Rig) -> None:
    rig.ask(submission(logprobs=1))
    entries = [TokenLogprobs(t, -0.5, ((0xE4, -1.0),)) for t in ids("ab")]
    given = TokenSpan(
        request_id="r", attempt=1, position=0, tokens=pack_tokens(ids("ab")), logprobs=entries
    )
    rig.spans(span(ids("a")))
    (delta,) = rig.one(TextOut).deltas
    assert delta.logprobs is not None and math.isnan(delta.logprobs[0].logprob)  # none was sent
    rig.spans(given)
    (delta,) = rig.one(TextOut).deltas
    assert delta.logprobs is not None
    (entry,) = delta.logprobs
    assert (entry.token_id, entry.text, entry.raw, entry.logprob) == (98, "b", b"b", -0.5)
    assert [(top.text, top.raw) for top in entry.top] == [("\ufffd", b"\xe4")]


def test_logprobs_of_the_prompt_come_with_the_first_token_alone(rig: Rig) -> None:
    rig.ask(submission(prompt="xyz", prompt_logprobs=1))
    assert rig.one(Submit).block_hashes == b""
    scores = [TokenLogprobs(t, -0.5, ((0xE4, -1.0),)) for t in ids("yz")]
    first = TokenSpan(
        request_id="r", attempt=1, position=0, tokens=pack_tokens(ids("a")), prompt_logprobs=scores
    )
    rig.spans(first)
    (delta,) = rig.one(TextOut).deltas
    assert delta.prompt_logprobs is not None and math.isnan(delta.prompt_logprobs[0].logprob)
    assert [(x.text, len(x.top)) for x in delta.prompt_logprobs] == [("x", 0), ("y", 1), ("z", 1)]
    rig.spans(span(ids("b"), position=1))
    (delta,) = rig.one(TextOut).deltas
    assert delta.prompt_logprobs is None


# --- Lengths and refusals ---


def test_context_length(rig: Rig) -> None:
    rig.ask(submission(prompt="x" * 950, max_tokens=51))
    problem = failure(rig.one(Failed, "frontend-0"))
    assert problem.code is ErrorCode.CONTEXT_LENGTH
    for number in ("1000", "1001", "950", "51"):
        assert number in problem.message
    assert not rig.all(Submit)
    rig.ask(submission("s", prompt="x" * 950, max_tokens=50))
    assert rig.one(Submit).sampling.max_tokens == 50


@pytest.mark.parametrize(("num_prompt", "room"), [(950, 50), (999, 1), (1000, None), (2000, None)])
def test_clamped_to_the_context(rig: Rig, num_prompt: int, room: int | None) -> None:
    rig.ask(submission(prompt="x" * num_prompt, max_tokens=500, clamp=True))
    if room is None:
        assert failure(rig.one(Failed)).code is ErrorCode.CONTEXT_LENGTH
    else:
        assert rig.one(Submit).sampling.max_tokens == room


def test_the_least_worker_and_the_setting_decide_the_context() -> None:
    rig = Rig()
    rig.hear(SCHEDULER, Peers(nodes=[worker("prefill-0", 20)], ready=True))
    rig.ask(submission(max_tokens=19))
    assert failure(rig.one(Failed)).code is ErrorCode.CONTEXT_LENGTH
    rig = Rig(max_model_len=10)
    rig.ask(submission(max_tokens=9))
    assert failure(rig.one(Failed)).code is ErrorCode.CONTEXT_LENGTH


def test_a_stream_that_has_begun_needs_no_more_than_one_large_worker() -> None:
    """A small one may have come since. What was left to us is the same again, where it can be."""
    rig = Rig()
    rig.hear(SCHEDULER, Peers(nodes=[worker("prefill-0", 20)], ready=True))
    rig.ask(submission(accepted=ids("ab"), max_tokens=25))
    assert rig.one(Submit).sampling.max_tokens == 25
    rig.ask(submission("same", accepted=ids("ab"), max_tokens=5000, clamp=True))
    assert rig.one(Submit).sampling.max_tokens == 20 - 2
    rig.ask(submission("over", accepted=ids("a" * 18), max_tokens=5000, clamp=True))
    assert [end.finish_reason for delta in rig.all(TextOut) for end in delta.deltas] == ["length"]
    rig.ask(submission("longer", accepted=ids("a" * 19), max_tokens=5000, clamp=True))
    assert rig.one(Submit).sampling.max_tokens == MAX_MODEL_LEN - 2


def test_foreign_token_ids_are_refused() -> None:
    for bad in (-1, 257):
        rig = Rig(encode=False)
        rig.ask(submission())
        rig.handle(Encoded("r", (1, bad, 2)))
        assert failure(rig.one(Failed)).code is ErrorCode.INVALID_VALUE


def test_a_prompt_that_cannot_be_encoded() -> None:
    rig = Rig(encode=False)
    rig.ask(submission())
    assert rig.effects == [EncodePrompt("r", TextPrompt(text="Hi"), deadline_s=100.0)]
    problem = Problem(code=ErrorCode.INVALID_VALUE, message="no")
    rig.handle(Encoded("r", problem=problem))
    assert failure(rig.one(Failed)) == problem
    rig.handle(Encoded("r", (1,)))
    assert not rig.sent


def test_streams_are_bounded() -> None:
    rig = Rig(max_streams=2)
    for i in range(2):
        rig.ask(submission(f"r{i}"))
    rig.ask(submission("r2"))
    assert failure(rig.one(Failed)).code is ErrorCode.QUEUE_FULL
    rig.hear("frontend-0", Cancel(request_id="r0"))
    for i in range(5):  # as many may have ended as may live
        rig.ask(submission(f"s{i}"))
        rig.one(Submit)
        rig.hear("frontend-0", Cancel(request_id=f"s{i}"))


# --- Gaps, attempts, sessions ---


def test_a_gap_is_asked_for_once_and_again_later(rig: Rig) -> None:
    rig.ask(submission())
    rig.spans(span(ids("ab")))
    rig.spans(span(ids("e"), 4), worker="decode-1")
    asked = Resend(request_id="r", attempt=1, position=2)
    assert rig.sent == [("decode-1", asked)]
    rig.spans(span(ids("f"), 5), worker="decode-1")
    assert not rig.sent
    assert [said for said in rig.pass_time(1.2) if isinstance(said[1], Resend)] == [
        ("decode-1", asked)
    ]
    rig.spans(span(ids("cdef"), 2), worker="decode-1")
    assert rig.text() == "cdef"
    assert not rig.pass_time(5.0)


def test_resume_takes_the_stream_to_its_next_attempt(rig: Rig) -> None:
    rig.ask(submission(prompt="x" * 15))
    rig.spans(span(ids("abc")))
    rig.hear(SCHEDULER, Resume(request_id="r", attempt=2))
    submit = rig.one(Submit)
    assert (submit.attempt, unpack_tokens(submit.accepted)) == (2, ids("abc"))
    assert len(submit.block_hashes) == 16  # 18 tokens
    rig.spans(span(ids("XYZ"), 3))  # of the old attempt
    assert not rig.sent
    rig.spans(span(ids("XYZ"), 3, finish=FinishReason.STOP))
    assert rig.sent == [("decode-0", StreamAck(request_id="r", attempt=1))]
    rig.spans(span(ids("q"), 3, attempt=3))  # of one that nobody has announced
    assert not rig.sent
    rig.spans(span(ids("d"), 3, attempt=2))
    assert rig.text() == "d"
    rig.hear(SCHEDULER, Resume(request_id="r", attempt=1))
    assert rig.one(Submit).attempt == 2


def test_resume_of_nothing(rig: Rig) -> None:
    rig.hear(SCHEDULER, Resume(request_id="r", attempt=2))
    assert rig.sent == [(SCHEDULER, StreamEnded(request_id="r"))]


def test_failed_by_the_scheduler_is_final(rig: Rig) -> None:
    rig.ask(submission())
    problem = Problem(code=ErrorCode.QUEUE_FULL, message="full", retry_after_s=2.0)
    rig.hear(SCHEDULER, Failed(request_id="r", problem=problem))
    assert failure(rig.one(Failed, "frontend-0")) == problem
    rig.ask(submission())  # the frontend did not hear it
    assert failure(rig.one(Failed, "frontend-0")) == problem


def test_the_scheduler_comes_back(rig: Rig) -> None:
    for i in range(3):
        rig.ask(submission(f"r{i}"))
    rig.spans(span(ids("ab"), request_id="r1"))
    rig.handle(PeerDown(SCHEDULER))
    rig.ask(submission("r3"))
    assert not rig.all(Submit)
    rig.spans(span(ids("c"), 2, request_id="r1"))
    rig.handle(PeerUp(SCHEDULER, 2))
    assert isinstance(rig.sent[0][1], Hello)
    said = {m.request_id: unpack_tokens(m.accepted) for m in rig.all(Submit)}
    assert said == {"r0": [], "r1": ids("abc"), "r2": [], "r3": []}


def test_many_long_streams_are_submitted_piece_by_piece() -> None:
    rig = Rig(encode=False, scheduler_up=False)
    rig.hear(SCHEDULER, Peers(nodes=[worker(max_model_len=1 << 23)], ready=True))
    for i in range(3):
        rig.ask(submission(f"r{i}"))
        rig.handle(Encoded(f"r{i}", (1,) * 2_000_000))
    rig.handle(PeerUp(SCHEDULER, 1))
    assert [m.request_id for m in rig.all(Submit)] == ["r0", "r1"]
    said = [m for _, m in rig.pass_time(1.0) if isinstance(m, Submit)]
    assert [m.request_id for m in said] == ["r2"]


def test_a_lower_attempt_of_the_frontend_is_a_resync(rig: Rig) -> None:
    """The scheduler raised the attempt, and the frontend has not heard of it."""
    rig.ask(submission())
    rig.spans(span(ids("ab")))
    rig.hear(SCHEDULER, Resume(request_id="r", attempt=2))
    rig.handle(PeerDown("frontend-0"))
    rig.spans(span(ids("cd"), 2, attempt=2))
    rig.handle(PeerUp("frontend-0", 1))
    rig.ask(submission(accepted=ids("ab")))
    assert rig.one(Tokenized).prompt_tokens == 2
    deltas = rig.one(TextOut).deltas
    assert [(d.position, d.text, d.attempt) for d in deltas] == [(2, "cd", 2)]
    assert not rig.all(Submit)


def test_a_resync_says_the_end_again_for_a_while(rig: Rig) -> None:
    rig.ask(submission(stop=["cd"]))
    rig.spans(span(ids("abcd")))
    rig.handle(PeerDown("frontend-0"))
    rig.pass_time(8.0)
    rig.ask(submission(stop=["cd"], accepted=ids("ab")))
    deltas = rig.one(TextOut).deltas
    assert [(d.position, d.text, d.stop_reason) for d in deltas] == [(2, "", "cd")]
    rig.pass_time(3.0)
    assert rig.machine.statistics()["streams_ended"] == 0


def test_a_higher_attempt_starts_from_what_the_client_has(rig: Rig) -> None:
    rig.ask(submission(stop=["bX"]))
    rig.spans(span(ids("abc")))
    rig.ask(submission(stop=["bX"], accepted=ids("ab"), attempt=1024))
    submit = rig.one(Submit)
    assert (submit.attempt, unpack_tokens(submit.accepted)) == (1024, ids("ab"))
    assert not rig.all(TextOut)
    rig.spans(span(ids("c"), 2))
    assert not rig.sent
    rig.spans(span(ids("X!"), 2, attempt=1024))
    (delta,) = rig.one(TextOut).deltas  # the "b" was still held back
    assert (delta.text, delta.stop_reason) == ("", "bX")


def test_other_tokens_than_ours_start_a_new_attempt(rig: Rig) -> None:
    rig.ask(submission())
    rig.spans(span(ids("abc")))
    rig.ask(submission(accepted=ids("aX")))
    submit = rig.one(Submit)
    assert (submit.attempt, unpack_tokens(submit.accepted)) == (2, ids("aX"))


@pytest.mark.parametrize(
    ("accepted", "reason", "text"),
    [
        (ids("abcde"), FinishReason.LENGTH, ""),
        ([*ids("ab"), EOS], FinishReason.STOP, ""),
        ([*ids("abc"), 0xE4, 0xBD], FinishReason.LENGTH, "\ufffd"),
    ],
)
def test_accepted_tokens_that_are_the_end(
    rig: Rig, accepted: list[int], reason: FinishReason, text: str
) -> None:
    rig.ask(submission(accepted=accepted, attempt=1024, max_tokens=5))
    assert not rig.all(Submit)
    (delta,) = rig.one(TextOut).deltas
    assert (delta.position, delta.tokens, delta.text) == (len(accepted), b"", text)
    assert (delta.finish_reason, delta.attempt) == (reason, 1024)
    assert delta.usage is not None and delta.usage.completion_tokens == len(accepted)
    rig.one(StreamEnded, SCHEDULER)


def test_torn_messages_end_nothing_but_themselves(rig: Rig) -> None:
    rig.ask(submission())
    rig.spans(TokenSpan(request_id="r", attempt=1, position=0, tokens=b"abc"))
    assert not rig.sent
    torn = submission("s")
    rig.ask(
        type(torn)(**{f: getattr(torn, f) for f in torn.__struct_fields__} | {"accepted": b"x"})
    )
    assert failure(rig.one(Failed)).code is ErrorCode.INVALID_VALUE
    rig.spans(span(ids("a")))
    assert rig.text() == "a"


# --- Ends ---


def test_cancel(rig: Rig) -> None:
    rig.ask(submission())
    rig.hear("frontend-1", Cancel(request_id="r"))
    assert not rig.sent  # not its stream
    rig.hear("frontend-0", Cancel(request_id="r"))
    assert rig.sent == [(SCHEDULER, StreamEnded(request_id="r"))]
    rig.spans(span(ids("a")))
    assert not rig.sent
    rig.hear("frontend-0", Cancel(request_id="r"))
    assert not rig.sent


def test_cancel_while_encoding() -> None:
    rig = Rig(encode=False)
    rig.ask(submission())
    rig.hear("frontend-0", Cancel(request_id="r"))
    rig.handle(Encoded("r", (1, 2)))
    assert not rig.sent


def test_streams_of_a_lost_frontend_have_a_grace(rig: Rig) -> None:
    rig.ask(submission())
    rig.ask(submission("s"))
    rig.handle(PeerDown("frontend-0"))
    rig.pass_time(9.0)
    rig.handle(PeerUp("frontend-0", 1))
    rig.ask(submission())
    said = rig.pass_time(2.0)
    assert (SCHEDULER, StreamEnded(request_id="s")) in said
    assert (SCHEDULER, StreamEnded(request_id="r")) not in said
    rig.ask(submission("s"))  # it wants it after all: the old attempt is dead
    assert rig.one(Submit).attempt == 2


def test_a_stream_has_one_frontend(rig: Rig) -> None:
    rig.ask(submission())
    rig.hear("frontend-1", submission(attempt=5))
    assert rig.sent == [("frontend-1", Failed(request_id="r", problem=TAKEN))]
    assert not rig.effects


def seek(asked: Tokenize) -> Seek:
    return Seek(request_id=asked.request_id, digest=digest(asked))


def test_another_frontend_takes_a_stream_over_as_it_was_said(rig: Rig) -> None:
    rig.ask(submission())
    rig.spans(span(ids("ab")))
    rig.spans(span(ids("c"), 2))
    rig.hear("frontend-1", seek(submission()))
    assert rig.sent == [("frontend-1", Sought(request_id="r", attempt=1))]
    rig.hear("frontend-1", submission(attempt=ATTEMPTS_PER_OWNER))
    told, submitted, tokenized, text = rig.sent
    assert told == ("frontend-0", Failed(request_id="r", problem=TAKEN))
    assert isinstance(submitted[1], Submit) and submitted[0] == SCHEDULER
    assert (submitted[1].attempt, submitted[1].repeated, submitted[1].owner) == (1, True, 1)
    assert tokenized == ("frontend-1", Tokenized(request_id="r", prompt_tokens=2))
    assert isinstance(text[1], TextOut)
    said = [(d.position, d.text, d.attempt) for d in text[1].deltas]
    assert said == [(0, "ab", ATTEMPTS_PER_OWNER), (2, "c", ATTEMPTS_PER_OWNER)]
    rig.spans(span(ids("d"), 3, finish=FinishReason.LENGTH))
    to, last = rig.sent[0]
    assert to == "frontend-1" and isinstance(last, TextOut)
    rig.hear("frontend-2", submission(attempt=2 * ATTEMPTS_PER_OWNER, accepted=ids("abc")))
    assert [d.text for d in rig.one(TextOut).deltas] == ["d"]


def test_the_frontend_that_lost_a_stream_has_no_part_in_it(rig: Rig) -> None:
    rig.ask(submission())
    rig.hear("frontend-1", submission(attempt=ATTEMPTS_PER_OWNER))
    rig.hear("frontend-0", submission(attempt=ATTEMPTS_PER_MOVE))
    assert rig.sent == [("frontend-0", Failed(request_id="r", problem=TAKEN))]
    rig.hear("frontend-0", Cancel(request_id="r"))
    assert not rig.sent
    rig.spans(span(ids("a")))
    assert rig.sent[0][0] == "frontend-1"


def test_only_who_asked_for_it_finds_a_stream(rig: Rig) -> None:
    rig.ask(submission())
    for other in (submission(prompt="Ho"), submission(request_id="q")):
        rig.hear("frontend-1", seek(other))
        assert rig.sent == [("frontend-1", Sought(request_id=other.request_id))]
    rig.hear("frontend-0", Cancel(request_id="r"))
    rig.hear("frontend-1", seek(submission()))
    assert ("frontend-1", Sought(request_id="r")) in rig.sent


def test_deadline(rig: Rig) -> None:
    rig.ask(submission(timeout_s=3.0))
    rig.pass_time(2.0)
    rig.hear(SCHEDULER, Resume(request_id="r", attempt=2))
    assert rig.one(Submit).timeout_s == pytest.approx(1.0)
    said = rig.pass_time(1.1)
    assert failure(next(m for to, m in said if to == "frontend-0")).code is ErrorCode.DEADLINE
    assert (SCHEDULER, StreamEnded(request_id="r")) in said


def test_what_was_encoded_too_late_is_not_submitted() -> None:
    rig = Rig(encode=False)
    rig.ask(submission(timeout_s=0.1))
    rig.now_s = 0.2
    rig.handle(Encoded("r", tuple(ids("Hi"))))
    assert failure(rig.one(Failed)).code is ErrorCode.DEADLINE and not rig.all(Submit)


def test_drain(rig: Rig) -> None:
    rig.ask(submission())
    rig.handle(Drain())
    assert rig.one(Hello).node.draining and not rig.effects
    rig.spans(span(ids("a"), finish=FinishReason.LENGTH))
    assert rig.text() == "a" and not rig.effects  # its last words are not gone yet
    exits = []
    for _ in range(8):
        rig.pass_time(0.5)
        exits += rig.effects
        rig.effects = []
    assert exits == [Exit()]


def test_drain_of_an_idle_one(rig: Rig) -> None:
    rig.handle(Drain())
    assert rig.effects == [Exit()]


# --- Codec calls ---


def test_codec_calls() -> None:
    rig = Rig(encode=False, max_codec_calls=1, max_codec_tokens=5)
    rig.hear("frontend-0", Codec(call_id="c", tokens=pack_tokens([*ids("hé"), EOS])))
    assert rig.one(CodecResult, "frontend-0") == CodecResult(call_id="c", text="hé<eos>")
    rig.hear("frontend-0", Codec(call_id="c", tokens=pack_tokens(ids("abcdef"))))
    assert failure(rig.one(CodecResult)).code is ErrorCode.TOO_LARGE
    rig.hear("frontend-0", Codec(call_id="c", tokens=b"abc"))
    assert failure(rig.one(CodecResult)).code is ErrorCode.INVALID_VALUE

    rig.hear("frontend-0", Codec(call_id="c", prompt=TextPrompt(text="é")))
    (encode,) = rig.effects
    assert isinstance(encode, EncodePrompt)
    rig.hear("frontend-1", Codec(call_id="c", prompt=TextPrompt(text="x")))
    assert failure(rig.one(CodecResult, "frontend-1")).code is ErrorCode.QUEUE_FULL
    rig.handle(Encoded(encode.request_id, tuple(ids("é"))))
    result = rig.one(CodecResult, "frontend-0")
    assert (unpack_tokens(result.tokens), result.token_texts) == (ids("é"), ["\ufffd", "\ufffd"])

    rig.hear("frontend-0", Codec(call_id="d", prompt=TextPrompt(text="x")))
    rig.handle(PeerDown("frontend-0"))
    assert rig.machine.statistics()["codec_calls"] == 0
    rig.handle(Encoded("codec:frontend-0:d", (1,)))
    assert not rig.sent


def test_an_empty_step_is_no_message(rig: Rig) -> None:
    rig.hear("decode-0", TokensOut(spans=[]))
    assert not rig.sent
