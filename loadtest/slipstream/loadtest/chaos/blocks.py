"""Scenarios: KV blocks that come torn, late or not at all."""

import asyncio
import itertools

from slipstream.loadtest.chaos.armed import ANY
from slipstream.loadtest.chaos.field import PULL_TIMEOUT_S, Field, Scenario

LOSS = 0.05
COUNTED = {"flip": "handover_digest_total", "swap": "handover_digest_total"}


def spoilt(fault: str, count: int = 2) -> Scenario:
    """READs whose bytes are not what was sent: noticed, counted, computed again."""

    async def scenario(field: Field) -> None:
        name = COUNTED[fault]
        before = await asyncio.to_thread(_failures, field, name)
        field.stack.arm("decode", fault, count)
        for _ in range(count):
            field.send("long prompt")
        await field.committed("decode", fault, count)
        field.mark()

        def counted() -> bool:
            return _failures(field, name) >= before + count

        await field.until_asked(counted, f"{count} failures are counted")

    return scenario


async def some_reads_fail(field: Field) -> None:
    """One in twenty, until some have."""
    before = await asyncio.to_thread(_reads_failed, field)
    field.stack.switch(ANY, "lossy", str(LOSS))
    field.mark()
    for turn in itertools.count():
        field.send("shared prefix")
        _, task = field.send("long prompt")
        await task
        if turn >= 2 and await asyncio.to_thread(_reads_failed, field) >= before + 2:
            break
    field.stack.switch(ANY, "lossy", "")


async def a_read_stalls(field: Field) -> None:
    """Nine tenths have come; the rest comes when nobody waits for it any more."""
    field.stack.arm("decode", "stall")
    field.send("long prompt")
    await field.committed("decode", "stall")
    field.mark()
    await asyncio.sleep(PULL_TIMEOUT_S + 2)
    field.stack.open_gate()


async def shared_memory_goes(field: Field) -> None:
    """The names of all segments are gone, and a decode worker begins anew: it comes to the blocks
    of the others by another way. Then they begin anew too, so that the next row finds the stack as
    it was."""
    for segment in field.stack.segments():
        segment.unlink()
    for victim in ("decode-0", "decode-1", "prefill-0", "prefill-1"):
        epoch = await field.epoch(victim)
        field.strike(victim)
        await field.back(victim, epoch)
        await field.send("long prompt")[1]


def _failures(field: Field, name: str) -> float:
    return sum(field.stack.page(node).get(name, 0.0) for node in field.stack.workers)


def _reads_failed(field: Field) -> float:
    return sum(
        value
        for node in field.stack.workers
        for name, value in field.stack.page(node).items()
        if name.startswith("transfer_") and name.endswith("_failures_transport_total")
    )
