"""What the pool has no room for comes back from host memory and disk, also after a restart."""

import asyncio
from pathlib import Path

from e2e.client import Client
from e2e.stack import Stack, until

PROMPT = [(7919 * index) % 40_000 + 200 for index in range(500)]
FULL = (len(PROMPT) - 1) // 16 * 16
SHOWN = ("disk_blocks", "disk_bytes")
BLOCK_BYTES = 720 << 10
ASKED = {"max_tokens": 8, "ignore_eos": True}


def unrelated(number: int) -> list[int]:
    return [(104_729 * (index + 1) * (number + 2)) % 40_000 + 200 for index in range(500)]


async def test_blocks_come_back_from_below_the_pool(tmp_path: Path) -> None:
    """Float32 blocks of the demo model have 720 KiB: room for 80 of them, and 32 for the prompt."""
    stack = Stack(
        prefill=0,
        disaggregation="never",
        max_model_len=1024,
        kv_cache_bytes="57MiB",
        offload_host_bytes="8MiB",
        offload_disk_bytes="64MiB",
        offload_dir=tmp_path,
    )
    try:
        async with Client(stack.url) as client:
            first = await client.complete(PROMPT, **ASKED)
            again = await client.complete(PROMPT, **ASKED)
            assert (first.cached_tokens, again.cached_tokens) == (0, FULL)
            await asyncio.to_thread(until, lambda: _files(tmp_path) > 10, "blocks on disk")
            for number in range(4):
                await client.complete(unrelated(number), **ASKED)
            back = await client.complete(PROMPT, **ASKED)
            assert back.cached_tokens == FULL and back.text == first.text
            await asyncio.to_thread(_until_loaded, stack, FULL // 16)
            await asyncio.to_thread(until, lambda: _hits(stack) >= FULL // 16, "hits by tier")
            tiers = {name: stack.worker(f"tier_{name}")["decode-0"] for name in SHOWN}
            assert tiers["disk_blocks"] > 0
            assert tiers["disk_bytes"] == tiers["disk_blocks"] * BLOCK_BYTES

            epoch = stack.epochs()["decode-0"]
            stack.kill_child("decode-0")
            await asyncio.to_thread(
                until, lambda: stack.epochs().get("decode-0", epoch) != epoch, "a new worker"
            )
            after = await client.complete(PROMPT, **ASKED)
            assert 0 < after.cached_tokens <= FULL, "what was on disk outlives the process"
            assert after.text == first.text
            for file in _blocks(tmp_path):
                data = bytearray(file.read_bytes())
                data[1000] ^= 1
                file.write_bytes(data)
            stack.kill_child("decode-0")
            await asyncio.to_thread(
                until, lambda: stack.epochs().get("decode-0", 0) > epoch, "a new worker"
            )
            flipped = await client.complete(PROMPT, **ASKED)
            assert flipped.text == first.text and flipped.cached_tokens == 0
        stack.close()
    finally:
        stack.kill()


def _blocks(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and file.name.count("-") == 2]


def _files(folder: Path) -> int:
    return len(_blocks(folder))


def _hits(stack: Stack) -> float:
    return sum(sum(stack.worker(f"tier_loaded_{tier}_total").values()) for tier in ("host", "disk"))


def _until_loaded(stack: Stack, count: int) -> None:
    until(lambda: sum(stack.worker("blocks_loaded_total").values()) >= count, "loaded blocks")
