"""Answers told apart as they stream: parts for tokens, the end, and saying all of it again."""

from collections.abc import Sequence

import msgspec
import pytest

from slipstream.core.machine import Encoded, EncodePrompt, PeerUp
from slipstream.errors import ErrorCode, Problem
from slipstream.messages import (
    SCHEDULER,
    Failed,
    Part,
    PartKind,
    Resume,
    Submit,
    TextOut,
    Tokenize,
)
from slipstream.tokenizer.formats.parser import merged
from slipstream.types import Constraint, ConstraintKind, FinishReason, count_tokens
from tokenizer.machines import EOS, VOCAB_SIZE, Rig, ids, span, submission

CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
ANSWER = f"<think>hm</think>Well. {CALL}"
PARTS = [
    Part(PartKind.REASONING, "hm"),
    Part(PartKind.CONTENT, "Well."),
    Part(PartKind.CALL, "f"),
    Part(PartKind.ARGUMENTS, '{"a": 1}'),
]
YES = Constraint(kind=ConstraintKind.CHOICE, text='["yes"]')
FOUND = Encoded("r", tuple(ids("Hi")), None, "start: /x/", ((1, 2), (3,)), "thinks hermes")


def asked(rig: Rig, *, accepted: Sequence[int] = (), **sampling: object) -> Tokenize:
    """A chat whose prompt is encoded as `FOUND`."""
    message = msgspec.structs.replace(
        submission(accepted=accepted, **sampling), constraint=YES, bad_words=("no",), parse=True
    )
    rig.ask(message)
    return message


@pytest.fixture
def rig() -> Rig:
    return Rig(encode=False)


def heard(rig: Rig) -> list[Part]:
    deltas = [delta for out in rig.all(TextOut) for delta in out.deltas]
    assert not any(delta.text for delta in deltas)
    return merged(part for delta in deltas for part in delta.parts)


def test_the_thread_is_asked_and_the_workers_are_told(rig: Rig) -> None:
    message = asked(rig)
    assert rig.effects == [EncodePrompt("r", message.prompt, YES, ("no",), True, 100.0)]
    rig.handle(FOUND)
    sampling = rig.one(Submit, SCHEDULER).sampling
    assert (sampling.grammar, sampling.bad_tokens) == ("start: /x/", ((1, 2), (3,)))
    rig.handle(PeerUp(SCHEDULER, 2))
    assert rig.one(Submit).sampling == sampling
    rig.hear(SCHEDULER, Resume(request_id="r", attempt=2))
    assert rig.one(Submit).sampling == sampling


def test_parts_come_as_they_are_certain(rig: Rig) -> None:
    asked(rig)
    rig.handle(FOUND)
    rig.spans(span(ids("<think>h")))
    assert heard(rig) == [Part(PartKind.REASONING, "h")]
    rig.spans(span(ids("m</think>Well. <tool"), 8))
    assert heard(rig) == [Part(PartKind.REASONING, "m"), Part(PartKind.CONTENT, "Well.")]
    rig.spans(span(ids('_call>{"name": "f", "arguments": {"a'), 28))
    assert heard(rig) == [Part(PartKind.CALL, "f"), Part(PartKind.ARGUMENTS, '{"a')]
    rig.spans(span([*ids('": 1}'), EOS], 64, finish=FinishReason.STOP, stop_token=EOS))
    assert heard(rig) == [Part(PartKind.ARGUMENTS, '": 1}')]


def test_what_was_held_back_is_told_at_the_end(rig: Rig) -> None:
    asked(rig, max_tokens=9)
    rig.handle(FOUND)
    rig.spans(span(ids("Hm. <tool"), finish=FinishReason.LENGTH))
    assert heard(rig) == [Part(PartKind.CONTENT, "Hm. <tool")]


def test_a_stop_string_cuts_before_anything_is_told_apart(rig: Rig) -> None:
    asked(rig, stop=["</tool_call>"])
    rig.handle(FOUND)
    rig.spans(span(ids(ANSWER)))
    assert heard(rig) == PARTS
    (delta,) = rig.one(TextOut).deltas
    assert (delta.stop_reason, delta.finish_reason) == ("</tool_call>", FinishReason.STOP)


@pytest.mark.parametrize("known", range(0, len(ANSWER) + 1, 5))
def test_it_is_said_again_as_it_was_said(rig: Rig, known: int) -> None:
    message = asked(rig)
    rig.handle(FOUND)
    first: list[Part] = []
    for position, token in enumerate(ids(ANSWER)):
        rig.spans(span([token], position))
        first += [part for out in rig.all(TextOut) for delta in out.deltas for part in delta.parts]
    rig.spans(span([EOS], len(ANSWER), finish=FinishReason.STOP, stop_token=EOS))
    first += [part for out in rig.all(TextOut) for delta in out.deltas for part in delta.parts]
    assert merged(first) == PARTS
    rig.ask(msgspec.structs.replace(message, accepted=b""))
    deltas = rig.one(TextOut).deltas
    assert [count_tokens(delta.tokens) for delta in deltas] == [1] * (len(ANSWER) + 1)
    told = [part for delta in deltas for part in delta.parts]
    assert merged(told) == PARTS
    # Another tokenizer that begins in the middle goes on exactly there.
    other = Rig(encode=False)
    asked(other, accepted=ids(ANSWER)[:known])
    other.handle(FOUND)
    other.spans(span([*ids(ANSWER)[known:], EOS], known, finish=FinishReason.STOP, stop_token=EOS))
    before = [part for delta in deltas[:known] for part in delta.parts]
    assert merged([*before, *heard(other)]) == PARTS


def test_a_grammars_end_is_the_answers(rig: Rig) -> None:
    """As in the workers, whatever the client says of the end of sequence."""
    for known in ((), [*ids("x"), EOS]):
        rig = Rig(encode=False)
        asked(rig, accepted=known, ignore_eos=True, min_tokens=9, skip_special_tokens=False)
        rig.handle(FOUND)
        if not known:
            rig.spans(span([*ids("x"), EOS]))
            rig.spans(span([], 2, finish=FinishReason.STOP, stop_token=EOS))
        (delta,) = rig.one(TextOut).deltas
        assert delta.finish_reason is FinishReason.STOP
        assert delta.usage is not None and delta.usage.completion_tokens == 2
    assert not any("eos" in part.text for part in delta.parts)


def test_a_new_attempt_keeps_what_became_of_the_prompt(rig: Rig) -> None:
    message = asked(rig)
    rig.handle(FOUND)
    rig.spans(span(ids("<think>h")))
    rig.ask(msgspec.structs.replace(message, attempt=1024))
    assert not rig.effects
    submit = rig.one(Submit, SCHEDULER)
    assert (submit.attempt, submit.accepted, submit.sampling.grammar) == (1024, b"", "start: /x/")
    assert submit.sampling.bad_tokens == FOUND.bad_tokens
    rig.spans(span(ids(ANSWER), attempt=1024))
    assert heard(rig) == PARTS


@pytest.mark.parametrize("known", [0, 5])
def test_a_moved_stream_is_not_refused_for_want_of_a_place(known: int) -> None:
    """Another tokenizer has compiled its grammar before the tokens came that it has."""
    rig = Rig(encode=False)
    asked(rig, accepted=ids(ANSWER)[:known])
    full = Problem(code=ErrorCode.QUEUE_FULL, message="Others wait.", retry_after_s=1.0)
    rig.handle(msgspec.structs.replace(FOUND, problem=full))
    if known:
        assert rig.one(Submit, SCHEDULER).sampling.grammar == FOUND.grammar
    else:
        assert rig.one(Failed).problem == full


def test_markers_that_are_special_tokens_reach_the_parser(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = VOCAB_SIZE
    codec = rig.machine._codec
    plain = codec.token_bytes
    monkeypatch.setattr(type(codec), "special_ids", frozenset({EOS, mark}))
    monkeypatch.setattr(
        type(codec), "token_bytes", lambda self, t: b"[TOOL_CALLS]" if t == mark else plain(t)
    )
    call = [mark, *ids('[{"name": "f", "arguments": {}}]')]
    for request_id, answer_format in (("r", "mistral"), ("r2", "hermes")):
        message = msgspec.structs.replace(submission(request_id), parse=True)
        rig.ask(message)
        rig.handle(Encoded(request_id, tuple(ids("Hi")), answer_format=answer_format))
        rig.spans(span([EOS, *call], request_id=request_id))
        if answer_format == "mistral":
            assert heard(rig) == [Part(PartKind.CALL, "f"), Part(PartKind.ARGUMENTS, "{}")]
        else:
            assert heard(rig) == [Part(PartKind.CONTENT, '[{"name": "f", "arguments": {}}]')]


def test_no_answer_is_more_than_a_message_can_carry(rig: Rig) -> None:
    """A pair of escapes that Python takes for two signs ended the process, and the next one's."""
    rig.ask(msgspec.structs.replace(submission(), parse=True))
    rig.handle(Encoded("r", tuple(ids("Hi")), answer_format="pythonic"))
    told: list[Part] = []
    for position, token in enumerate(ids(r'[f(a="\ud83d\ude00", b="\ud83d")]')):
        rig.spans(span([token], position))
        told += heard(rig)
    assert merged(told) == [
        Part(PartKind.CALL, "f"),
        Part(PartKind.ARGUMENTS, '{"a": "😀", "b": "\ufffd"}'),
    ]


def test_without_a_format_all_is_content(rig: Rig) -> None:
    rig.ask(msgspec.structs.replace(submission(), parse=True))
    rig.handle(Encoded("r", tuple(ids("Hi"))))
    rig.spans(span(ids(ANSWER)))
    assert heard(rig) == [Part(PartKind.CONTENT, ANSWER)]
