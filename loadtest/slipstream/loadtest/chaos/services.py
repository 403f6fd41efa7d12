"""Scenarios: frontends, tokenizers and the scheduler die, hang and leave; the bus hears nonsense,
or hears in one direction alone."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess

import psutil
import zmq

from slipstream.loadtest.chaos.field import Field, Scenario
from slipstream.loadtest.chaos.proxy import Proxy

ZOMBIE_S = 11.0
"""Longer than any lease."""
CUT_S = 6.0
"""Twice the time after which a silent peer counts as dead."""
LEAVE_S = 60.0
NONSENSE = (
    [b""],
    [b"", b""],
    [b"\xff" * 64, b"\x00"],
    [b"x" * 1_000_000, b"y", b"z"],
    [b"\x93\x01\x02", os.urandom(512)],
)
OPEN_FILES = 40


def dies(node_id: str) -> Scenario:
    async def scenario(field: Field) -> None:
        await field.streaming()
        epoch = await field.epoch(node_id)
        field.strike(node_id)
        if node_id != "scheduler-0":
            await field.back(node_id, epoch)

    return scenario


async def scheduler_dies_with_all_phases(field: Field) -> None:
    await field.streaming()
    field.stack.arm("prefill", "prompt_hold")
    for _ in range(3):
        field.send("long prompt")
    await field.committed("prefill", "prompt_hold")
    field.strike("scheduler-0")
    field.stack.open_gate()


async def scheduler_stands_still(field: Field) -> None:
    await field.streaming()
    await field.stand_still("scheduler-0", ZOMBIE_S)


async def leaves(field: Field, node_id: str) -> None:
    """SIGTERM; what runs ends, and a successor is there."""
    process = field.stack.processes()[node_id]
    field.stack.send(node_id, signal.SIGTERM)
    gone, _ = await asyncio.to_thread(psutil.wait_procs, [process], timeout=LEAVE_S)
    field.hold(bool(gone), f"{node_id} does not leave")
    await field.until_asked(field.stack.ready, f"a successor of {node_id}")


async def a_frontend_leaves(field: Field) -> None:
    await field.streaming()
    field.mark()
    await leaves(field, "frontend-1")


async def everyone_leaves_in_turn(field: Field) -> None:
    """A rolling restart of every process, one after another."""
    await field.streaming()
    field.mark()
    for node_id in field.stack.pages:
        await leaves(field, node_id)


async def a_second_scheduler(field: Field) -> None:
    """It does not take the address of the one that lives."""
    await field.streaming()
    field.mark()
    second = await asyncio.to_thread(field.stack.join, "scheduler", 0)
    try:
        code = await asyncio.to_thread(second.wait, 30)
        field.hold(code != 0, "it ended as if all were well")
    except subprocess.TimeoutExpired:
        field.hold(False, "it runs beside the first one")
    finally:
        second.kill()


async def nonsense_on_the_bus(field: Field) -> None:
    """At every socket of the run directory."""
    await field.streaming()
    field.mark()
    before, folder = await asyncio.to_thread(_malformed, field), field.stack.run_dir
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        for path in sorted(set(folder.glob("*.sock")) - {folder / "redis.sock"}):
            with context.socket(zmq.DEALER) as peer:
                peer.set(zmq.LINGER, 500)
                peer.connect(f"ipc://{path}")
                for parts in NONSENSE * 20:
                    peer.send_multipart(parts)
            with contextlib.closing(_unix(str(path))) as raw:
                raw.sendall(os.urandom(4096))
    finally:
        await asyncio.to_thread(context.term)
    await field.until_asked(lambda: _malformed(field) > before, "it is counted")


async def one_way_cut(field: Field) -> None:
    """The scheduler's words to one decode worker are lost, and the other direction goes on. So that
    its words come by a proxy, the scheduler begins anew first."""
    path = field.stack.run_dir / "decode-0.sock"
    away = path.with_suffix(".away")
    path.rename(away)
    try:
        async with Proxy(path, away) as proxy:
            field.stack.send("scheduler-0", signal.SIGKILL)
            await field.until(lambda: proxy.bytes_passed, "the scheduler comes by the proxy")
            await field.until_asked(field.stack.ready, "ready again")
            await field.streaming()
            field.mark()
            proxy.silent_up = True
            await asyncio.sleep(CUT_S)
            proxy.silent_up = False
            await field.until_asked(field.stack.ready, "heard again")
            away.rename(path)  # who connects from now on comes directly
            proxy.cut()
    finally:
        if away.exists():
            away.rename(path)


async def no_more_files(field: Field) -> None:
    """A frontend may open no more of them: who has a stream keeps it, who comes is refused."""
    await field.streaming(3)
    field.mark()
    frontend = field.stack.processes()["frontend-1"]
    before = frontend.rlimit(psutil.RLIMIT_NOFILE)
    port = int(field.stack.urls[1].rpartition(":")[2])
    frontend.rlimit(psutil.RLIMIT_NOFILE, (frontend.num_fds() + 4, before[1]))
    idle = []
    try:
        for _ in range(OPEN_FILES):
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(1):
                    idle.append((await asyncio.open_connection("127.0.0.1", port))[1])
        await asyncio.sleep(1)
    finally:
        frontend.rlimit(psutil.RLIMIT_NOFILE, before)
        for writer in idle:
            writer.close()


async def everything_dies(field: Field) -> None:
    """`serve` is killed, and all that it had with it; the next one finds nothing in its way."""
    await field.streaming()
    stack = field.stack
    field.mark()
    everything = list(stack.processes().values())
    stack.process.kill()
    _, alive = await asyncio.to_thread(psutil.wait_procs, everything, timeout=10)
    field.hold(not alive, f"{len(alive)} processes outlive serve")
    stack.process.wait()
    stack.start()
    await asyncio.to_thread(stack.until_ready)


def _malformed(field: Field) -> float:
    name = "bus_frames_malformed_total"
    return sum(field.stack.page(node).get(name, 0.0) for node in field.stack.pages)


def _unix(path: str) -> socket.socket:
    raw = socket.socket(socket.AF_UNIX)
    raw.connect(path)
    return raw
