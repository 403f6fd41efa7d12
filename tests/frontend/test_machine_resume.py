"""The frontend's machine takes a stream over: asks who has it, and fences off who had it."""

from typing import TypeVar

import pytest

from frontend.test_machine import T0, T1, Rig, delta
from slipstream.core.machine import Closed, Deliver, Effect, Opened, PeerDown, Send, Taken
from slipstream.core.submission import TAKEN, digest
from slipstream.errors import ErrorCode, Problem
from slipstream.frontend.seeking import SEEK_S
from slipstream.messages import (
    AnyMessage,
    Cancel,
    Failed,
    Seek,
    Sought,
    TextOut,
    Tokenize,
    Tokenized,
)
from slipstream.types import ATTEMPTS_PER_MOVE, ATTEMPTS_PER_OWNER, NodeId, pack_tokens
from tokenizer.machines import submission

M = TypeVar("M")


@pytest.fixture
def rig() -> Rig:
    return Rig(T0, T1)


def sent(effects: list[Effect]) -> list[tuple[NodeId, AnyMessage]]:
    return [(effect.to, effect.message) for effect in effects if isinstance(effect, Send)]


def asked(rig: Rig, kind: type[M]) -> list[tuple[NodeId, M]]:
    return [(to, message) for to, message in sent(rig.effects) if isinstance(message, kind)]


def test_every_tokenizer_is_asked_and_the_highest_attempt_wins(rig: Rig) -> None:
    rig.handle(Opened(submission(), taken=Taken(1, True, pack_tokens([1, 2]), True)))
    seek = Seek(request_id="r", digest=digest(submission()))
    assert sorted(sent(rig.effects)) == [(T0, seek), (T1, seek)]
    rig.hear(T1, Sought(request_id="r", attempt=ATTEMPTS_PER_MOVE))
    assert not rig.effects
    rig.hear(T0, Sought(request_id="r", attempt=3))
    ((to, message),) = asked(rig, Tokenize)
    assert (to, message.attempt, message.accepted) == (T1, ATTEMPTS_PER_OWNER, pack_tokens([1, 2]))
    rig.hear(T1, TextOut(deltas=[delta([3], 2, attempt=ATTEMPTS_PER_MOVE)]))
    assert not rig.effects, "that is the lost frontend's"
    rig.hear(T1, TextOut(deltas=[delta([3], 2, attempt=ATTEMPTS_PER_OWNER)]))
    assert len(rig.effects) == 1 and isinstance(rig.effects[0], Deliver)
    rig.handle(PeerDown(T1))
    ((to, message),) = asked(rig, Tokenize)
    assert (to, message.attempt) == (T0, ATTEMPTS_PER_OWNER + ATTEMPTS_PER_MOVE)


@pytest.mark.parametrize("how", ["silent", "lost", "no"])
def test_with_a_journal_it_goes_on_though_nobody_has_it(rig: Rig, how: str) -> None:
    rig.handle(Opened(submission(), taken=Taken(3, True, pack_tokens([1]), True)))
    rig.hear(T0, Sought(request_id="r"))
    assert not rig.effects
    said = list[Effect]()
    if how == "silent":
        said = rig.pass_time(SEEK_S + 1.0)
    elif how == "lost":
        rig.handle(PeerDown(T1))
    else:
        rig.hear(T1, Sought(request_id="r"))
    ((_, message),) = sent(said or rig.effects)
    assert isinstance(message, Tokenize)
    assert (message.attempt, message.accepted) == (3 * ATTEMPTS_PER_OWNER, pack_tokens([1]))


def test_without_a_journal_it_is_not_found(rig: Rig) -> None:
    rig.handle(Opened(submission(), taken=Taken(1)))
    rig.hear(T0, Sought(request_id="r"))
    rig.hear(T1, Sought(request_id="r"))
    (told,) = rig.effects
    assert isinstance(told, Deliver) and isinstance(told.item, Problem)
    assert told.item.code is ErrorCode.STREAM_NOT_FOUND and not asked(rig, Tokenize)


def test_without_a_journal_all_of_it_is_told_again(rig: Rig) -> None:
    rig.handle(Opened(submission(), taken=Taken(1)))
    rig.hear(T0, Sought(request_id="r", attempt=2 * ATTEMPTS_PER_OWNER + 7))
    rig.hear(T1, Sought(request_id="r"))
    ((to, message),) = asked(rig, Tokenize)
    assert to == T0
    assert (message.attempt, message.accepted) == (3 * ATTEMPTS_PER_OWNER, b"")
    rig.hear(T0, Tokenized(request_id="r", prompt_tokens=2))
    rig.hear(T0, TextOut(deltas=[delta([1, 2], 0, attempt=3 * ATTEMPTS_PER_OWNER)]))
    assert len(rig.effects) == 1


def test_who_lost_it_says_so_and_lets_go(rig: Rig) -> None:
    rig.handle(Opened(submission()))
    ((to, _),) = asked(rig, Tokenize)
    rig.hear(to, Failed(request_id="r", problem=TAKEN))
    assert rig.effects == [Deliver("r", TAKEN)]
    rig.handle(Closed("r"))
    assert not asked(rig, Cancel)


def test_a_client_comes_back_before_its_connection_was_seen_to_break(rig: Rig) -> None:
    rig.handle(Opened(submission()))
    ((had, _),) = asked(rig, Tokenize)
    rig.handle(Opened(submission(), taken=Taken(1, True)))
    assert len(asked(rig, Seek)) == 2
    rig.hear(T0, Sought(request_id="r", attempt=int(had == T0)))
    rig.hear(T1, Sought(request_id="r", attempt=int(had == T1)))
    ((to, message),) = asked(rig, Tokenize)
    assert (to, message.attempt) == (had, ATTEMPTS_PER_OWNER)
