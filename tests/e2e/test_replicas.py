"""More of one kind share its work; one of them less costs nothing but hits, and these come back."""

import asyncio
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from e2e.client import Client
from e2e.stack import Stack, ports_in_a_row, until

NODES = (
    *("scheduler", "kvindex-0", "kvindex-1", "tokenizer-0", "tokenizer-1"),
    *("frontend-0", "frontend-1", "prefill-0", "decode-0", "decode-1"),
)
"""In the order of their metrics ports."""
LENGTH = 160
BLOCKS = LENGTH // 16


class Replicas(Stack):
    """Two of everything that has no state of its own, each with metrics of its own."""

    def __init__(self) -> None:
        first = ports_in_a_row(2 + len(NODES))
        self.metrics_port = first + 2
        super().__init__(
            *(True, 2.0),
            port=first,
            metrics_port=self.metrics_port,
            **{"kvindex": 2, "tokenizer": 2, "frontend": 2, "decode": 2, "threads": 1},
        )
        self.urls = [f"http://127.0.0.1:{first + number}" for number in range(2)]

    def counts(self, name: str, *nodes: str) -> list[float]:
        """What these processes say of themselves."""
        return [self._metrics(node).get(name, 0.0) for node in nodes]

    def _metrics(self, node: str) -> dict[str, float]:
        port = self.metrics_port + NODES.index(node)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
            families = text_string_to_metric_families(reply.read().decode())
            samples = [sample for family in families for sample in family.samples]
        return {sample.name.removeprefix("slipstream_"): sample.value for sample in samples}


@pytest.fixture(scope="module")
def replicas() -> Iterator[Replicas]:
    stack = Replicas()
    yield stack
    stack.close()


def prompt(number: int) -> list[int]:
    return [(number * 7919 * (index + 1)) % 40_000 + 200 for index in range(LENGTH)] + [300, 301]


async def rounds(stack: Replicas, first: int, count: int) -> int:
    """Prompts, each asked twice, by clients that know one frontend each: cached blocks found."""
    cached = 0
    async with Client(stack.urls[0]) as one, Client(stack.urls[1]) as other:
        for number in range(first, first + count):
            clients = (one, other)
            for _ in range(2):
                asked = [
                    client.complete(prompt(2 * number + half), max_tokens=2)
                    for half, client in enumerate(clients)
                ]
                cached += sum(answer.cached_tokens // 16 for answer in await asyncio.gather(*asked))
    return cached


async def test_replicas_share_the_work(replicas: Replicas) -> None:
    assert await rounds(replicas, 0, 6) >= 6 * 2 * BLOCKS // 2
    tokenizers, frontends = ("tokenizer-0", "tokenizer-1"), ("frontend-0", "frontend-1")
    indexes = ("kvindex-0", "kvindex-1")
    assert replicas.counts("requests_total", *frontends) == [12, 12]
    streams = replicas.counts("streams_total", *tokenizers)
    assert sum(streams) == 24 and min(streams) >= 6, streams
    asked = replicas.counts("index_lookups_total", *indexes)
    assert sum(asked) >= 24 and max(asked) - min(asked) <= 2, asked
    told = replicas.counts("index_events_total", *indexes)
    assert min(told) > 0, told
    assert sum(replicas.counts("workers_in_step", *indexes)) == 3, "each worker tells one"


async def test_one_index_less_costs_hits_that_come_back(replicas: Replicas) -> None:
    victim = "kvindex-0"
    epoch = replicas.epochs()[victim]
    replicas.kill_child(victim)
    await rounds(replicas, 100, 3)  # complete() fails the test if a request fails
    await asyncio.to_thread(until, lambda: replicas.epochs().get(victim, epoch) > epoch, "it lives")

    def in_step() -> bool:
        return sum(replicas.counts("workers_in_step", "kvindex-0", "kvindex-1")) >= 3

    await asyncio.to_thread(until, in_step, "all workers tell an index")
    before = sum(replicas.counts("index_located_blocks_total", "kvindex-0", "kvindex-1"))
    assert await rounds(replicas, 200, 3) >= 3 * 2 * BLOCKS // 2
    after = sum(replicas.counts("index_located_blocks_total", "kvindex-0", "kvindex-1"))
    assert after - before >= 3 * 2 * BLOCKS, "what was asked again was found"
    await asyncio.to_thread(replicas.until_whole)
