"""A router that is not ours follows a real worker by vLLM's KV events."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from e2e.client import Client
from e2e.stack import Stack

PROMPT = [(7919 * index) % 40_000 + 200 for index in range(100)]
END = (-1).to_bytes(8, "big", signed=True)


@pytest.fixture
def told() -> Iterator[tuple[Stack, Path]]:
    """A stack of one worker that publishes, and the folder of its two sockets."""
    with tempfile.TemporaryDirectory(prefix="slip-kv-", dir="/tmp") as folder:
        settings = Path(folder) / "slipstream.toml"
        settings.write_text(
            f'[decode]\nkv_events_endpoint = "ipc://{folder}/pub"\n'
            f'kv_events_replay_endpoint = "ipc://{folder}/past"\n'
        )
        sizes = {"prefill": 0, "kvindex": 0, "disaggregation": "never"}
        stack = Stack(config=settings, **sizes)
        yield stack, Path(folder)
        stack.close()


async def test_events_tell_what_the_worker_caches(told: tuple[Stack, Path]) -> None:
    stack, folder = told
    context = zmq.Context()
    live = context.socket(zmq.SUB)
    live.setsockopt(zmq.SUBSCRIBE, b"kv@decode-0@")
    live.setsockopt(zmq.RCVTIMEO, 30_000)
    live.connect(f"ipc://{folder}/pub")
    async with Client(stack.url) as client:
        await client.complete(PROMPT, max_tokens=2)
        topic, number, payload = live.recv_multipart()
        assert topic == b"kv@decode-0@smollm2-135m-instruct"
        past = context.socket(zmq.DEALER)
        past.setsockopt(zmq.RCVTIMEO, 30_000)
        past.connect(f"ipc://{folder}/past")
        past.send_multipart([b"", (0).to_bytes(8, "big")])
        kept = []
        while (frames := past.recv_multipart())[2] != END:
            kept.append(frames[1:])
    context.destroy(linger=0)
    assert [topic, number, payload] in kept
    assert [int.from_bytes(seq, "big") for _, seq, _ in kept] == list(range(len(kept)))
    events = [event for _, _, batch in kept for event in msgspec.msgpack.decode(batch)[1]]
    assert events[0] == {"type": "AllBlocksCleared"}
    tokens = [token for event in events[1:] for token in event["token_ids"]]
    assert tokens == PROMPT[:96]
    parents = [None, *(event["block_hashes"][-1] for event in events[1:])]
    assert [event["parent_block_hash"] for event in events[1:]] == parents[:-1]
