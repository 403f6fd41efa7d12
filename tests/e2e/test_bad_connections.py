"""What is wrong below the body: lengths that lie, headers without end, clients that go away."""

import asyncio
import json
from contextlib import suppress
from urllib.parse import urlsplit

import pytest

from e2e.bad_inputs import CHAT, GOOD, SAYS, encoded
from e2e.client import Client
from e2e.stack import Stack

HEAD = b"Host: x\r\nContent-Type: application/json\r\n"
SOON_S = 5.0


async def spoken(stack: Stack, *parts: bytes) -> bytes:
    """What comes back for these bytes until the other side closes, or says nothing for a while."""
    parsed = urlsplit(stack.url)
    reader, writer = await asyncio.open_connection(parsed.hostname, parsed.port)
    heard = b""
    with suppress(ConnectionError):
        for part in parts:
            writer.write(part)
            await writer.drain()
        with suppress(TimeoutError):
            while data := await asyncio.wait_for(reader.read(65536), 1.0):
                heard += data
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
    return heard


def post(headers: bytes, body: bytes, first: bytes = b"") -> bytes:
    return (first or f"POST {CHAT} HTTP/1.1\r\n".encode()) + HEAD + headers + b"\r\n" + body


def length(num_bytes: int) -> bytes:
    return f"Content-Length: {num_bytes}\r\n".encode()


CHUNKED = b"Transfer-Encoding: chunked\r\n"
REFUSED = {
    "14: negative": post(b"Content-Length: -5\r\n", GOOD),
    "14: two that differ": post(length(len(GOOD)) + length(3), GOOD),
    "14: no number": post(b"Content-Length: many\r\n", GOOD),
    "15: a length and chunks": post(length(len(GOOD)) + CHUNKED, b"0\r\n\r\n"),
    "15: a chunk of no size": post(CHUNKED, b"zz\r\nabc\r\n0\r\n\r\n"),
    "16: 100 KiB in a header": post(b"X-Long: " + b"x" * 102_400 + b"\r\n", GOOD),
    "16: a URL of 1 MiB": b"GET /" + b"x" * (1 << 20) + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_a_request_that_is_none_is_refused_and_its_connection_closed(
    stack: Stack, client: Client, name: str
) -> None:
    heard = await asyncio.wait_for(spoken(stack, REFUSED[name]), SOON_S)
    head, _, body = heard.partition(b"\r\n\r\n")
    assert head.split(b" ")[1] in (b"400", b"413", b"414", b"431"), heard[:300]
    assert heard.count(b"HTTP/1.") == 1, "nothing behind it is taken for a request"
    assert json.loads(body)["error"]["message"] and b"Traceback" not in body
    assert (await client.complete("Still there?", max_tokens=1)).finish_reason


async def test_a_body_in_a_million_chunks_costs_bounded_work(stack: Stack, client: Client) -> None:
    body = encoded({**SAYS, "user": "x" * 200_000})
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    sending = asyncio.create_task(spoken(stack, post(CHUNKED, chunks)))
    assert (await client.complete("Still there?", max_tokens=1)).finish_reason
    assert (await sending).split(b" ")[1] in (b"200", b"400")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (post(length(len(GOOD)) + b"Expect: 100-continue\r\n", GOOD), b"100"),
        (post(length(len(GOOD)), GOOD, f"POST {CHAT} HTTP/1.0\r\n".encode()), b"200"),
        (post(length(len(GOOD)), GOOD, f"POST http://x{CHAT} HTTP/1.1\r\n".encode()), None),
        (post(length(len(GOOD)), GOOD, f"post {CHAT} HTTP/1.1\r\n".encode()), None),
        (post(length(len(GOOD)) + b"Connection: upgrade\r\nUpgrade: h2c\r\n", GOOD), None),
    ],
    ids=["expect", "1.0", "absolute", "lower case", "upgrade"],
)
async def test_rare_forms_of_http_get_an_answer(
    stack: Stack, client: Client, request_: bytes, status: bytes | None
) -> None:
    heard = await spoken(stack, request_)
    found = heard.split(b" ")[1]
    assert found == status if status else found in (b"200", b"400", b"404", b"405"), heard[:200]
    assert (await client.complete("Still there?", max_tokens=1)).finish_reason


async def test_crowds_of_connections_disturb_nobody(stack: Stack, client: Client) -> None:
    parsed = urlsplit(stack.url)
    idle = [await asyncio.open_connection(parsed.hostname, parsed.port) for _ in range(500)]
    try:
        livez = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
        heard = await spoken(stack, livez * 1000)
        assert heard.count(b"HTTP/1.1 200") == 1000
        assert (await client.complete("Still there?", max_tokens=1)).finish_reason
    finally:
        for _, writer in idle:
            writer.close()


async def test_clients_that_go_away_leave_nothing(stack: Stack, client: Client) -> None:
    """After the headers, in the body, before the first token, in the stream."""
    long = encoded({**SAYS, "max_tokens": 1500, "ignore_eos": True, "stream": True})
    parsed = urlsplit(stack.url)
    for sent, waits_s in ((b"", 0.0), (long[:20], 0.0), (long, 0.0), (long, 0.5)):
        _, writer = await asyncio.open_connection(parsed.hostname, parsed.port)
        writer.write(post(length(len(long)), sent))
        await writer.drain()
        await asyncio.sleep(waits_s)
        writer.transport.abort()
    assert (await client.complete("Still there?", max_tokens=1)).finish_reason
    await asyncio.to_thread(stack.until_settled)
    assert "Traceback" not in stack.log


async def test_one_request_id_twice_at_a_time_is_two_requests(stack: Stack, client: Client) -> None:
    named = b"X-Request-Id: same\r\n"
    request_ = post(length(len(GOOD)) + named, GOOD)
    answers = await asyncio.gather(spoken(stack, request_), spoken(stack, request_))
    ids = {json.loads(answer.partition(b"\r\n\r\n")[2])["id"] for answer in answers}
    assert len(ids) == 2 and all(b"x-request-id: same" in a.lower() for a in answers)
