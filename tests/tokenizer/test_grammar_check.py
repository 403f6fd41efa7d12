"""The process in which grammars are compiled: its turns and deadlines, and whoever dies."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvloop

from slipstream.tokenizer import grammar_check
from slipstream.tokenizer.grammar_check import GrammarCheck, Verdict

EASY = "start: /a/"
BAD = "start: other"
SLOW = '{"grammars":[{"json_schema":{"type":"integer","multipleOf":149993}}]}'
"""More than a second of a core."""


@pytest.fixture
async def checker(byte_level_folder: Path) -> AsyncIterator[GrammarCheck]:
    made = GrammarCheck(byte_level_folder, 421, [0])
    await made.start()
    yield made
    await made.close()


async def verdict(checker: GrammarCheck, grammar: str, timeout_s: float = 20.0) -> Verdict:
    told: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
    checker.ask(grammar, told.set_result)
    return await asyncio.wait_for(told, timeout_s)


async def _compiling(checker: GrammarCheck) -> int:
    """The id of the fork that watches whoever compiles."""
    for _ in range(2000):
        if checker._process is not None and (found := _children(checker._process.get_pid())):
            return found[0]
        await asyncio.sleep(0.005)
    raise AssertionError("nobody compiles")


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def test_verdicts_are_kept_and_the_process_is_started_again(checker: GrammarCheck) -> None:
    first = await verdict(checker, BAD)
    assert "unknown name" in first.refused
    process = checker._process
    assert process is not None
    process.kill()
    for _ in range(2000):
        if checker._process is process:
            await asyncio.sleep(0.005)
    assert await verdict(checker, BAD) == first
    assert await verdict(checker, EASY) == Verdict()
    assert checker._process is not process
    counted = {"grammars_compiling": 0, "grammars_total": 2}
    later = {"grammars_refused_total": 1, "grammars_late_total": 0}
    assert checker.statistics() == counted | later


async def test_one_that_dies_while_it_compiles_tells_so(checker: GrammarCheck) -> None:
    assert await verdict(checker, EASY) == Verdict()
    assert checker._process is not None
    os.kill(checker._process.get_pid(), signal.SIGSTOP)
    asked = asyncio.create_task(verdict(checker, BAD))
    await asyncio.sleep(0.01)
    checker._process.kill()
    found = await asked
    assert found.late and "died" in found.refused and not checker._waiting
    assert "unknown name" in (await verdict(checker, BAD)).refused


async def test_a_lost_fork_is_not_waited_for(
    checker: GrammarCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_check, "ANSWER_S", 0.5)
    monkeypatch.setattr(grammar_check, "FORKS_MAX", 1)
    asked = asyncio.create_task(verdict(checker, SLOW))
    os.kill(await _compiling(checker), signal.SIGKILL)
    found = await asked
    assert found.late and "does not answer" in found.refused
    assert await verdict(checker, EASY) == Verdict(), "its turn was given on"


@pytest.mark.parametrize("forks", [0, 1])
async def test_where_no_process_can_be_started_it_is_said(
    byte_level_folder: Path, forks: int
) -> None:
    """The outer fork cannot be made, or the inner one."""
    program = f"""if True:
        import os, sys
        from slipstream.tokenizer import grammar_fork
        made, fork = [], os.fork
        def limited():
            if len(made) >= {forks}:
                raise BlockingIOError(11, "none is left")
            made.append(1)
            return fork()
        os.fork = limited
        grammar_fork.main(sys.argv[1:])
    """
    checker = GrammarCheck(byte_level_folder, 421, [0])
    at = checker._command.index("-m")
    checker._command[at : at + 2] = ["-c", program]
    await checker.start()
    found = await verdict(checker, EASY)
    assert found.late and "none is left" in found.refused
    await checker.close()


async def test_many_wait_for_their_turn(checker: GrammarCheck) -> None:
    asked = [verdict(checker, f'start: "{i % 40}"') for i in range(80)]
    assert set(await asyncio.gather(*asked)) == {Verdict()}
    assert checker.statistics()["grammars_total"] == 40


async def test_too_many_or_too_late_are_told_to_come_again(
    checker: GrammarCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await verdict(checker, EASY) == Verdict()
    monkeypatch.setattr(grammar_check, "FORKS_MAX", 1)
    monkeypatch.setattr(grammar_check, "WAITING_MAX", 2)
    monkeypatch.setattr(grammar_check, "TURN_S", 0.2)
    slow = asyncio.create_task(verdict(checker, SLOW))
    await _compiling(checker)
    second, third = await asyncio.gather(verdict(checker, BAD), verdict(checker, BAD + "s"))
    assert second.late and "before it" in second.refused
    assert third.late and "2 others" in third.refused
    await slow
    assert "unknown name" in (await verdict(checker, BAD)).refused, "nothing of it is kept"


async def test_a_process_that_reads_nothing_stops_nobody(
    checker: GrammarCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await verdict(checker, EASY) == Verdict()
    monkeypatch.setattr(grammar_check, "ANSWER_S", 0.3)
    assert checker._process is not None
    os.kill(checker._process.get_pid(), signal.SIGSTOP)
    began_s = time.monotonic()
    asked = asyncio.create_task(verdict(checker, f'start: "{"x" * 900_000}"'))
    longest_s = 0.0
    while not asked.done():
        before_s = time.monotonic()
        checker.statistics()
        await asyncio.sleep(0.01)
        longest_s = max(longest_s, time.monotonic() - before_s)
    assert (await asked).late and time.monotonic() - began_s < 5 and longest_s < 0.25
    with contextlib.suppress(ProcessLookupError):
        os.kill(checker._process.get_pid(), signal.SIGCONT)


async def test_a_model_that_cannot_be_held_to_grammars_says_so(byte_level_folder: Path) -> None:
    for vocab_size, eos in ((421, []), (10, [0])):
        checker = GrammarCheck(byte_level_folder, vocab_size, eos)
        await checker.start()
        found = await verdict(checker, EASY)
        assert "this model cannot" in found.refused and not found.late
        assert str(byte_level_folder) not in found.refused, "no path for the client"
        await checker.close()


def test_the_loop_of_the_services(byte_level_folder: Path) -> None:
    """Its pipes are not asyncio's."""

    async def asked() -> Verdict:
        checker = GrammarCheck(byte_level_folder, 421, [0])
        await checker.start()
        found = await verdict(checker, EASY)
        await checker.close()
        return found

    assert uvloop.run(asked()) == Verdict()
