"""A whole stack over two network namespaces: prefill here, decode there, blocks over the wire."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.client import MODEL, Client
from e2e.reference import MAX_TOKENS, Reference
from e2e.stack import PATIENCE_S, free_port, until
from netns import Joined, joined, refusal
from slipstream import curve
from slipstream.cli.config import ServeConfig
from slipstream.cli.plan import REDIS, ChildSpec, Layout, plan

AWAY = "decode-0"
PROMPTS = 12
BLOCK_BYTES = 720 << 10
"""Of the demo model in float32."""


class TwoHosts:
    """The processes of `slipstream serve`, with addresses of TCP and keys, one of them in the other
    namespace. Both share the host's memory, so `transports` leaves `shm` out."""

    def __init__(self, link: Joined, folder: str, transports: str):
        self.base = Path(tempfile.mkdtemp(prefix="e2e-", dir="/tmp"))
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = (self.base / "log").open("w")
        given = {
            "port": self.port,
            "transports": transports,
            "disaggregation": "always",
            "dtype": "float32",
            "threads": 1,
            "max_model_len": 2048,
            "kv_cache_bytes": 256 << 20,
            "ttft_target_s": 0,  # none: nothing is refused because this machine is slow
        }
        layout = Layout(
            config=ServeConfig(**given),  # type: ignore[arg-type]
            given=list(given),
            config_file="",
            model=Path(folder),
            model_name=MODEL,
            run_dir=self.base,
            environ={
                **{k: v for k, v in os.environ.items() if not k.startswith("SLIPSTREAM_")},
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "UCX_TLS": "tcp",  # one kernel: cma would see through the namespaces
            },
        )
        curve.generate(self.base / "keys")
        scheduler = f"tcp://{link.ours}:{free_port()}"
        self.processes: list[subprocess.Popen[bytes]] = []
        for spec in plan(layout):
            self.processes.append(self._start(spec, link, scheduler))

    def close(self) -> None:
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._log.close()
        shutil.rmtree(self.base)

    def _start(self, spec: ChildSpec, link: Joined, scheduler: str) -> subprocess.Popen[bytes]:
        argv, environ = list(spec.argv), spec.env
        away = spec.node_id == AWAY
        if spec.role != REDIS:
            host = link.theirs if away else link.ours
            own = f"tcp://{host}:{free_port()}"
            listen = scheduler if spec.role == "scheduler" else own
            argv += ["--listen", listen, "--scheduler", scheduler]
            argv += ["--keys-dir", str(self.base / "keys")]
            environ = environ | {"UCX_NET_DEVICES": link.there if away else link.interface}
        wrap = link.wrap if away else ()
        return subprocess.Popen(
            [*wrap, *argv],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    @property
    def log(self) -> str:
        return (self.base / "log").read_text(encoding="utf-8")

    def until_ready(self) -> None:
        until(lambda: AWAY in self._nodes() or self._dead(), "READY")
        assert not self._dead(), self.log
        until(lambda: "KV blocks of prefill-0 come by" in self.log, "measured")

    def _nodes(self) -> list[str]:
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=5) as reply:
                return [node["node_id"] for node in json.load(reply)["nodes"]]
        except OSError:
            return []

    def _dead(self) -> list[int]:
        return [p.pid for p in self.processes if p.poll() is not None]


@pytest.fixture
def link() -> Iterator[Joined]:
    if why := refusal():
        pytest.skip(why)
    with joined() as pair:
        yield pair


@pytest.mark.parametrize("transport", ["nixl", "bus"])
async def test_answers_are_exact_with_prefill_here_and_decode_there(
    link: Joined, reference: Reference, transport: str
) -> None:
    stack = TwoHosts(link, reference.model, transport)
    try:
        await asyncio.to_thread(stack.until_ready)
        before = link.sent_bytes
        asked = sorted(reference.expected, key=lambda one: len(one.prompt))[-PROMPTS:]
        async with Client(stack.url) as client:
            answers = await asyncio.gather(
                *(client.complete(one.prompt, max_tokens=MAX_TOKENS) for one in asked)
            )
        for one, answer in zip(asked, answers, strict=True):
            assert answer.text == one.text
            assert answer.headers["x-slipstream-path"] == f"prefill-0>{AWAY}"
        blocks = {
            tuple(one.prompt[: 16 * (index + 1)])
            for one in asked
            for index in range(len(one.prompt) // 16)
        }
        assert link.sent_bytes - before > len(blocks) * BLOCK_BYTES
        assert f"KV blocks of prefill-0 come by {transport}" in stack.log
        assert "READ" not in stack.log, stack.log
    finally:
        stack.close()
