"""Effects of a worker end as exactly one event each, also when everything goes wrong."""

import asyncio
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from engine.tiny import admission, generate, greedy, prompt_of
from slipstream.config import StartError
from slipstream.core.machine import (
    AdapterRead,
    BatchDone,
    BatchFailed,
    BatchPlan,
    BlocksDigested,
    Counted,
    DigestBlocks,
    DropAdapter,
    Event,
    Exit,
    LoadAdapter,
    PullBlocks,
    PullDone,
    Row,
    RowOutput,
    RunBatch,
)
from slipstream.decode.config import DecodeConfig
from slipstream.engine import executor as executor_module
from slipstream.engine import transfers as transfers_module
from slipstream.engine.executor import WorkerExecutor
from slipstream.engine.gpu import choose_device
from slipstream.engine.model_config import ModelConfig
from slipstream.engine.runner import Runner
from slipstream.engine.sizing import (
    Room,
    choose_dtype,
    choose_model_len,
    gpu_room,
    gpu_share,
    host_room,
    size_pool,
)
from slipstream.engine.step_loop import Made, Step, StepRunner
from slipstream.errors import ErrorCode, Problem
from slipstream.kv.choice import Transports
from slipstream.kv.digest import block_digests
from slipstream.kv.segment import SegmentHeader, create_segment
from slipstream.kv.shm import ShmTransport
from slipstream.kv.transport import Digests, Read, TransferError
from slipstream.messages import AdapterInfo, NodeInfo, WorkerInfo
from slipstream.prefill.config import PrefillConfig
from slipstream.types import Role

WAIT_S = 30.0
BLOCKS, BLOCK_BYTES = 8, 4096


class Side:
    """One worker: a pool in a segment, its executor, and the events that it has posted."""

    def __init__(
        self,
        folder: Path,
        node_id: str,
        make_runner: Callable[[np.ndarray], StepRunner],
        num_blocks: int = BLOCKS,
        block_bytes: int = BLOCK_BYTES,
        adapters: Any = None,
    ):
        header = SegmentHeader(
            kv_layout_id="x", epoch=3, num_blocks=num_blocks, block_bytes=block_bytes
        )
        self.segment = create_segment(folder / node_id, header)
        self.blocks = self.segment.blocks
        self.transports = Transports([ShmTransport(self.segment)], "x", block_bytes, "here")
        self.peers: dict[str, NodeInfo] = {}
        self.executor = WorkerExecutor(
            *(make_runner(self.blocks), self.blocks, self.transports, lambda: self.peers),
            adapters=adapters,
        )
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.info = NodeInfo(
            node_id=node_id,
            role=Role.DECODE,
            epoch=3,
            address="",
            host="here",
            worker=WorkerInfo(
                model="toy",
                kv_layout_id="x",
                num_blocks=num_blocks,
                block_bytes=block_bytes,
                max_model_len=64,
                vocab_size=10,
                max_num_seqs=4,
                prefill_budget_tokens=16,
                accept_decode=True,
                transports=self.transports.advertise(),
            ),
        )

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        await self.executor.start(
            lambda event: loop.call_soon_threadsafe(self.events.put_nowait, event)
        )

    async def next(self) -> Event:
        return await asyncio.wait_for(self.events.get(), WAIT_S)

    async def close(self) -> None:
        await self.executor.close()
        self.segment.close()


class Scripted:
    """Writes the step's number into every block, or raises."""

    def __init__(self, blocks: np.ndarray):
        self.blocks = blocks

    def waits(self, plan: BatchPlan) -> bool:
        return True

    def launch(self, plan: BatchPlan) -> Step:
        if plan.step < 0:
            raise RuntimeError(f"no\nstep {plan.step}")
        self.blocks[:] = plan.step
        return Made((RowOutput("r", 1, (plan.step,)),))


class Shelf:
    """An `AdapterBook` that notes who calls; some of its adapters are trouble."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, str]] = []

    def _note(self, call: str, name: str) -> None:
        self.calls.append((call, name, threading.current_thread().name.partition("_")[0]))

    def read(self, name: str, path: str) -> AdapterRead:
        self._note("read", name)
        if name == "odd":
            raise RuntimeError("the disk\nis gone")
        if name == "wrong":
            problem = Problem(code=ErrorCode.INVALID_VALUE, message="no")
            return AdapterRead(name, path, problem=problem)
        return AdapterRead(name, path, AdapterInfo(adapter_id=f"{name}@1", name=name, path=path))

    def put(self, adapter_id: str) -> None:
        self._note("put", adapter_id)
        if adapter_id == "large@1":
            raise RuntimeError("out of memory")

    def leave(self, adapter_id: str) -> int | None:
        self._note("leave", adapter_id)
        return 7

    def drop(self, adapter_id: str, place: int | None) -> None:
        assert place == 7
        self._note("drop", adapter_id)


async def test_an_adapter_is_read_beside_the_steps_and_put_between_them(tmp_path: Path) -> None:
    """Each load ends as one event, whatever happens."""
    shelf = Shelf()
    side = Side(tmp_path, "d", Scripted, adapters=shelf)
    await side.start()
    for name in ("good", "odd", "wrong", "large"):
        side.executor.execute(LoadAdapter(name, "/x"))
        read = await side.next()
        assert isinstance(read, AdapterRead) and (read.name, read.path) == (name, "/x")
        assert (read.adapter is None) == (name != "good")
        assert (read.problem is None) == (name == "good")
        if name in ("odd", "large"):
            assert read.problem is not None and "\n" not in read.problem.message
            assert read.problem.code is ErrorCode.INTERNAL and name in read.problem.message
    side.executor.execute(DropAdapter("good@1"))
    side.executor.execute(RunBatch(BatchPlan(1, ())))
    assert isinstance(await side.next(), BatchDone)
    await side.close()
    assert shelf.calls == [
        ("read", "good", "adapters"),
        ("put", "good@1", "compute"),
        ("read", "odd", "adapters"),
        ("read", "wrong", "adapters"),
        ("read", "large", "adapters"),
        ("put", "large@1", "compute"),
        ("leave", "large@1", "compute"),
        ("drop", "large@1", "compute"),
        ("leave", "good@1", "MainThread"),
        ("drop", "good@1", "compute"),
    ]


async def test_steps_run_in_order_and_digests_follow_the_writes(tmp_path: Path) -> None:
    side = Side(tmp_path, "d", Scripted)
    await side.start()
    for step in (1, -2, 3):
        side.executor.execute(RunBatch(BatchPlan(step, (), digest_blocks=(2, 5))))
    first, second, third = [await side.next() for _ in range(3)]
    assert isinstance(first, BatchDone) and isinstance(third, BatchDone)
    (expected,) = block_digests(np.full((1, BLOCK_BYTES), 1, np.uint8), [0])
    assert first.digests == {2: expected, 5: expected}
    assert first.outputs == (RowOutput("r", 1, (1,)),)
    assert third.digests != first.digests
    assert second == BatchFailed(-2, "RuntimeError: no step -2")
    statistics = side.executor.statistics()
    assert statistics["steps_total"] == statistics["tokens_total"] == 2
    assert statistics["steps_failed_total"] == 1
    await side.close()


async def test_what_is_counted_is_told_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor_module, "COUNTED_PERIOD_S", 0.01)
    side = Side(tmp_path, "d", Scripted)
    await side.start()
    side.executor.execute(RunBatch(BatchPlan(1, ())))
    told = await side.next()
    while not (isinstance(told, Counted) and told.values.get("steps_total")):
        told = await side.next()
    assert told.values.keys() == side.executor.statistics().keys()
    await side.close()


async def test_what_is_in_steps_is_counted(tmp_path: Path) -> None:
    side = Side(tmp_path, "d", Scripted)
    await side.start()
    prompt = Row("r", 1, (5, 6, 7), 0, (0,), sample=True)
    stream = Row("s", 1, (8,), 20, (1, 2), sample=True)
    side.executor.execute(RunBatch(BatchPlan(1, (prompt, stream))))
    assert isinstance(await side.next(), BatchDone)
    statistics = side.executor.statistics()
    names = ("step_rows_total", "prompt_tokens_total", "tokens_total")
    assert [statistics[name] for name in names] == [2, 3, 1]
    await side.close()


async def test_a_digest_of_no_block_fails_the_step(tmp_path: Path) -> None:
    side = Side(tmp_path, "d", Scripted)
    await side.start()
    side.executor.execute(RunBatch(BatchPlan(1, (), digest_blocks=(BLOCKS,))))
    assert isinstance(await side.next(), BatchFailed)
    await side.close()


async def test_local_blocks_are_digested(tmp_path: Path) -> None:
    side = Side(tmp_path, "d", Scripted)
    side.blocks[:] = np.random.default_rng(1).integers(0, 256, side.blocks.shape, np.uint8)
    await side.start()
    side.executor.execute(DigestBlocks("o", (7, 0)))
    assert await side.next() == BlocksDigested("o", block_digests(side.blocks, (7, 0)))
    await side.close()


async def test_digests_that_cannot_be_made_end_as_an_event(tmp_path: Path) -> None:
    side = Side(tmp_path, "d", Scripted)
    await side.start()
    side.executor.execute(DigestBlocks("o", (7, BLOCKS)))
    assert await side.next() == BlocksDigested("o", None)
    side.executor.execute(DigestBlocks("p", (7,)))
    assert await side.next() == BlocksDigested("p", block_digests(side.blocks, (7,)))
    await side.close()


def pull(pull_id: str = "p", epoch: int = 3, timeout_s: float = WAIT_S) -> PullBlocks:
    return PullBlocks(pull_id, "source", epoch, (4, 5, 6), (1, 2, 3), timeout_s)


async def test_a_read_ends_with_the_digests_of_the_local_bytes(tmp_path: Path) -> None:
    source, side = Side(tmp_path, "source", Scripted), Side(tmp_path, "d", Scripted)
    source.blocks[:] = np.random.default_rng(1).integers(0, 256, source.blocks.shape, np.uint8)
    side.peers["source"] = source.info
    await side.start()
    side.executor.execute(pull())
    done = await side.next()
    assert isinstance(done, PullDone) and done.error is None
    assert done.digests == block_digests(source.blocks, (4, 5, 6))
    assert done.transport == "shm" and done.elapsed_s > 0
    assert (side.blocks[1:4] == source.blocks[4:7]).all()
    assert side.executor.statistics()["transfer_shm_bytes_total"] == 3 * BLOCK_BYTES
    await side.close()
    await source.close()


@pytest.mark.parametrize(
    ("known", "effect", "cause"),
    [
        (False, pull(), "epoch"),
        (True, pull(epoch=2), "epoch"),
        (True, pull(timeout_s=0.0), "timeout"),
        (True, msgspec.structs.replace(pull(), source_blocks=(1, 2, BLOCKS)), "range"),
    ],
)
async def test_a_failed_read_ends_with_its_cause(
    tmp_path: Path, known: bool, effect: PullBlocks, cause: str
) -> None:
    source, side = Side(tmp_path, "source", Scripted), Side(tmp_path, "d", Scripted)
    if known:
        side.peers["source"] = source.info
    await side.start()
    side.executor.execute(effect)
    done = await side.next()
    assert isinstance(done, PullDone)
    assert (done.pull_id, done.error, done.digests) == ("p", cause, ())
    names = [name for name in side.executor.statistics() if f"failures_{cause}" in name]
    assert len(names) == 1
    await side.close()
    await source.close()


class Held:
    """A transport whose READs end when it is told to, as it is told to."""

    name = "shm"

    def __init__(self) -> None:
        self.reads: queue.SimpleQueue[Read] = queue.SimpleQueue()
        self.error: Exception | None = None
        self.held: list[Read] = []

    def advertise(self) -> str:
        return ""

    def connect(self, peer: NodeInfo) -> None:
        pass

    def read(self, read: Read) -> None:
        if self.error is not None:
            raise self.error
        self.reads.put(read)
        self.held.append(read)

    def forget(self, node_id: str) -> None:
        pass

    def close(self) -> None:
        while self.held:
            self.held.pop().done(TransferError("closed"))


def held(side: Side, source: Side, monkeypatch: pytest.MonkeyPatch) -> Held:
    """Of a side that knows the source and does not measure it."""
    transport = Held()
    side.peers["source"] = source.info
    side.executor._transfers._transports = Transports([transport], "x", BLOCK_BYTES, "here")
    monkeypatch.setattr(Transports, "due", lambda *_: False)
    return transport


async def test_no_read_waits_for_another_and_each_ends_when_its_transport_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More READs that hang than there are threads; one that does not is done."""
    side, source = Side(tmp_path, "d", Scripted), Side(tmp_path, "source", Scripted)
    transport = held(side, source, monkeypatch)
    await side.start()
    count = 3 * transfers_module.TRANSFER_THREADS
    for number in range(count):
        side.executor.execute(pull(str(number)))
    reads = [await asyncio.to_thread(transport.reads.get, True, WAIT_S) for _ in range(count)]
    assert side.events.empty()
    results: list[Digests | TransferError] = [(b"d",), TransferError("timeout")]
    for read, result in zip(reversed(reads), results, strict=False):
        transport.held.remove(read)
        read.done(result)
    first, second = await side.next(), await side.next()
    assert isinstance(first, PullDone) and isinstance(second, PullDone)
    assert (first.digests, first.error) == ((b"d",), None)
    assert (second.digests, second.error) == ((), "timeout")
    await side.close()  # ends the others
    ended = [side.events.get_nowait() for _ in range(count - 2)]
    assert all(isinstance(event, PullDone) and event.error == "closed" for event in ended)
    assert side.events.empty()
    await source.close()


async def test_a_transport_that_raises_ends_the_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side, source = Side(tmp_path, "d", Scripted), Side(tmp_path, "source", Scripted)
    transport = held(side, source, monkeypatch)
    await side.start()
    for error, cause in ((RuntimeError("what?"), "internal"), (TransferError("attach"), "attach")):
        transport.error = error
        side.executor.execute(pull())
        done = await side.next()
        assert isinstance(done, PullDone) and done.error == cause
    await side.close()
    await source.close()


async def test_a_peer_is_measured_before_anybody_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers_module, "SWEEP_PERIOD_S", 0.01)
    source, side = Side(tmp_path, "source", Scripted), Side(tmp_path, "d", Scripted)
    side.peers |= {"source": source.info, "d": side.info}
    before, loop = side.blocks.copy(), asyncio.get_running_loop()
    measured, measure = asyncio.Event(), side.transports.measure

    def measure_and_tell(peer: NodeInfo) -> None:
        measure(peer)
        loop.call_soon_threadsafe(measured.set)

    monkeypatch.setattr(side.transports, "measure", measure_and_tell)
    await side.start()
    await asyncio.wait_for(measured.wait(), WAIT_S)
    assert side.executor.statistics()["transfer_shm_gbps"] > 0
    assert side.transports.peers == {"source": 3}
    assert (side.blocks == before).all()
    await side.close()
    await source.close()


async def test_an_error_while_looking_at_peers_is_not_the_last_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers_module, "SWEEP_PERIOD_S", 0.01)
    side, looked = Side(tmp_path, "d", Scripted), asyncio.Event()
    errors = [RuntimeError("nobody foresaw this")]

    def directory() -> dict[str, NodeInfo]:
        if errors:
            raise errors.pop()
        looked.set()
        return {}

    side.executor._transfers._directory = directory
    await side.start()
    await asyncio.wait_for(looked.wait(), WAIT_S)
    await side.close()


async def test_a_dead_peer_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers_module, "SWEEP_PERIOD_S", 0.01)
    source, side = Side(tmp_path, "source", Scripted), Side(tmp_path, "d", Scripted)
    side.peers["source"] = source.info
    forgotten, loop, forget = asyncio.Event(), asyncio.get_running_loop(), side.transports.forget

    def forget_and_tell(node_id: str) -> None:
        forget(node_id)
        loop.call_soon_threadsafe(forgotten.set)

    monkeypatch.setattr(side.transports, "forget", forget_and_tell)
    await side.start()
    side.executor.execute(pull())
    await side.next()
    assert side.transports.peers == {"source": 3}
    del side.peers["source"]
    await asyncio.wait_for(forgotten.wait(), WAIT_S)
    assert not side.transports.peers
    await side.close()
    await source.close()


async def test_an_effect_of_another_service_is_a_bug(tmp_path: Path) -> None:
    side = Side(tmp_path, "d", Scripted)
    with pytest.raises(TypeError, match="Exit"):
        side.executor.execute(Exit())
    await side.close()


async def test_a_stream_goes_on_from_blocks_that_were_read(
    tmp_path: Path, saved: Callable[[str], tuple[Path, object]]
) -> None:
    """Prompt computed on one side, read by the other, continued there: the tokens of one runner."""
    folder, _ = saved("llama")
    layout = ModelConfig.read(folder).kv_layout("float32")
    prompt = prompt_of(37)

    def runner(blocks: np.ndarray) -> Runner:
        pool = torch.frombuffer(blocks, dtype=torch.float32).view(-1, *layout.block_shape)
        return Runner(folder, "float32", pool)

    lone = torch.zeros((40, *layout.block_shape))
    expected = generate(Runner(folder, "float32", lone), prompt, greedy(), 12)
    source = Side(tmp_path, "source", runner, 16, layout.block_bytes)
    side = Side(tmp_path, "d", runner, 16, layout.block_bytes)
    await source.start()
    await side.start()
    side.peers["source"] = source.info

    theirs, ours = (4, 5, 6), (9, 2, 13)
    row = Row("a", 1, prompt, 0, theirs, True)
    plan = BatchPlan(1, (row,), (admission("a", prompt, greedy()),), digest_blocks=theirs)
    source.executor.execute(RunBatch(plan))
    computed = await source.next()
    assert isinstance(computed, BatchDone)
    side.executor.execute(PullBlocks("p", "source", 3, theirs, ours, WAIT_S))
    done = await side.next()
    assert isinstance(done, PullDone)
    assert done.digests == tuple(computed.digests[b] for b in theirs)

    tokens = list(computed.outputs[0].tokens)
    for step in range(1, 12):
        row = Row("a", 1, (tokens[-1],), 36 + step, (*ours, 0), True, step)
        admitted = (admission("a", (*prompt, *tokens), greedy(), 37),) if step == 1 else ()
        side.executor.execute(RunBatch(BatchPlan(step, (row,), admitted)))
        done = await side.next()
        assert isinstance(done, BatchDone)
        tokens += done.outputs[0].tokens
    assert tuple(tokens) == expected
    await side.close()
    await source.close()


def config(**changes: object) -> DecodeConfig:
    return DecodeConfig(model="m", **changes)  # type: ignore[arg-type]


def test_auto_is_half_precision_only_where_it_is_native() -> None:
    modern, plain = frozenset({"fma", "avx512_bf16"}), frozenset({"fma", "avx512f"})
    assert choose_dtype("auto", "bfloat16", modern) == "bfloat16"
    assert choose_dtype("auto", "float16", frozenset({"amx_bf16"})) == "bfloat16"
    assert choose_dtype("auto", "bfloat16", plain) == "float32"
    assert choose_dtype("auto", "float32", modern) == "float32"
    assert choose_dtype("bfloat16", "float32", plain) == "bfloat16"
    assert choose_dtype("float32", "bfloat16", modern) == "float32"


def test_the_models_length_is_the_longest(saved: Callable[[str], tuple[Path, object]]) -> None:
    model = ModelConfig.read(saved("llama")[0])
    assert choose_model_len(config(), model) == 512
    assert choose_model_len(config(max_model_len=100), model) == 100
    with pytest.raises(StartError, match=r"--max-model-len 513.*512") as raised:
        choose_model_len(config(max_model_len=513), model)
    assert raised.value.exit_code == 3


GIB = 1 << 30
MIB = 1 << 20


@pytest.mark.parametrize(
    ("settings", "max_model_len", "memory", "shm", "blocks"),
    [
        ({"kv_cache_bytes": 100 * MIB}, 1600, 0, 0, 100),  # asked for: no other limit
        ({}, 8192, 100 * GIB, 100 * GIB, 64 * 64),  # 1024 tokens for each of 64
        ({}, 800, 100 * GIB, 100 * GIB, 64 * 50),  # no more than they can use
        ({"max_num_seqs": 1}, 8192, 100 * GIB, 100 * GIB, 512),  # one request must fit
        ({}, 8192, 8 * GIB, 100 * GIB, 1024),  # an eighth
        ({}, 8192, 100 * GIB, 2 * GIB, 1024),  # a half
    ],
)
def test_size_of_the_pool(
    settings: dict[str, int], max_model_len: int, memory: int, shm: int, blocks: int
) -> None:
    given = config(**settings)
    size = size_pool(given, MIB, max_model_len, host_room(given, memory, shm))
    assert size == (blocks, max_model_len, 0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"kv_cache_bytes": 99 * MIB, "max_model_len": 1600},
            r"--kv-cache-bytes 99MiB .*1600 tokens needs 100MiB; lower --max-model-len or raise",
        ),
        (
            {"max_model_len": 1600},
            r"^slipstream decode: 50MiB .*automatically.* 1600 tokens needs 100MiB",
        ),
        ({"kv_cache_bytes": MIB - 1}, r"too little: one request of 16 tokens needs 1MiB; raise"),
    ],
)
def test_a_pool_for_less_than_one_request_is_refused(settings: dict[str, int], words: str) -> None:
    given = config(**settings)
    with pytest.raises(StartError, match=words) as raised:
        size_pool(given, MIB, 1600, host_room(given, 400 * MIB, GIB))
    assert raised.value.exit_code == 6
    assert "\n" not in str(raised.value)


def test_a_length_that_nobody_asked_for_is_what_fits() -> None:
    for settings in ({"kv_cache_bytes": 50 * MIB}, {}):
        given = config(**settings)
        size = size_pool(given, MIB, 1600, host_room(given, 400 * MIB, GIB))
        assert size == (50, 800, 1600)


def test_a_gpu_is_divided_by_configuration() -> None:
    """What is left of a worker's share is its pool, all of it; a share that is not free is
    refused."""
    given = config(gpu_memory_share=0.45)
    share = gpu_share(given, "cuda:0", free=72 * GIB, total=144 * GIB)
    assert share == int(0.45 * 144 * GIB)
    room = gpu_room(given, "cuda:0", share, peak=20 * GIB)
    assert room.num_bytes == share - 21 * GIB - given.lora_bytes
    without = gpu_room(config(max_loras=0), "cuda:0", share, peak=20 * GIB)
    assert without.num_bytes == share - 21 * GIB
    assert size_pool(given, MIB, 1600, room).num_blocks == room.num_bytes // MIB
    assert gpu_share(config(), "cuda:0", free=144 * GIB, total=144 * GIB) == int(0.9 * 144 * GIB)
    words = r"cuda:0 has 40GiB free of 144GiB, --gpu-memory-share 0.45 asks .* give 0.27 or less"
    with pytest.raises(StartError, match=words) as raised:
        gpu_share(given, "cuda:0", free=40 * GIB, total=144 * GIB)
    assert raised.value.exit_code == 6
    full = gpu_room(given, "cuda:0", share, peak=90 * GIB)
    with pytest.raises(StartError, match=r"0B of cuda:0 .* is too little"):
        size_pool(given, MIB, 1600, full)
    assert isinstance(full, Room) and full.num_bytes == 0


def test_a_worker_names_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def device(wanted: str, rank: int = 0, **changes: object) -> str:
        return str(choose_device(config(device=wanted, **changes), rank))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device(x) for x in ("auto", "cuda", "cuda:1", "auto:1", "cpu")] == [
        *("cuda:0", "cuda:0", "cuda:1", "cuda:1", "cpu")
    ]
    assert device("cuda", 1, tensor_parallel_size=2) == "cuda:1"
    words = r"--device cuda:1 with --tensor-parallel-size 2: torch sees 2 GPUs; give a number below"
    with pytest.raises(StartError, match=words):
        device("cuda:1", 1, tensor_parallel_size=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device("auto:1") == "cpu"
    with pytest.raises(StartError, match=r"--device cuda: torch sees no GPUs; give cpu, or see"):
        device("cuda")


def test_both_roles_run_the_same_program() -> None:
    assert not PrefillConfig(model="m").accept_decode
    assert DecodeConfig(model="m").accept_decode
