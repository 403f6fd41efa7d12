"""The client counts events, however a connection cuts them."""

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.loadtest.sse_client import Connection, Counted

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class Sink(asyncio.Transport):
    def write(self, data: object) -> None:
        pass


def chunk(events: int) -> bytes:
    body = b'data: {"text":"the data: of 0\\r\\n"}\n\n' * events
    return b"%x\r\n%b\r\n" % (len(body), body)


async def received(pieces: list[bytes]) -> tuple[int, int]:
    """Events of the stream, and of the connection, that `pieces` make."""
    counted = Counted(events=100)
    connection = Connection(counted)
    connection.connection_made(Sink())
    asking = asyncio.create_task(connection.stream(b"POST"))
    await asyncio.sleep(0)
    for piece in pieces:
        assert not asking.done()
        connection.data_received(piece)
    async with asyncio.timeout(1):
        await asking
    return connection.events, counted.events - 100


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.data())
def test_events_are_counted_across_cuts(chunks: list[int], data: st.DataObject) -> None:
    body = b"".join(map(chunk, chunks)) + b"0\r\n\r\n"
    cuts = sorted(data.draw(st.sets(st.integers(1, len(body) - 1), max_size=8)))
    pieces = [body[begin:end] for begin, end in pairwise([0, *cuts, len(body)])]
    pieces[0] = HEAD + pieces[0]
    assert asyncio.run(received(pieces)) == (sum(chunks), sum(chunks))


def test_what_is_no_stream_is_an_error() -> None:
    with pytest.raises(ConnectionError, match="429"):
        asyncio.run(received([b"HTTP/1.1 429 Too Many Requests\r\n\r\n"]))
