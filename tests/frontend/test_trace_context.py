"""`traceparent` by the rules of W3C Trace Context."""

import msgspec
import pytest
from multidict import CIMultiDict

from frontend.fakes import Server, chat_body
from slipstream.spans import TraceContext

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
VALID = f"00-{TRACE}-{PARENT}-01"


async def context(server: Server, *headers: tuple[str, str]) -> TraceContext:
    """Of a request with these headers."""
    sent = CIMultiDict([("Content-Type", "application/json"), *headers])
    url = f"{server.url}/v1/chat/completions"
    async with server.client.post(
        url, data=msgspec.json.encode(chat_body()), headers=sent
    ) as reply:
        assert reply.status == 200, await reply.text()
    return server.gateway.contexts[-1]


async def test_a_client_in_a_trace(server: Server) -> None:
    got = await context(
        server, ("traceparent", VALID), ("tracestate", "a=1"), ("tracestate", "b=2")
    )
    assert got == TraceContext(trace_id=TRACE, parent_id=PARENT, state="a=1,b=2")


@pytest.mark.parametrize(
    ("flags", "sampled"), [("00", False), ("01", True), ("02", False), ("ff", True)]
)
async def test_its_word_on_sampling_counts(server: Server, flags: str, sampled: bool) -> None:
    got = await context(server, ("traceparent", f"00-{TRACE}-{PARENT}-{flags}"))
    assert got.sampled is sampled and got.trace_id == TRACE


async def test_later_versions_may_say_more(server: Server) -> None:
    for more in ("", "-what-is-this"):
        got = await context(server, ("traceparent", f"cc-{TRACE}-{PARENT}-01{more}"))
        assert got.trace_id == TRACE and got.parent_id == PARENT


@pytest.mark.parametrize(
    "header",
    [
        "",
        "x",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT.upper()}-01",
        f"00-{TRACE}-{PARENT}-0G",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}-{PARENT}-011",
        f"00-{TRACE}0-{PARENT}-01",
        f"00-{TRACE}-{PARENT}",
        f"cc-{TRACE}-{PARENT}-01.more",
        f"00_{TRACE}_{PARENT}_01",
        VALID + "x" * 4000,
    ],
)
async def test_what_is_not_valid_is_passed_over(server: Server, header: str) -> None:
    """In silence, and its tracestate with it."""
    got = await context(server, ("traceparent", header), ("tracestate", "a=1"))
    assert got.trace_id not in (TRACE, "0" * 32) and len(got.trace_id) == 32
    assert got == TraceContext(trace_id=got.trace_id)


async def test_two_at_once_are_none(server: Server) -> None:
    got = await context(server, ("traceparent", VALID), ("traceparent", VALID))
    assert got.trace_id != TRACE


async def test_each_request_without_one_is_a_trace(server: Server) -> None:
    first, second = await context(server), await context(server)
    assert first.trace_id != second.trace_id and first.sampled and not first.parent_id


async def test_a_state_that_is_too_long_is_left_out(server: Server) -> None:
    got = await context(server, ("traceparent", VALID), ("tracestate", "a=" + "1" * 600))
    assert got.trace_id == TRACE and not got.state


async def test_all_choices_are_in_one_trace(server: Server) -> None:
    await server.chat(n=3)
    assert len({context.trace_id for context in server.gateway.contexts}) == 1
    assert len(server.gateway.contexts) == 3
