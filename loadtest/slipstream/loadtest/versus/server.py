"""Starts the processes of one peer, waits until they are ready, weighs them, and ends them."""

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO

import aiohttp
import msgspec
import psutil

from slipstream.loadtest.versus.errors import PeerMissing

READY_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 40.0
ORPHAN_TIMEOUT_S = 3.0
_POLL_S = 0.05
_WEIGH_S = 1.0


class Program(msgspec.Struct, frozen=True):
    command: list[str]
    ready_url: str
    """Answers 200 from the moment when requests can be served."""


class Launch(msgspec.Struct, frozen=True):
    """All programs of one server, started together; `url` is that of the one that is asked."""

    programs: list[Program]
    url: str


class Server:
    """A server that runs. `peak_bytes` grows while `weighing`."""

    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self.peak_bytes = 0
        self.start_s = 0.0
        self._log = log
        self._roots: list[psutil.Popen] = []
        self._seen: set[psutil.Process] = set()

    def start(self, command: list[str], out: IO[str]) -> None:
        """One program, in a session of its own: Ctrl-C is ours, and we say when it ends.
        PeerMissing: there is none of that name."""
        try:
            root = psutil.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise PeerMissing(f"{command[0]}: {error.strerror}") from None
        self._roots.append(root)

    def require_alive(self) -> None:
        """PeerMissing: one of its programs has ended; the reason is its last line."""
        for root in self._roots:
            if root.poll() is not None:
                raise PeerMissing(f"ended with code {root.returncode}: {last_line(self._log)}")

    def weigh(self) -> None:
        """The memory of all its processes; pages that several of them share count once."""
        total = 0
        for process in self._tree():
            with suppress(psutil.Error):
                total += process.memory_full_info().pss
        self.peak_bytes = max(self.peak_bytes, total)

    @asynccontextmanager
    async def weighing(self) -> AsyncIterator[None]:
        """Weighs it every second meanwhile, and once at the end."""
        task = asyncio.create_task(self._weigh_often())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.to_thread(self.weigh)

    async def _weigh_often(self) -> None:
        while True:
            await asyncio.to_thread(self.weigh)
            await asyncio.sleep(_WEIGH_S)

    async def until_ready(self, urls: list[str], begin_s: float) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            for url in urls:
                while not await _answers(session, url):
                    self.require_alive()
                    if time.perf_counter() - begin_s > READY_TIMEOUT_S:
                        raise PeerMissing(f"not ready in {READY_TIMEOUT_S:g} s")
                    await asyncio.sleep(_POLL_S)
        self.start_s = time.perf_counter() - begin_s
        self._tree()

    async def stop(self) -> None:
        """SIGTERM to each program; what is left of it and of its children is killed."""
        everything = self._tree()
        for root in self._roots:
            with suppress(ProcessLookupError, psutil.Error):
                root.send_signal(signal.SIGTERM)
        await _ended(self._roots, STOP_TIMEOUT_S)
        for process in await _ended(everything, ORPHAN_TIMEOUT_S):
            with suppress(psutil.Error):
                process.kill()
        await _ended(everything, ORPHAN_TIMEOUT_S)

    def _tree(self) -> set[psutil.Process]:
        """Its processes that live, those whose parent is gone among them."""
        for root in self._roots:
            with suppress(psutil.Error):
                process = psutil.Process(root.pid)
                self._seen |= {process, *process.children(recursive=True)}
        self._seen = {process for process in self._seen if process.is_running()}
        return self._seen


@asynccontextmanager
async def running(launch: Launch, log: Path) -> AsyncIterator[Server]:
    """The server, ready. PeerMissing: it could not be started. Its output goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    server = Server(launch.url, log)
    try:
        begin_s = time.perf_counter()
        with log.open("w", encoding="utf-8") as out:
            for program in launch.programs:
                server.start(program.command, out)
        await server.until_ready([program.ready_url for program in launch.programs], begin_s)
        yield server
    finally:
        await asyncio.shield(server.stop())


async def _ended(processes: Iterable[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Those that still run after that time."""
    wait = psutil.wait_procs
    return list((await asyncio.to_thread(wait, list(processes), timeout=timeout_s))[1])


async def _answers(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(url) as reply:
            return reply.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at this moment, all different."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def last_line(log: Path) -> str:
    """The last line of a server's output that says something."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line.strip() for line in lines if line.strip()]
    return said[-1][:300] if said else "it said nothing"


def read_through(folder: Path) -> None:
    """Every file of a model into the page cache."""
    for file in [folder] if folder.is_file() else sorted(folder.rglob("*")):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                while os.read(descriptor, 1 << 22):
                    pass
            finally:
                os.close(descriptor)
