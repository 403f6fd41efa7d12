"""Compiles grammars where it does no harm: in a process of its own, for so long and no longer.

Compiling a schema of 800 bytes can take half a minute, and the library cannot be stopped. So
`slipstream.tokenizer.grammar_fork` forks for each grammar, and the fork has timers that kill it.
"""

import asyncio
import contextlib
import logging
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple, TypeAlias, cast

import msgspec

WAITING_MAX = 512
WAITING_CHARS_MAX = 64 << 20
"""Grammars at a time, however many ask for the same one, and their length together."""
FORKS_MAX = 4
"""Of those, how many are compiled; the others wait for their turn."""
TURN_S = 10.0
"""How long that may take."""
ANSWER_S = 5.0
"""A fork has timers and answers in less than half of that, unless it is lost."""
START_S = 60.0
"""Until the process has read the model's tokens."""
RESTART_S = 1.0
KEPT_MAX = 512
KEPT_CHARS_MAX = 16 << 20
"""Grammars whose verdict is remembered, and their length together."""

_log = logging.getLogger(__name__)


class Verdict(NamedTuple):
    refused: str = ""
    """Why it cannot be used; empty: it can."""
    late: bool = False
    """There was no time to find out."""
    passing: bool = False
    """Another time it may be otherwise."""


Told: TypeAlias = Callable[[Verdict], None]


class Question(msgspec.Struct, array_like=True):
    number: int
    grammar: str


class Reply(msgspec.Struct, array_like=True):
    number: int
    refused: str = ""
    late: bool = False
    passing: bool = False


READY = Reply(0)
"""The first one: the model's tokens are read."""


class _Process(asyncio.SubprocessProtocol):
    def __init__(self, heard: Callable[[Reply], None]) -> None:
        self.exited = asyncio.Event()
        self._heard = heard
        self._rest = b""

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._heard(msgspec.json.decode(line, type=Reply))

    def process_exited(self) -> None:
        self.exited.set()


class _Waiting:
    def __init__(self, grammar: str, deadline: asyncio.TimerHandle) -> None:
        self.grammar = grammar
        self.told: list[Told] = []
        self.deadline = deadline


class GrammarCheck:
    """Of one event loop, and never waits on it. The process begins with `start` and, when it has
    died, with the next question."""

    def __init__(self, model: Path, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        ids = ",".join(map(str, sorted(eos_token_ids)))
        self._command = [
            *(sys.executable, "-P", "-m", "slipstream.tokenizer.grammar_fork"),
            *(str(model), str(vocab_size), ids),
        ]
        self._process: asyncio.SubprocessTransport | None = None
        """Once it has read the model's tokens."""
        self._wanted = asyncio.Event()
        self._waiting: dict[str, _Waiting] = {}
        """By their grammars; those in `_turns` and those in `_asked`."""
        self._turns: deque[_Waiting] = deque()
        self._asked: dict[int, _Waiting] = {}
        self._count = self._refused = self._late = 0
        self._kept: OrderedDict[str, Verdict] = OrderedDict()
        self._chars = self._waiting_chars = 0

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._wanted.set()
        self._serving = asyncio.create_task(self._serve(), name="grammars")

    def ask(self, grammar: str, told: Told) -> None:
        """Any thread. `told` is called once, on the event loop."""
        self._loop.call_soon_threadsafe(self._ask, grammar, told)

    def statistics(self) -> dict[str, float]:
        return {
            "grammars_compiling": len(self._waiting),
            "grammars_total": self._count,
            "grammars_refused_total": self._refused,
            "grammars_late_total": self._late,
        }

    async def close(self) -> None:
        """Nobody is told anything any more."""
        self._serving.cancel()
        await asyncio.wait([self._serving])
        for waiting in self._waiting.values():
            waiting.deadline.cancel()
        self._waiting.clear()
        self._turns.clear()
        self._asked.clear()

    def _ask(self, grammar: str, told: Told) -> None:
        if (kept := self._kept.get(grammar)) is not None:
            self._kept.move_to_end(grammar)
            told(kept)
            return
        waiting = self._waiting.get(grammar)
        if waiting is None:
            chars = self._waiting_chars + len(grammar)
            if len(self._waiting) >= WAITING_MAX or chars > WAITING_CHARS_MAX:
                self._late += 1
                told(Verdict(f"{len(self._waiting)} others wait for it", late=True, passing=True))
                return
            busy = Verdict("too many others were before it", late=True, passing=True)
            deadline = self._loop.call_later(TURN_S, self._tell, grammar, busy)
            self._waiting[grammar] = waiting = _Waiting(grammar, deadline)
            self._waiting_chars = chars
            self._turns.append(waiting)
            self._wanted.set()
        waiting.told.append(told)
        self._take_turns()

    def _take_turns(self) -> None:
        """Writing does not wait: what the process does not read stays in memory, a few grammars."""
        while self._turns and self._process is not None and len(self._asked) < FORKS_MAX:
            pipe = cast(asyncio.WriteTransport, self._process.get_pipe_transport(0))
            waiting = self._turns.popleft()
            self._count += 1
            self._asked[self._count] = waiting
            waiting.deadline.cancel()
            lost = Verdict("whoever compiles it does not answer", late=True, passing=True)
            waiting.deadline = self._loop.call_later(ANSWER_S, self._answered, self._count, lost)
            question = msgspec.json.encode(Question(self._count, waiting.grammar))
            pipe.write(question + b"\n")

    def _answered(self, number: int, verdict: Verdict) -> None:
        waiting = self._asked.pop(number, None)
        if waiting is not None:
            self._tell(waiting.grammar, verdict)
            self._take_turns()

    def _tell(self, grammar: str, verdict: Verdict) -> None:
        waiting = self._waiting.pop(grammar)
        waiting.deadline.cancel()
        self._waiting_chars -= len(grammar)
        with contextlib.suppress(ValueError):  # its turn has come
            self._turns.remove(waiting)
        self._refused += bool(verdict.refused) and not verdict.late
        self._late += verdict.late
        if not verdict.passing:
            self._keep(grammar, verdict)
        for told in waiting.told:
            told(verdict)

    # --- The process ---

    async def _serve(self) -> None:
        """One process after the other, for as long as there are questions."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            began = False
            try:
                began = await self._run()
            except OSError as error:
                _log.warning("no process to compile grammars can be started: %s", error)
            died = Verdict("the process that compiles it has died", late=True, passing=True)
            for number in list(self._asked):
                self._answered(number, died)
            if not began:  # those who wait have their deadlines
                await asyncio.sleep(RESTART_S)
            if self._turns:
                self._wanted.set()

    async def _run(self) -> bool:
        """One process to its end; whether it had begun. OSError."""

        def heard(reply: Reply) -> None:
            if reply == READY:
                self._process = transport
                starting.cancel()
                self._take_turns()
            else:
                verdict = Verdict(reply.refused, reply.late, reply.passing)
                self._answered(reply.number, verdict)

        transport, process = await self._loop.subprocess_exec(
            lambda: _Process(heard), *self._command, stderr=None
        )
        starting = self._loop.call_later(START_S, transport.kill)
        try:
            await process.exited.wait()
            return self._process is not None
        finally:
            starting.cancel()
            self._process = None
            transport.close()  # kills it; its forks die by their timers
            await process.exited.wait()

    def _keep(self, grammar: str, verdict: Verdict) -> None:
        if grammar not in self._kept:
            self._chars += len(grammar)
        self._kept[grammar] = verdict
        while len(self._kept) > KEPT_MAX or self._chars > KEPT_CHARS_MAX:
            oldest, _ = self._kept.popitem(last=False)
            self._chars -= len(oldest)
