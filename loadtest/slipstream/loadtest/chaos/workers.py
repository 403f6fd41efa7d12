"""Scenarios: workers that die, hang, fail and leave, in each phase of a request."""

import asyncio
import signal

from slipstream.loadtest.chaos.armed import ANY
from slipstream.loadtest.chaos.field import Field, Scenario

PAUSE_S = 6.0
"""Twice the time after which a silent peer counts as dead."""
SLOW_S = 8.0
POISON = 41_234
"""A token that no prompt of the mix has."""
CROWD = 10


def held(role: str, fault: str, blow: signal.Signals = signal.SIGKILL, victim: int = 0) -> Scenario:
    """A long prompt is caught in that fault's phase, and whoever commits it (0), or its peer (1),
    gets the signal; from a SIGSTOP it goes on after PAUSE_S."""

    async def scenario(field: Field) -> None:
        await field.streaming()  # now: who is caught may have all of them with it
        field.stack.arm(role, fault)
        field.send("long prompt")
        node_id = (await field.committed(role, fault))[victim]
        try:
            if blow is signal.SIGSTOP:
                await field.stand_still(node_id, PAUSE_S)
            else:
                field.strike(node_id, blow)
        finally:
            field.stack.open_gate()

    return scenario


async def prefill_dies_with_a_queue(field: Field) -> None:
    field.stack.arm("prefill", "prompt_hold")
    field.send("long prompt")
    node_id = (await field.committed("prefill", "prompt_hold"))[0]
    for _ in range(CROWD):
        field.send("long prompt", max_tokens=24)
    await field.until_asked(lambda: field.stack.page(node_id).get("waiting"), "somebody waits")
    field.strike(node_id)
    field.stack.open_gate()


async def lender_dies_at_the_last_word(field: Field) -> None:
    """All blocks are read, and who must confirm it dies instead."""
    field.stack.arm("prefill", "die")
    field.mark()
    field.send("long prompt")
    await field.committed("prefill", "die")


async def stale_descriptors(field: Field) -> None:
    """A prefill worker begins anew, and READs still name its predecessor."""
    epoch = await field.epoch("prefill-0")
    field.strike("prefill-0")
    await field.back("prefill-0", epoch)
    field.stack.arm("decode", "epoch", 2)
    for _ in range(2):
        field.send("long prompt")
    await field.committed("decode", "epoch", 2)


async def decode_dies_at_each_token(field: Field) -> None:
    """After the first token, in the middle, and before the last one of one stream each."""
    for share in (0.0, 0.5, 1.0):
        entry, task = field.send("long answer")
        pieces = max(1, int(share * (field.asks["long answer"].body["max_tokens"] - 1)))
        await field.reached(entry, 1)
        epoch = await field.epoch(entry.decode)
        await field.reached(entry, pieces)
        field.strike(entry.decode)
        await task
        await field.back(entry.decode, epoch)


async def decode_stands_still(field: Field) -> None:
    await field.streaming()
    await field.stand_still("decode-0", PAUSE_S)


async def every_decode_dies(field: Field) -> None:
    await field.streaming()
    for number in range(field.stack.counts["decode"]):
        field.strike(f"decode-{number}")


async def a_step_fails(field: Field) -> None:
    await field.streaming()
    field.mark()
    field.stack.arm("decode", "step_fail", 2)
    await field.committed("decode", "step_fail", 2)


async def no_number(field: Field) -> None:
    await field.streaming()
    field.mark()
    field.stack.arm("decode", "nan")
    await field.committed("decode", "nan")


async def a_step_hangs(field: Field) -> None:
    field.stack.arm("decode", "step_hold")
    await field.streaming()
    (node_id,) = await field.committed("decode", "step_hold")
    epoch = await field.epoch(node_id)
    field.mark()
    await field.back(node_id, epoch)
    field.stack.open_gate()


async def one_is_slow(field: Field) -> None:
    await field.streaming()
    field.mark()
    field.stack.switch("decode-0", "slow", "on")
    await asyncio.sleep(SLOW_S)
    field.stack.switch("decode-0", "slow", "")


async def more_than_fits(field: Field) -> None:
    """More answers at a time than the pool has blocks for: some wait, some are put back."""
    before = field.stack.page("decode-0").get("preemptions_total", 0.0)
    flights = [field.send("long answer") for _ in range(CROWD)]
    await asyncio.gather(*(task for _, task in flights))
    after = field.stack.page("decode-0").get("preemptions_total", 0.0)
    field.hold(after > before, "the pool was never full")


async def larger_than_any_pool(field: Field) -> None:
    """Refused at once, with both numbers."""
    body = {**field.asks["greedy"].body, "prompt": [500] * 600, "stream": False}
    del body["stream_options"]
    status, said = await field.client.post("/v1/completions", body)
    code = (said.get("error") or {}).get("code")
    field.hold((status, code) == (400, "context_length_exceeded"), f"answered {status} {code}")


async def a_worker_joins_and_leaves(field: Field) -> None:
    """A third decode worker gets streams, drains at SIGTERM and ends with 0."""
    extra = await asyncio.to_thread(field.stack.join, "decode", 9)
    try:
        await field.until(
            lambda: any(e.decode == "decode-9" for e in field.client.entries), "it gets streams"
        )
        field.mark()
        extra.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(extra.wait, 60)
        field.hold(code == 0, f"it left with {code}")
    finally:
        extra.kill()


async def poison(field: Field) -> None:
    """Every worker that computes this prompt dies: it is tried on two and, if others were lost with
    both, once more alone."""
    field.stack.switch(ANY, "poison", str(POISON))
    field.stack.arm(ANY, "poisoned", CROWD)
    prompt = [*field.asks["greedy"].body["prompt"][1:], POISON]
    field.mark()
    entry, task = field.send("greedy", prompt=prompt)
    await task
    field.stack.switch(ANY, "poison", "")
    deaths = len(field.stack.committed(ANY, "poisoned"))
    field.hold(2 <= deaths <= 3, f"{deaths} workers died of it")
    field.hold(entry.code == "request_quarantined", f"it ended with {entry.code or 'an answer'}")
