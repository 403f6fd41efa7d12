"""What a person sees of the processes, and that nothing is left of them."""

import re
import signal
import subprocess
import sys

import psutil

from e2e.client import Client, eventually
from e2e.stack import Stack, until

SERVICES = ("frontend", "tokenizer", "scheduler", "prefill", "decode", "kvindex")


def test_ps_shows_each_service_by_its_name(stack: Stack) -> None:
    pids = stack.pids()
    for service in SERVICES:
        found = subprocess.run(
            ["pgrep", "-f", f"slipstream {service}"], capture_output=True, text=True, check=True
        )
        assert str(pids[f"{service}-0"]) in found.stdout.split()
        shown = subprocess.run(
            ["ps", "-o", "args=", "-p", str(pids[f"{service}-0"])],
            capture_output=True,
            text=True,
            check=True,
        )
        assert shown.stdout.startswith(f"slipstream {service} ")
    assert "redis-server" in " ".join(psutil.Process(pids["redis"]).cmdline())


def test_a_second_start_says_who_has_the_port(stack: Stack) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "slipstream.cli.main", "serve", "--port", str(stack.port)],
        env={"PYTHONPATH": ":".join(filter(None, sys.path)), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert second.returncode not in (0, 1)
    frontend = stack.pids()["frontend-0"]
    line = second.stderr.strip()
    assert "\n" not in line and str(stack.port) in line
    assert f"pid {frontend} (slipstream frontend" in line


async def test_ctrl_c_lets_running_requests_end_and_leaves_nothing() -> None:
    stack = Stack(kv_cache_bytes="96MiB")
    try:
        async with Client(stack.url) as client:
            asked = ([500] * 40, [600] * 40)
            running = [client.stream(one, max_tokens=40, ignore_eos=True) for one in asked]
            await eventually(lambda: all(answer.chunks for answer, _ in running))
            stack.process.send_signal(signal.SIGINT)
            for answer, following in running:
                await following
                assert answer.finish_reason == "length", (answer.error, answer.broken)
                assert answer.usage["completion_tokens"] == 40
        stack.close(signal.SIGINT)
    finally:
        stack.kill()


def test_ready_block_and_redis_line_are_true(stack: Stack) -> None:
    """What the READY block says can be typed: its Redis answers, its pids live."""
    pids = {int(pid) for pid in re.findall(r"pid (\d+)", stack.log)}
    assert set(stack.pids().values()) <= pids
    until(lambda: (stack.run_dir / "redis.sock").exists(), "redis")
    (command,) = re.findall(r"Redis\s+(\S+) -s (\S+)", stack.log)
    pong = subprocess.run(
        [command[0], "-s", command[1], "ping"], capture_output=True, text=True, check=True
    )
    assert pong.stdout.strip() == "PONG"
