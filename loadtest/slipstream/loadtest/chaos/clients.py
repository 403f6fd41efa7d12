"""Scenarios: clients that leave, storm, stall, half-close, run out of time, repeat themselves."""

import asyncio
import json
import random
import socket
import struct
import time

from slipstream.loadtest.chaos.field import Field
from slipstream.loadtest.chaos.proxy import Proxy

STORM = 500
SLOW_BYTES_PER_S = 2_000.0
GONE_S = 1.0
"""After a disconnect nothing is computed any more for this request."""
_RESET = struct.pack("ii", 1, 0)


async def one_leaves_in_each_phase(field: Field) -> None:
    """While its prompt is encoded, computed, on its way, and while tokens come."""
    await field.streaming()
    for role, fault in (
        ("tokenizer", "encode_hold"),
        ("prefill", "prompt_hold"),
        ("decode", "hold"),
    ):
        field.stack.arm(role, fault)
        _, task = field.send("long prompt")
        await field.committed(role, fault)
        field.mark()
        task.cancel()
        await asyncio.sleep(0.2)
        field.stack.open_gate()
    entry, task = field.send("long answer")
    await field.reached(entry, 3)
    task.cancel()


async def a_storm(field: Field) -> None:
    """Hundreds ask at once and leave, each at another moment."""
    await field.streaming()
    rng = random.Random(0)
    field.mark()
    flights = []
    for _ in range(STORM):
        flights.append(field.send("greedy"))
        await asyncio.sleep(0.001)
    for _, task in flights:
        await asyncio.sleep(rng.choice((0.0, 0.0, 0.01)))
        task.cancel()


async def out_of_time(field: Field) -> None:
    """Budgets that end in the queue, with the prompt and with tokens."""
    await field.streaming()
    field.mark()
    field.stack.arm("prefill", "prompt_hold", 2)
    entries = [field.send("long prompt", timeout=1.0)]
    await field.committed("prefill", "prompt_hold", 2)
    entries += [field.send("long prompt", timeout=budget_s) for budget_s in (0.01, 0.5, 1.5)]
    await asyncio.gather(*(task for _, task in entries))
    field.stack.open_gate()
    last, task = field.send("long answer", timeout=1.0)
    await task
    told = [entry.code for entry, _ in entries] + [last.code]
    field.hold(told.count("deadline_exceeded") >= len(told) - 1, f"ended with {told}")


async def two_of_one_name(field: Field) -> None:
    """The same X-Request-Id, at the same time, for different questions."""
    await field.streaming()
    field.mark()
    names = ("greedy", "seeded", "log probabilities")
    flights = [field.client.send(field.asks[n], {"X-Request-Id": "one"}) for n in names]
    await asyncio.gather(*(task for _, task in flights))


async def half_closed(field: Field) -> None:
    """A client that says that it will say no more has left: a FIN is all that can be seen of one
    that goes. It gets nothing, or all."""
    ask = field.asks["whole"]
    reader, writer = await _sent(field, ask.path, ask.body)
    field.mark()
    writer.write_eof()
    async with asyncio.timeout(30):
        reply = await reader.read()
    writer.close()
    said = json.loads(reply.partition(b"\r\n\r\n")[2] or b"{}")
    told = said.get("choices", [{"text": None}])[0]["text"]
    right = field.expected["whole"].choices[0].text
    field.hold(told in (None, right), f"answered {reply[-200:]!r}")


async def slow_and_cut_connections(field: Field) -> None:
    """Late, slow, in slices; then reset. What comes is right, and who is cut off costs nothing."""
    port = int(field.stack.urls[0].rpartition(":")[2])
    async with Proxy(("127.0.0.1", 0), ("127.0.0.1", port)) as proxy:
        urls, field.client.urls = field.client.urls, [f"http://127.0.0.1:{proxy.port}"]
        try:
            proxy.latency_s, proxy.slice_bytes = 0.05, 7
            proxy.bytes_per_s = 20 * SLOW_BYTES_PER_S
            await asyncio.gather(*(field.send(n)[1] for n in ("greedy", "seeded")))
            entry, _ = field.send("long answer")
            await field.reached(entry, 3)
            field.mark()
            proxy.reset()
        finally:
            field.client.urls = urls


async def one_never_reads(field: Field) -> None:
    """It asks, and leaves what comes where it is."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    port = int(field.stack.urls[0].rpartition(":")[2])
    await loop.sock_connect(sock, ("127.0.0.1", port))
    body = {**field.asks["long answer"].body, "logprobs": 20}
    field.mark()
    await loop.sock_sendall(sock, _post("/v1/completions", body))
    await field.streaming(3)
    await asyncio.sleep(3 * GONE_S)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    sock.close()


async def slowloris(field: Field) -> None:
    """Heads and bodies that never come to an end, while others are served."""
    port = int(field.stack.urls[0].rpartition(":")[2])
    field.mark()
    halves = []
    for number in range(50):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        writer.write(head if number % 2 else head + b"Content-Length: 999\r\n\r\n{")
        halves.append(writer)
    begin_s = time.monotonic()
    await field.send("greedy")[1]
    field.hold(time.monotonic() - begin_s < 20, "it held up others")
    for writer in halves:
        writer.close()


def _post(path: str, body: dict[str, object]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data


async def _sent(
    field: Field, path: str, body: dict[str, object]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    port = int(field.stack.urls[0].rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_post(path, body))
    await writer.drain()
    return reader, writer
