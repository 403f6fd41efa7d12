"""Asks the frontends whether a request can be served, and says what is there once it can."""

import asyncio
import http.client
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import msgspec

from slipstream.config import format_bytes
from slipstream.types import BLOCK_TOKENS

POLL_S = 0.1
_ASK_TIMEOUT_S = 2.0
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1", "*": "127.0.0.1", "": "127.0.0.1"}


class Worker(msgspec.Struct):
    num_blocks: int = 0
    block_bytes: int = 0
    transports: dict[str, Any] | list[str] = []
    quantization: str = "none"


class Node(msgspec.Struct):
    node_id: str
    role: str = ""
    worker: Worker | None = None


class Readyz(msgspec.Struct):
    """What a frontend's /readyz answers, with 200 or with 503."""

    status: str = ""
    reason: str = ""
    model: str = ""
    max_model_len: int = 0
    nodes: list[Node] = []


class Answer(msgspec.Struct):
    ready: bool
    body: Readyz | None
    """None: nobody answered yet."""


def reachable(host: str) -> str:
    """An address that a client on this machine can use, in brackets if it needs them."""
    host = _ANY_ADDRESS.get(host, host)
    return f"[{host}]" if ":" in host else host


def ask(host: str, port: int, model: str = "") -> Answer:
    """One question to one frontend, of one model if it is named; blocks for up to two seconds."""
    connection = http.client.HTTPConnection(
        _ANY_ADDRESS.get(host, host), port, timeout=_ASK_TIMEOUT_S
    )
    try:
        connection.request("GET", "/readyz" + (f"?model={quote(model)}" if model else ""))
        response = connection.getresponse()
        body = msgspec.json.decode(response.read(), type=Readyz)
        return Answer(response.status == http.client.OK, body)
    except (OSError, http.client.HTTPException):
        return Answer(False, None)
    except msgspec.DecodeError:
        return Answer(False, Readyz(reason="its answer to /readyz is not understood"))
    finally:
        connection.close()


async def until_ready(
    host: str,
    ports: Sequence[int],
    model: str,
    expected: Collection[str],
    phase: Callable[[str], None],
) -> Readyz:
    """Waits until every frontend can serve the model and sees all of `expected`; calls `phase` with
    what is missing."""
    last = Readyz()
    for index, port in enumerate(ports):
        while True:
            answer = await asyncio.to_thread(ask, host, port, model)
            if answer.ready and answer.body is not None and not _absent(answer.body, expected):
                last = answer.body
                break
            phase(_missing(f"frontend-{index}", answer.body, expected))
            await asyncio.sleep(POLL_S)
    return last


def _missing(frontend: str, body: Readyz | None, expected: Collection[str]) -> str:
    if body is None:
        return f"waiting for {frontend}"
    absent = _absent(body, expected)
    if absent and body.nodes:
        return "waiting for " + ", ".join(absent)
    return f"waiting: {body.reason or body.status or 'not ready'}"


def _absent(body: Readyz, expected: Collection[str]) -> list[str]:
    return sorted(set(expected) - {node.node_id for node in body.nodes})


def ready_block(
    readyz: Readyz, *, url: str, model: str, folder: str, pids: Mapping[str, int],
    transports: str, redis: str, run_dir: str, seconds: float, asks_for_keys: bool = False,
) -> list[str]:  # fmt: skip
    """The lines that tell a person that it runs, what runs, and what to type next."""
    context = f", context {readyz.max_model_len} tokens" if readyz.max_model_len else ""
    rows = [("Model", f"{readyz.model or model} ({folder}{context}{_weights(readyz)})")]
    rows += _wrapped("Processes", [f"{node_id} {pid}" for node_id, pid in pids.items()], "pid ")
    rows += _kv_rows(readyz)
    rows.append(("Transports", _transports(readyz) or transports))
    rows.append(("Redis", redis))
    rows.append(("Run", run_dir))
    lines = [f"READY  {url}  in {seconds:.1f} s", ""]
    seen: set[str] = set()
    for name, value in rows:
        lines.append(f"  {'' if name in seen else name:<12}{value}")
        seen.add(name)
    body = {
        "model": readyz.model or model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "stream": True,
        "temperature": 0,
    }
    header = "-H 'Content-Type: application/json'"
    if asks_for_keys:
        header += ' -H "Authorization: Bearer $API_KEY"'
    curl = f"curl -N {url}/v1/chat/completions {header} -d '{json.dumps(body)}'"
    return [*lines, "", curl, ""]


def _weights(readyz: Readyz) -> str:
    """What was made of the weights, and by whom unless by all."""
    workers = {node.node_id: node.worker for node in readyz.nodes if node.worker is not None}
    words = []
    for kind in sorted({worker.quantization for worker in workers.values()} - {"none"}):
        having = sorted(name for name, worker in workers.items() if worker.quantization == kind)
        where = "" if len(having) == len(workers) else " in " + ", ".join(having)
        words.append(f", {kind} weights{where}")
    return "".join(words)


def _kv_rows(readyz: Readyz) -> list[tuple[str, str]]:
    rows = []
    for node in readyz.nodes:
        if node.worker is None:
            continue
        blocks = node.worker.num_blocks
        size = format_bytes(blocks * node.worker.block_bytes)
        rows.append(
            ("KV blocks", f"{node.node_id}: {blocks} = {blocks * BLOCK_TOKENS} tokens, {size}")
        )
    return sorted(rows)


def _transports(readyz: Readyz) -> str:
    names: list[str] = []
    for node in readyz.nodes:
        if node.worker is not None:
            names += [name for name in node.worker.transports if name not in names]
    return ", ".join(names)


def _wrapped(name: str, items: list[str], prefix: str) -> list[tuple[str, str]]:
    """Four to a line, so that many workers stay readable."""
    return [
        (name, ", ".join(item.replace(" ", f" {prefix}", 1) for item in items[at : at + 4]))
        for at in range(0, len(items), 4)
    ]
