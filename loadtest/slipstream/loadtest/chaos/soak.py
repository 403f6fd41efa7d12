"""Load for long, with a worker killed every minute: what is left of goodput, and what grows."""

import asyncio
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil

from slipstream.loadtest.chaos.asks import draw
from slipstream.loadtest.chaos.checker import check
from slipstream.loadtest.chaos.field import Field
from slipstream.loadtest.chaos.history import Entry, Facts
from slipstream.loadtest.chaos.run import MODEL, SHOWN, started

KILL_EVERY_S = 60.0
CALM_SHARE = 0.25
"""Of the time, undisturbed at the beginning: what throughput is held against."""
CALM_MAX_S = 180.0
GOODPUT_SHARE = 0.9
GROWTH_SHARE = 0.02
CACHES_BYTES = 24 << 20
"""A process may grow by so much more: prompts seen before, compiled grammars, traces, arenas."""
GROWTH_COUNT = 4
"""File descriptors and threads: connections of the moment."""


class Weight(msgspec.Struct):
    """Of one process at rest."""

    rss_bytes: int
    fds: int
    threads: int


async def soak(seconds: float, seed: int, output: Path) -> int:
    """1: something was lost, wrong or leaked, or too little came out."""
    field = await started("twins", draw(seed, MODEL))
    try:
        calm_s = min(CALM_MAX_S, CALM_SHARE * seconds)
        async with field.load():
            await asyncio.sleep(calm_s)
        entries, problems = await _looked_at(field)
        calm, before = goodput(entries), _weights(field)
        print(f"calm: {calm:.1f} answered tokens a second", flush=True)
        async with field.load():
            kills = await _kills(field, seconds - calm_s)
        entries, more = await _looked_at(field)
        hurt, after = goodput(entries), _weights(field)
        problems += more + grown(before, after)
        workers = len(field.stack.workers)
        share, wanted = hurt / calm, GOODPUT_SHARE * (workers - 1) / workers
        if share < wanted:
            problems.append(f"goodput {share:.2f} of that without kills, and not {wanted:.2f}")
        told: dict[str, Any] = {
            "seconds": seconds,
            "kills": kills,
            "requests": len(entries),
            "goodput": share,
        }
        told |= {"wanted": wanted, "before": before, "after": after, "problems": problems}
        (output / "soak.json").write_text(json.dumps(msgspec.to_builtins(told), indent=2))
        print(
            f"{kills} kills, {len(entries)} requests, goodput {share:.2f} (at least {wanted:.2f})"
        )
        print("\n".join(problems[:SHOWN]) or "nothing lost, wrong or leaked", flush=True)
        return 1 if problems else 0
    finally:
        await field.close()


async def _kills(field: Field, seconds: float) -> int:
    """One worker after another, until the time is over."""
    end_s = time.monotonic() + seconds
    for kills, victim in enumerate(itertools.cycle(field.stack.workers)):
        half_s = min(KILL_EVERY_S, end_s - time.monotonic()) / 2
        if half_s < KILL_EVERY_S / 4:
            await asyncio.sleep(max(0.0, 2 * half_s))
            return kills
        await asyncio.sleep(half_s)
        field.strike(victim)
        await asyncio.sleep(half_s)
    raise AssertionError("there is no worker")


async def _looked_at(field: Field) -> tuple[list[Entry], list[str]]:
    facts: Facts = await field.rest()
    entries, _, _ = field.take()
    return entries, check(entries, field.expected, (), facts, None).problems


def goodput(entries: Sequence[Entry]) -> float:
    """Tokens a second of answers that came whole."""
    whole = [entry for entry in entries if not entry.failed]
    if not whole:
        return 0.0
    span_s = max(entry.end_s for entry in whole) - min(entry.sent_s for entry in whole)
    return sum(entry.completion_tokens for entry in whole) / span_s


def grown(before: dict[str, Weight], after: dict[str, Weight]) -> list[str]:
    """What processes have more of than their growth is allowed; a worker that was killed is another
    process, held against the one before it."""
    problems = []
    for name, then in before.items():
        now = after[name]
        limit = then.rss_bytes * (1 + GROWTH_SHARE) + CACHES_BYTES
        if now.rss_bytes > limit:
            problems.append(f"{name}: {then.rss_bytes >> 20} MiB became {now.rss_bytes >> 20}")
        for what in ("fds", "threads"):
            was, now_has = getattr(then, what), getattr(now, what)
            if now_has > was * (1 + GROWTH_SHARE) + GROWTH_COUNT:
                problems.append(f"{name}: {was} {what} became {now_has}")
    return problems


def _weights(field: Field) -> dict[str, Weight]:
    processes: dict[str, psutil.Process] = field.stack.processes()
    return {
        name: Weight(process.memory_info().rss, process.num_fds(), process.num_threads())
        for name, process in processes.items()
    }
