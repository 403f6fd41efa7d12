"""Whatever a session does, each READ and each question ends exactly once."""

import queue
import time
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv.conftest import header
from slipstream.kv.read_thread import Command, Commands, ReadThread
from slipstream.kv.transport import Digests, Read, TransferError
from slipstream.messages import NodeInfo
from slipstream.types import Role

WAIT_S = 20.0
PEER = NodeInfo(node_id="p", role=Role.PREFILL, epoch=header().epoch, address="")
INTO = np.zeros((1, 1), np.uint8)
Results = list[Digests | TransferError]


class Scripted:
    """Does with each READ what is written on it as its block; knows what it was not to do."""

    def __init__(self, script: "Script"):
        script.makings += 1
        if script.makings in script.makings_that_fail:
            raise RuntimeError("cannot be made")
        self.script, self.held, self.ended = script, list[Read](), False

    def begin(self, read: Read) -> None:
        assert not self.ended
        match self.script.actions[read.source_blocks[0]]:
            case "serve":
                read.done((b"x",))
            case "twice":
                read.done((b"x",))
                read.done(TransferError("timeout"))
            case "refuse":
                read.done(TransferError("range"))
            case "hold":
                self.held.append(read)
            case "serve held":
                self.held.append(read)
                while self.held:
                    self.held.pop().done((b"y",))
            case "break":
                raise RuntimeError("broken in begin")
            case "serve, then break":
                read.done((b"x",))
                raise RuntimeError("broken after its end")
            case "break later":
                self.held.append(read)
                self.script.breaks_in_wait = True

    def ask(self, action: str) -> None:
        if action == "break":
            raise RuntimeError("broken by a question")
        if action == "refuse":
            raise TransferError("attach")

    def wait(self, commands: Commands) -> Command | None:
        assert not self.ended
        if self.script.breaks_in_wait:
            self.script.breaks_in_wait = False
            raise RuntimeError("broken in wait")
        try:
            return commands.get(timeout=0.001)
        except queue.Empty:
            return None

    def end(self) -> None:
        self.ended = True
        self.script.ends += 1
        if self.script.ends in self.script.ends_that_fail:
            raise RuntimeError("does not end")


class Script:
    def __init__(self, actions: list[str], makings: set[int], ends: set[int]):
        self.actions, self.makings_that_fail, self.ends_that_fail = actions, makings, ends
        self.makings = self.ends = 0
        self.breaks_in_wait = False


ACTIONS = (
    *("serve", "twice", "refuse", "hold", "serve held"),
    *("break", "serve, then break", "break later", "listener breaks"),
)


@settings(max_examples=150, deadline=None)
@given(
    actions=st.lists(st.sampled_from(ACTIONS), max_size=12),
    questions=st.lists(st.sampled_from(["", "break", "refuse"]), max_size=4),
    makings=st.sets(st.integers(2, 6), max_size=3),
    ends=st.sets(st.integers(1, 5), max_size=1),
    close_early=st.booleans(),
)
def test_each_read_ends_exactly_once(
    actions: list[str],
    questions: list[str],
    makings: set[int],
    ends: set[int],
    close_early: bool,
) -> None:
    script = Script(actions, makings, ends)
    thread = ReadThread("x", lambda: Scripted(script))
    results: list[Results] = [[] for _ in actions]
    asked: list[Future[None]] = []
    for number, action in enumerate(actions):
        thread.read(read_of(number, listener(results[number], action)))
        if number < len(questions):
            asked.append(thread.ask(lambda session, what=questions[number]: session.ask(what)))
    if not close_early:
        for future in asked:
            future.exception(WAIT_S)
    thread.close()
    thread.close()
    assert [len(result) for result in results] == [1] * len(actions)
    assert all(future.done() for future in asked)
    for future in asked:
        assert future.exception() is None or isinstance(future.exception(), TransferError)
    for action, (result,) in zip(actions, results, strict=True):
        if isinstance(result, TransferError):
            assert result.cause in ("internal", "closed", "range"), action
    late: Results = []
    thread.read(read_of(0, late.append))
    assert len(late) == 1 and isinstance(thread.ask(lambda _: None).exception(), TransferError)


def read_of(number: int, done: Callable[[Digests | TransferError], None]) -> Read:
    return Read(PEER, [number], INTO, [0], time.monotonic() + WAIT_S, done)


def listener(results: Results, action: str) -> Callable[[Digests | TransferError], None]:
    def listen(result: Digests | TransferError) -> None:
        results.append(result)
        if action == "listener breaks":
            raise RuntimeError("nobody listens any more")

    return listen


def test_what_one_session_breaks_the_next_one_serves(caplog: pytest.LogCaptureFixture) -> None:
    script = Script(["hold", "break", "serve"], set(), set())
    thread = ReadThread("x", lambda: Scripted(script))
    results: queue.SimpleQueue[tuple[int, Digests | TransferError]] = queue.SimpleQueue()
    for number in range(3):
        thread.read(read_of(number, lambda result, number=number: results.put((number, result))))
    found = dict(results.get(timeout=WAIT_S) for _ in range(3))
    assert [str(found[number]) for number in range(2)] == [
        "internal: RuntimeError: broken in begin"
    ] * 2
    assert found[2] == (b"x",) and (script.makings, script.ends) == (2, 1)
    assert len([record for record in caplog.records if record.exc_info]) == 1
    thread.close()
    assert script.ends == 2


def test_a_session_that_does_not_end_is_the_last_one() -> None:
    """Somebody may still write into its memory."""
    script = Script(["break", "serve"], set(), {1})
    thread = ReadThread("x", lambda: Scripted(script))
    results: queue.SimpleQueue[Digests | TransferError] = queue.SimpleQueue()
    for number in range(2):
        thread.read(read_of(number, results.put))
    for _ in range(2):
        ended = results.get(timeout=WAIT_S)
        assert isinstance(ended, TransferError) and ended.cause == "internal"
    assert isinstance(thread.ask(lambda _: None).exception(WAIT_S), TransferError)
    thread.close()
    assert script.makings == 1


def test_a_session_that_cannot_be_made_at_first_is_told_to_who_wants_it() -> None:
    with pytest.raises(RuntimeError, match="cannot be made"):
        ReadThread("x", lambda: Scripted(Script([], {1}, set())))
