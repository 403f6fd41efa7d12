"""Goes through the rows: a stack, load, a fault, rest, verdict."""

import asyncio
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from slipstream.errors import ExitCode
from slipstream.loadtest.chaos import table
from slipstream.loadtest.chaos.asks import Ask, draw
from slipstream.loadtest.chaos.catalogue import ROWS
from slipstream.loadtest.chaos.checker import check, deliveries
from slipstream.loadtest.chaos.field import Field, Served, Unmet, settings_of
from slipstream.loadtest.chaos.history import Facts, Found
from slipstream.loadtest.chaos.row import Row
from slipstream.loadtest.chaos.table import Result
from slipstream.runtime.record import read

MODEL = "smollm2-135m-instruct"
ROW_S = 180.0
"""Longest time of a scenario."""
SHOWN = 5
BUG = f"exit code {ExitCode.BUG.value}"


async def run(plan: Iterable[tuple[str, Sequence[Row]]], seed: int, output: Path) -> int:
    """Prints a line for each row as it ends, and writes the table. 1: a row is bad."""
    results: dict[str, Result] = {}
    for name, rows in plan:
        await _stack(name, rows, draw(seed, MODEL), output, results)
    (output / "chaos.md").write_text(table.markdown(ROWS, results), encoding="utf-8")
    (output / "chaos.json").write_bytes(msgspec.json.format(msgspec.json.encode(results)))
    bad = [result.id for result in results.values() if not result.good]
    print(f"{len(results)} rows, {len(bad)} bad{': ' + ', '.join(bad) if bad else ''}", flush=True)
    return 1 if bad else 0


async def _stack(
    name: str, rows: Sequence[Row], asks: list[Ask], output: Path, results: dict[str, Result]
) -> None:
    """A row after which the stack is not whole gets a new one."""
    field: Field | None = None
    try:
        for row in rows:
            field = field or await started(name, asks)
            result, whole = await _play(field, row)
            results[row.id] = result
            _show(row, result)
            if not result.good:
                (output / f"{row.id}.log").write_text(field.stack.log, encoding="utf-8")
            if not whole:
                await field.close()
                field = None
        if field is not None:
            await _ended(field, name, results)
    finally:
        if field is not None:
            await field.close()


def _show(row: Row, result: Result) -> None:
    print(table.line(row, result), flush=True)
    for problem in result.found.problems[:SHOWN]:
        print(f"     {problem}", flush=True)


async def started(name: str, asks: list[Ask]) -> Field:
    """A stack whose right answers are known. What went wrong at its start is raised."""
    begin_s = time.monotonic()
    stack = Served(**settings_of(name))
    try:
        await asyncio.to_thread(stack.until_ready)
        field = Field(stack, asks)
        await field.learn()
    except BaseException:
        stack.kill()
        raise
    seconds = time.monotonic() - begin_s
    print(f"stack {name}: ready, {len(asks)} answers known after {seconds:.0f} s", flush=True)
    return field


async def _play(field: Field, row: Row) -> tuple[Result, bool]:
    """The row's result, and whether the stack can have another one."""
    assert row.scenario is not None
    begin_s, whole, facts = time.monotonic(), True, Facts()
    trouble: list[str] = []
    bugs = field.stack.log.count(BUG)
    try:
        async with field.load(), asyncio.timeout(ROW_S):
            await row.scenario(field)
    except Exception as error:  # noqa: BLE001 a row that cannot be played is bad; the next one is played
        trouble.append(f"{row.id}: {type(error).__name__} {error}")
        trouble += [] if isinstance(error, Unmet) else traceback.format_exception(error)
    finally:
        field.stack.disarm()
    try:
        facts = await field.rest()
        probe, task = field.send("greedy")
        await task
        if probe.failed:
            trouble.append(f"afterwards a request fails: {probe.code or probe.broken}")
    except (Unmet, OSError) as error:
        whole = False
        trouble.append(str(error))
    entries, blow_s, notes = field.take()
    found = check(entries, field.expected, row.may, facts, blow_s)
    if field.stack.log.count(BUG) > bugs:
        trouble.append(f"a machine ended with {BUG}")
    found.problems = trouble + notes + found.problems
    seconds = time.monotonic() - begin_s
    whole = whole and not (facts.stranded or facts.unsettled)
    return Result(id=row.id, found=found, stranded=facts.stranded, seconds=seconds), whole


async def _ended(field: Field, name: str, results: dict[str, Result]) -> None:
    """SIGTERM at last, and a look through what the frontends have recorded."""
    problems: list[str] = []
    for file in sorted(field.stack.records.glob("frontend-*.rec")):
        problems += deliveries(read(file))
    try:
        await asyncio.to_thread(field.stack.close, tracebacks=True)
    except AssertionError as error:
        problems.append(f"at the end of {name}: {error}"[:2000])
    if problems:
        found = Found(problems=problems)
        results[f"end of {name}"] = Result(id=f"end of {name}", found=found)
        print("\n".join([f"BAD  end of {name}", *problems[:SHOWN]]), flush=True)
