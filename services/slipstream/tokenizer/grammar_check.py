"""Compiles grammars where it does no harm: in a process of its own, for so long and no longer.

Compiling a schema of 800 bytes can take half a minute, and the library cannot be stopped. So
`slipstream.tokenizer.grammar_fork` forks for each grammar, and the fork has timers that kill it.
"""

import contextlib
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple, TypeAlias

import msgspec

WAITING_MAX = 16
"""Grammars at a time, however many ask for the same one."""
KEPT_MAX = 512
KEPT_CHARS_MAX = 16 << 20
"""Grammars whose verdict is remembered, and their length together."""


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


class _Waiting(NamedTuple):
    process: subprocess.Popen[bytes]
    grammar: str
    told: list[Told]


class GrammarCheck:
    """Any thread. The process begins with `start` and, when it has died, with the next question."""

    def __init__(self, model: Path, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        ids = ",".join(map(str, sorted(eos_token_ids)))
        self._command = [
            *(sys.executable, "-P", "-m", "slipstream.tokenizer.grammar_fork"),
            *(str(model), str(vocab_size), ids),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._waiting: dict[int, _Waiting] = {}
        self._numbers: dict[str, int] = {}
        """Of the grammars that wait."""
        self._count = self._refused = self._late = 0
        self._kept: OrderedDict[str, Verdict] = OrderedDict()
        self._chars = 0

    def start(self) -> None:
        with self._lock:
            self._running()

    def ask(self, grammar: str, told: Told) -> None:
        """`told` is called once, at once or from another thread."""
        known = self._ask(grammar, told)
        if known is not None:
            told(known)

    def statistics(self) -> dict[str, float]:
        """Any thread."""
        with self._lock:
            return {
                "grammars_compiling": len(self._waiting),
                "grammars_total": self._count,
                "grammars_refused_total": self._refused,
                "grammars_late_total": self._late,
            }

    def close(self) -> None:
        """Nobody is told anything any more."""
        with self._lock:
            self._waiting.clear()
            self._numbers.clear()
            process, self._process = self._process, None
        if process is not None:
            process.kill()  # its forks die by their timers
            process.wait()

    def _ask(self, grammar: str, told: Told) -> Verdict | None:
        with self._lock:
            if (kept := self._kept.get(grammar)) is not None:
                self._kept.move_to_end(grammar)
                return kept
            if (number := self._numbers.get(grammar)) is not None:
                self._waiting[number].told.append(told)
                return None
            if len(self._waiting) >= WAITING_MAX:
                self._late += 1
                return Verdict(f"{WAITING_MAX} others are being compiled", late=True, passing=True)
            process = self._running()
            assert process.stdin is not None
            self._count += 1
            self._waiting[self._count] = _Waiting(process, grammar, [told])
            self._numbers[grammar] = self._count
            with contextlib.suppress(OSError):  # it has died, which its reader finds and tells
                process.stdin.write(msgspec.json.encode(Question(self._count, grammar)) + b"\n")
                process.stdin.flush()
        return None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            reader = threading.Thread(
                target=self._read, args=(self._process,), daemon=True, name="grammars"
            )
            reader.start()
        return self._process

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            reply = msgspec.json.decode(line, type=Reply)
            self._tell(reply.number, Verdict(reply.refused, reply.late, reply.passing))
        process.wait()
        died = Verdict("the process that compiles it has died", late=True, passing=True)
        with self._lock:
            asked = [n for n, waiting in self._waiting.items() if waiting.process is process]
        for number in asked:
            self._tell(number, died)

    def _tell(self, number: int, verdict: Verdict) -> None:
        with self._lock:
            waiting = self._waiting.pop(number, None)
            if waiting is not None:
                del self._numbers[waiting.grammar]
            self._refused += bool(verdict.refused) and not verdict.late
            self._late += verdict.late
            if waiting is not None and not verdict.passing:
                self._keep(waiting.grammar, verdict)
        for told in waiting.told if waiting else ():
            told(verdict)

    def _keep(self, grammar: str, verdict: Verdict) -> None:
        if grammar not in self._kept:
            self._chars += len(grammar)
        self._kept[grammar] = verdict
        while len(self._kept) > KEPT_MAX or self._chars > KEPT_CHARS_MAX:
            oldest, _ = self._kept.popitem(last=False)
            self._chars -= len(oldest)
