"""What the proxy does to connections, seen from both ends."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from slipstream.loadtest.chaos.proxy import Proxy

SAID = bytes(range(256)) * 40


@pytest_asyncio.fixture
async def echo(tmp_path: Path) -> AsyncIterator[Path]:
    """Says again what it hears, and ends when it hears no more."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096):
            writer.write(data)
        writer.close()

    server = await asyncio.start_unix_server(serve, tmp_path / "echo")
    yield tmp_path / "echo"
    server.close()


async def connect(proxy: Proxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", proxy.port)


async def test_bytes_pass_whole_however_they_are_cut(echo: Path) -> None:
    async with Proxy(("127.0.0.1", 0), echo) as proxy:
        proxy.slice_bytes, proxy.bytes_per_s = 1000, 1e6
        reader, writer = await connect(proxy)
        writer.write(SAID)
        writer.write_eof()
        assert await reader.read(-1) == SAID
        assert proxy.bytes_passed == 2 * len(SAID)


async def test_in_the_place_of_a_socket_file_and_late(echo: Path, tmp_path: Path) -> None:
    async with Proxy(tmp_path / "proxy", echo) as proxy:
        proxy.latency_s = 0.1
        reader, writer = await asyncio.open_unix_connection(tmp_path / "proxy")
        began_s = time.monotonic()
        writer.write(b"late")
        assert await reader.readexactly(4) == b"late"
        assert time.monotonic() - began_s > 0.19


async def test_half_open_is_silent_and_open(echo: Path) -> None:
    async with Proxy(("127.0.0.1", 0), echo) as proxy:
        reader, writer = await connect(proxy)
        proxy.silent_down = True
        writer.write(b"heard")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.2)
        assert proxy.bytes_passed == 5  # it came there, and no answer back
        proxy.silent_down = False
        assert await reader.readexactly(5) == b"heard"


async def test_cut_and_reset(echo: Path) -> None:
    async with Proxy(("127.0.0.1", 0), echo) as proxy:
        reader, writer = await connect(proxy)
        writer.write(b"1")
        assert await reader.readexactly(1)
        proxy.cut()
        assert await reader.read() == b""
        reader, writer = await connect(proxy)
        writer.write(b"2")
        assert await reader.readexactly(1)
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            await reader.read()


async def test_nobody_behind_it(tmp_path: Path) -> None:
    async with Proxy(("127.0.0.1", 0), tmp_path / "nobody") as proxy:
        reader, _ = await connect(proxy)
        assert await reader.read() == b""
