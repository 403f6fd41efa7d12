"""A model in two processes: the same tokens as in one, blocks in two parts with one digest."""

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from xxhash import xxh3_128_digest

from engine.tiny import admission, generate, greedy, prompt_of
from slipstream.core.machine import (
    BatchDone,
    BatchPlan,
    BlocksDigested,
    DigestBlocks,
    Event,
    PullBlocks,
    PullDone,
    Row,
    RunBatch,
)
from slipstream.decode.config import DecodeConfig
from slipstream.engine.executor import WorkerExecutor
from slipstream.engine.model_config import ModelConfig, ModelError
from slipstream.engine.runner import Runner, allocate_pool
from slipstream.engine.team import Team, as_seen_by, combined, joined
from slipstream.engine.worker_parts import (
    load_runner,
    make_pool,
    make_transports,
    plan_of,
    pool_tensor,
    room_of,
)
from slipstream.kv.digest import block_digests
from slipstream.kv.segment import segment_path
from slipstream.messages import NodeInfo, WorkerInfo
from slipstream.types import Role, SamplingParams

Saved = Callable[[str], tuple[Path, PreTrainedModel]]
WAIT_S = 60.0
WARM = SamplingParams(max_tokens=99, seed=11, temperature=1.3, top_p=0.95)
BLOCKS = 40


class Worker:
    """Rank 0 in this process, rank 1 in another one."""

    def __init__(self, folder: Path, model: Path, node_id: str = "decode-0") -> None:
        (folder / "run").mkdir(exist_ok=True)
        (folder / "shm").mkdir(exist_ok=True)
        self.config = DecodeConfig(
            model=str(model),
            node_id=node_id,
            run_dir=str(folder / "run"),
            shm_dir=str(folder / "shm"),
            listen=f"ipc://{folder}/run/{node_id}.sock",
            transports="shm,bus",
            tensor_parallel_size=2,
            threads=1,
            device="cpu",
        )
        self.lost: list[str] = []
        plan = plan_of(self.config, ModelConfig.read(model))
        self.team = Team(
            self.config, 7, torch.device("cpu"), lambda line, code: self.lost.append(line)
        )
        ways = self.team.ranks, self.team.tell
        self.runner = load_runner(self.config, plan, plan.device, *ways)
        room = self.team.least_room(room_of(self.config, plan, None).num_bytes)
        assert room > 0
        self.segment = make_pool(self.config, plan, 7, BLOCKS)
        self.transports = make_transports(self.config, self.segment)
        self.rank_transports = self.team.make_pools(BLOCKS)
        self.runner.attach(pool_tensor(plan, self.segment))
        self.peers: dict[str, NodeInfo] = {}
        self.executor = WorkerExecutor(
            *(self.runner, self.segment.blocks, self.transports, lambda: self.peers),
            team=self.team,
        )
        self.events: asyncio.Queue[Event] = asyncio.Queue()

    def info(self, node_id: str) -> NodeInfo:
        words = self.segment.header
        return NodeInfo(
            node_id=node_id,
            role=Role.DECODE,
            epoch=7,
            address="",
            worker=WorkerInfo(
                model="toy",
                kv_layout_id=words.kv_layout_id,
                num_blocks=BLOCKS,
                block_bytes=words.block_bytes,
                max_model_len=64,
                vocab_size=10,
                max_num_seqs=4,
                prefill_budget_tokens=16,
                accept_decode=True,
                transports=self.transports.advertise(),
                rank_transports=self.rank_transports,
            ),
        )

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        post = self.events.put_nowait
        await self.executor.start(lambda event: loop.call_soon_threadsafe(post, event))

    async def next(self, kind: type[Event]) -> Event:
        while True:
            event = await asyncio.wait_for(self.events.get(), WAIT_S)
            if isinstance(event, kind):
                return event

    def close(self) -> None:
        self.team.close()
        self.transports.close()
        self.segment.close()
        self.team.ranks.close()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Callable[[Path], Worker]]:
    made: list[Worker] = []

    def make(model: Path) -> Worker:
        made.append(Worker(tmp_path, model))
        return made[-1]

    yield make
    for each in made:
        each.close()


def alone(folder: Path) -> Runner:
    layout = ModelConfig.read(folder).kv_layout("float32")
    return Runner(folder, "float32", allocate_pool(layout, 64).fill_(torch.nan), threads=2)


@pytest.mark.parametrize("case", ["llama_biases", "qwen3", "qwen2_moe", "mixtral_even"])
def test_two_ranks_make_the_tokens_of_one(
    saved: Saved, worker: Callable[[Path], Worker], case: str
) -> None:
    """Whole and in chunks, greedy and warm, on a prefix of its own and on blocks of another."""
    folder, _ = saved(case)
    prompt = prompt_of(37)
    ranks = worker(folder).runner
    for sampling in (greedy(), WARM):
        expected = generate(alone(folder), prompt, sampling, 16)
        assert len(set(expected)) > 4
        assert generate(ranks, prompt, sampling, 16) == expected
        assert generate(ranks, prompt, sampling, 9, accepted=expected[:7]) == expected[7:]
        admit = (admission("c", prompt, sampling),)
        chunks = [
            Row("c", 1, prompt[:16], 0, (30, 31, 32), False),
            Row("c", 1, prompt[16:32], 16, (30, 31, 32), False),
            Row("c", 1, prompt[32:], 32, (30, 31, 32), True),
        ]
        for step, row in enumerate(chunks):
            made = ranks.run(BatchPlan(step, (row,), admit if step == 0 else ()))
        assert made[0].tokens == expected[:1]
        cached = Row("d", 1, prompt[32:], 32, (30, 31, 33), True)
        (output,) = ranks.run(BatchPlan(9, (cached,), (admission("d", prompt, sampling),)))
        assert output.tokens == expected[:1]
        ranks.run(BatchPlan(10, (), dropped=(("c", 1), ("d", 1))))


def flip(file: Path, at: int) -> None:
    with file.open("r+b") as memory:
        memory.seek(at)
        (byte,) = memory.read(1)
        memory.seek(at)
        memory.write(bytes([byte ^ 1]))


def test_a_chunk_that_draws_nothing_has_ended_for_all_ranks(
    saved: Saved, worker: Callable[[Path], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last sums are empty: nobody waits in them for the other's blocks, which are announced
    when the step is over."""
    made, met = worker(saved("llama")[0]), list[int]()
    meet = made.team.ranks.meet
    monkeypatch.setattr(made.team.ranks, "meet", lambda: (met.append(1), meet()))
    prompt = prompt_of(37)
    admitted = (admission("a", prompt, greedy()),)
    made.runner.run(BatchPlan(1, (Row("a", 1, prompt[:32], 0, (1, 2, 3), False),), admitted))
    assert len(met) == 1
    (output,) = made.runner.run(BatchPlan(2, (Row("a", 1, prompt[32:], 32, (1, 2, 3), True),)))
    assert output.tokens == generate(alone(saved("llama")[0]), prompt, greedy(), 1)
    assert len(met) == 1


async def test_blocks_move_in_parts_and_have_one_digest(
    saved: Saved, worker: Callable[[Path], Worker]
) -> None:
    """From this worker to itself under another name, each rank from its like; then a part that is
    not what it was, in the other rank's memory."""
    folder, _ = saved("llama")
    prompt, theirs, ours = prompt_of(37), (4, 5, 6), (9, 2, 13)
    expected = generate(alone(folder), prompt, greedy(), 6)
    made = worker(folder)
    await made.start()
    made.peers["source"] = made.info("source")
    row = Row("a", 1, prompt, 0, theirs, True)
    plan = BatchPlan(1, (row,), (admission("a", prompt, greedy()),), digest_blocks=theirs)
    made.executor.execute(RunBatch(plan))
    computed = await made.next(BatchDone)
    assert isinstance(computed, BatchDone)
    own = block_digests(made.segment.blocks, theirs)
    assert all(computed.digests[b] != part for b, part in zip(theirs, own, strict=True))
    made.executor.execute(DigestBlocks("again", theirs))
    again = await made.next(BlocksDigested)
    assert again == BlocksDigested("again", tuple(computed.digests[b] for b in theirs))

    made.executor.execute(PullBlocks("p", "source", 7, theirs, ours, WAIT_S))
    done = await made.next(PullDone)
    assert isinstance(done, PullDone) and done.error is None
    assert done.digests == again.digests
    tokens = list(computed.outputs[0].tokens)
    for step in range(1, 6):
        row = Row("b", 1, (tokens[-1],), 36 + step, (*ours, 0), True, step)
        admitted = (admission("b", (*prompt, *tokens), greedy(), 37),) if step == 1 else ()
        made.executor.execute(RunBatch(BatchPlan(step + 1, (row,), admitted)))
        landed = await made.next(BatchDone)
        assert isinstance(landed, BatchDone)
        tokens += landed.outputs[0].tokens
    assert tuple(tokens) == expected

    part = segment_path(made.config.shm_dir, made.config.run_dir, "decode-0.r1", 7)
    flip(part, 4096 + 5 * made.segment.header.block_bytes + 100)
    made.executor.execute(PullBlocks("q", "source", 7, theirs, ours, WAIT_S))
    done = await made.next(PullDone)
    assert isinstance(done, PullDone) and done.error is None
    same = [x == y for x, y in zip(done.digests, again.digests or (), strict=True)]
    assert same == [True, False, True]

    made.peers["source"] = as_seen_by(9, made.info("source"))
    made.executor.execute(PullBlocks("r", "source", 8, theirs, ours, WAIT_S))
    failed = await made.next(PullDone)
    assert isinstance(failed, PullDone) and failed.error == "epoch" and failed.digests == ()
    await made.executor.close()


def test_a_rank_that_dies_ends_the_worker(saved: Saved, worker: Callable[[Path], Worker]) -> None:
    made = worker(saved("llama")[0])
    (process,) = (each._process for each in made.team._ranks)
    process.send_signal(signal.SIGKILL)
    until_s = time.monotonic() + WAIT_S
    while not made.lost and time.monotonic() < until_s:
        time.sleep(0.01)
    (line,) = made.lost
    assert line == "slipstream decode: rank 1 is gone, and with it this worker"


def test_ends_of_parts_come_to_one() -> None:
    parts = ((b"a", b"b"), (b"c", b"d"))
    good = [PullDone("p", part, None, "shm", 1.0 + i) for i, part in enumerate(parts)]
    whole = combined(good)
    assert whole == PullDone(
        "p", (xxh3_128_digest(b"ac"), xxh3_128_digest(b"bd")), None, "shm", 2.0
    )
    late = PullDone("p", (), "timeout", "bus", 3.0)
    assert combined([good[0], late]) == combined([late, good[0]]) == late
    none = BlocksDigested("d", None)
    assert combined([BlocksDigested("d", (b"a",)), none]) == none
    assert joined([(), ()]) == ()


def test_what_cannot_be_divided_is_refused(saved: Saved) -> None:
    config = ModelConfig.read(saved("llama_one_kv_head")[0])
    with pytest.raises(ModelError, match=r"--tensor-parallel-size 2: .*num_heads is 7; give"):
        config.part(2)
    with pytest.raises(ModelError, match="--tensor-parallel-size 2: the model has 5 experts; give"):
        ModelConfig.read(saved("mixtral")[0]).part(2)
    whole = config.kv_layout("float32")
    assert whole.layout_id("0" * 16, "none", 2) == whole.layout_id("0" * 16) + "/tp2"
