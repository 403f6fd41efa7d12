"""The process in which grammars are compiled: `python -m slipstream.tokenizer.grammar_fork`.

Reads one question a line and answers one a line, in any order, until its input ends. It has one
thread and loads the model's tokens once; each question is a fork of a fork, the inner one compiles
and may die, the outer one says how it went. It compiles on a thread, whose stack is smaller than
those of the workers wherever it runs.
"""

import contextlib
import os
import resource
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import msgspec
from llguidance import LLMatcher, LLTokenizer

from slipstream.grammar import CHECKER_STACK_BYTES, GrammarError, limits, stack_of, tokenizer
from slipstream.tokenizer.grammar_check import READY, Question, Reply

CPU_S = 1.0
WALL_S = 1.7
"""What compiling may take, of a core and by the clock."""
MEMORY_BYTES = 1 << 29
"""More than the process had before."""
REASON_CHARS_MAX = 500
"""An answer's line is written at once, so that those of two forks do not mix."""

BLAMED_S = 0.25
"""Who has had so much of a core when the clock ends it is slow; else the machine is."""


def main(arguments: list[str]) -> None:
    model, vocab_size, eos_token_ids = arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end of its input is the end
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the outer forks
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ids = [int(number) for number in eos_token_ids.split(",") if number]
    tokens, unusable = None, ""
    try:
        tokens = tokenizer(Path(model), int(vocab_size), ids)
    except GrammarError as error:
        print(f"answers cannot be held to a grammar: {error}", file=sys.stderr, flush=True)
        unusable = "this model cannot be held to any grammar; the server's log says why"
    _say(0, READY)
    for line in sys.stdin.buffer:
        question = msgspec.json.decode(line, type=Question)
        if tokens is None:
            _say(question.number, Reply(0, unusable))
            continue
        try:
            if os.fork() == 0:
                _answer(question, tokens)
        except OSError as error:
            _say(question.number, _unstarted(error))


def _answer(question: Question, tokens: LLTokenizer) -> NoReturn:
    """The outer fork's part, which says something whatever happens."""
    reply: Reply | None = Reply(0, "whoever compiles it has failed", late=True, passing=True)
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        compiling = os.fork()
        if compiling == 0:
            _compile(question, tokens)
        _, status, usage = os.wait4(compiling, 0)
        reply = _death(os.WTERMSIG(status), usage.ru_utime + usage.ru_stime) if status else None
    except OSError as error:
        reply = _unstarted(error)
    finally:
        if reply is not None:
            _say(question.number, reply)
        os._exit(0)


def _compile(question: Question, tokens: LLTokenizer) -> NoReturn:
    """The inner fork's."""
    try:
        with stack_of(CHECKER_STACK_BYTES), ThreadPoolExecutor(1) as thread:
            _say(question.number, thread.submit(_compiled, question.grammar, tokens).result())
        os._exit(0)
    finally:
        os._exit(1)


def _unstarted(error: OSError) -> Reply:
    return Reply(0, f"no process can be started ({error.strerror})", late=True, passing=True)


def _death(cause: int, cpu_s: float) -> Reply:
    match cause:
        case signal.SIGPROF:
            return Reply(0, f"compiling it takes more than {CPU_S:g} s of a core")
        case signal.SIGALRM:
            spent = f"{cpu_s:.1f} s of a core in {WALL_S:g} s were not enough to compile it"
            return Reply(0, spent, late=cpu_s < BLAMED_S, passing=True)
    return Reply(0, "it breaks the compiler, or needs too much memory")


def _compiled(grammar: str, tokens: LLTokenizer) -> Reply:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the library's last words are for nobody
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    signal.setitimer(signal.ITIMER_REAL, WALL_S)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    matcher = LLMatcher(tokens, grammar, log_level=0, limits=limits())
    if matcher.is_error():
        return Reply(0, matcher.get_error())
    matcher.compute_bitmask()  # the first step may be too much as well
    if matcher.is_error() or (matcher.is_stopped() and not matcher.is_accepting()):
        return Reply(0, "no text follows it, or too many do")
    return Reply(0)


def _say(number: int, reply: Reply) -> None:
    said = Reply(number, reply.refused[:REASON_CHARS_MAX], reply.late, reply.passing)
    with contextlib.suppress(BrokenPipeError):  # nobody asks any more
        os.write(1, msgspec.json.encode(said) + b"\n")


if __name__ == "__main__":
    main(sys.argv[1:])
