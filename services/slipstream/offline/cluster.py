"""A whole cluster in one process: the machines of every service but the index, and one worker.

What is decided, and every token, is what `slipstream serve` would make of the same requests.
"""

import asyncio
import math
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import msgspec

from slipstream.config import SetupError, WorkerConfig
from slipstream.core.machine import (
    AdapterAsked,
    Closed,
    Deliver,
    DeliverAdapter,
    Effect,
    Opened,
)
from slipstream.core.worker import WorkerMachine
from slipstream.core.worker_settings import WorkerSettings
from slipstream.engine.executor import WorkerExecutor
from slipstream.engine.models import read_model
from slipstream.engine.sizing import size_pool
from slipstream.engine.worker_parts import (
    load_runner,
    make_pool,
    plan_of,
    pool_tensor,
    room_of,
)
from slipstream.errors import Problem
from slipstream.frontend.gateway import StreamItem
from slipstream.frontend.machine import FrontendMachine
from slipstream.frontend.settings import FrontendSettings
from slipstream.kv.choice import Transports
from slipstream.messages import (
    SCHEDULER,
    AdapterChanged,
    ChangeAdapter,
    NodeInfo,
    Tokenize,
    TokenizerInfo,
    WorkerInfo,
)
from slipstream.offline.process import Network, Process
from slipstream.scheduler.machine import SchedulerMachine
from slipstream.scheduler.settings import SchedulerSettings
from slipstream.tokenizer.__main__ import read_logits
from slipstream.tokenizer.codec import TokenizerCodec
from slipstream.tokenizer.executor import EncodeExecutor
from slipstream.tokenizer.grammar_check import GrammarCheck
from slipstream.tokenizer.machine import TokenizerMachine
from slipstream.tokenizer.recommended import recommended_sampling
from slipstream.tokenizer.settings import TokenizerSettings
from slipstream.types import Role

OPEN_MAX = 512
"""Requests at a time; the others have not begun to exist."""
LONGEST_S = 86_000.0
"""Less than a message may say (86,400 s): what is left of it is a difference of times, which may be
rounded up."""
ADAPTER_S, AGAIN_S = 90.0, 0.05
"""For a LoRA adapter to be loaded; until who is not ready yet is asked again."""
_EPOCH = 1
"""There is one life of it."""


class Cluster:
    """Made in any thread; `start`, `open` and `close` belong to the loop's."""

    def __init__(self, config: WorkerConfig) -> None:
        """ModelError, CodecError, StartError: the model cannot be served, or not here."""
        if config.tensor_parallel_size > 1:
            raise SetupError("LLM: tensor_parallel_size: one process has one rank; leave it out")
        model = read_model(config.model, config.model_impl, config.load_format == "dummy")
        plan = plan_of(config, model)
        self.codec = TokenizerCodec(Path(config.model))
        self.sampling = recommended_sampling(Path(config.model))
        self.model = Path(config.model).name
        # What is left on a GPU shows when the model is there; on a CPU the pool comes first.
        self._runner = load_runner(config, plan, plan.device)
        room = room_of(config, plan, self._runner)
        size = size_pool(config, plan.layout.block_bytes, plan.max_model_len, room)
        self.max_model_len = size.max_model_len
        self._config, self._model, self._weights = config, model, plan.weights
        self._segment = make_pool(config, plan, _EPOCH, size.num_blocks)
        self._runner.attach(pool_tensor(plan, self._segment))
        self._segment.close()  # nobody else maps it: its name goes now, it goes with us
        self._put: dict[str, Callable[[StreamItem], None]] = {}
        self._changes: dict[str, asyncio.Future[AdapterChanged]] = {}

    async def start(self, failed: Callable[[BaseException], None]) -> None:
        network = Network(asyncio.get_running_loop(), failed)
        scheduler = SchedulerMachine(
            _info(SCHEDULER, Role.SCHEDULER),
            SchedulerSettings(
                max_requests=OPEN_MAX,
                max_request_timeout_s=LONGEST_S,
                ttft_target_s=math.inf,
                recovery_grace_s=0.0,
                disaggregation="never",
            ),
        )
        Process(network, _info(SCHEDULER, Role.SCHEDULER), scheduler)
        self._worker = self._start_worker(network)
        self._encoder = self._start_tokenizer(network)
        info = _info("frontend-0", Role.FRONTEND)
        settings = FrontendSettings(max_requests=OPEN_MAX, recovery_wait_s=LONGEST_S)
        self._machine = FrontendMachine(info, settings)
        self._frontend = Process(network, info, self._machine, self._deliver)
        await self._worker[1].start(self._worker[0].post)
        await self._encoder[1].start(self._encoder[0].post)

    def _start_worker(self, network: Network) -> tuple[Process, WorkerExecutor]:
        config, model = self._config, self._model
        header = self._segment.header
        worker = WorkerInfo(
            model=self.model,
            kv_layout_id=header.kv_layout_id,
            num_blocks=header.num_blocks,
            block_bytes=header.block_bytes,
            max_model_len=self.max_model_len,
            vocab_size=model.vocab_size,
            max_num_seqs=config.max_num_seqs,
            prefill_budget_tokens=config.prefill_budget_tokens,
            accept_decode=True,
            quantization=self._weights,
        )
        info = _info("decode-0", Role.DECODE, worker)
        machine = WorkerMachine(
            info,
            WorkerSettings(
                eos_token_ids=tuple(sorted(model.eos_token_ids)),
                step_timeout_s=LONGEST_S,
                enable_prefix_caching=config.enable_prefix_caching,
                steps_in_flight=2 if config.overlap else 1,
                draft_tokens=int(config.speculative.removeprefix("ngram:") or 0),
            ),
        )
        transports = Transports([], header.kv_layout_id, header.block_bytes, "", {})
        executor = WorkerExecutor(
            *(self._runner, self._segment.blocks, transports, lambda: machine.membership.nodes),
            adapters=self._runner.adapters,
        )
        return Process(network, info, machine, executor.execute), executor

    def _start_tokenizer(self, network: Network) -> tuple[Process, EncodeExecutor]:
        folder = Path(self._config.model)
        vocab_size, eos_token_ids = read_logits(folder)
        knows = TokenizerInfo(model=self.model)
        info = msgspec.structs.replace(_info("tokenizer-0", Role.TOKENIZER), tokenizer=knows)
        settings = TokenizerSettings(eos_token_ids=eos_token_ids, max_streams=2 * OPEN_MAX)
        machine = TokenizerMachine(info, settings, self.codec)
        grammars = GrammarCheck(folder, vocab_size or self.codec.vocab_size, eos_token_ids)
        executor = EncodeExecutor(self.codec, grammars, 1, lambda: machine.limits().max_model_len)
        return Process(network, info, machine, executor.execute), executor

    async def close(self) -> None:
        await self._worker[1].close()
        await self._encoder[1].close()

    def open(self, submission: Tokenize, put: Callable[[StreamItem], None]) -> Callable[[], None]:
        """`put` is told every item of the answer; a `Problem`, or a delta with a finish reason, is
        the last one. Call what comes back when you are done with it, finished or not."""
        name = submission.request_id
        self._put[name] = put
        self._frontend.post(Opened(submission))

        def close() -> None:
            if self._put.pop(name, None) is not None:
                self._frontend.post(Closed(name))

        return close

    async def adapter(self, name: str, path: str) -> str | Problem:
        """Its id, once it is loaded, in the place of another one of its name."""
        end_s = time.monotonic() + ADAPTER_S
        while True:
            call_id = uuid.uuid4().hex
            changed: asyncio.Future[AdapterChanged] = asyncio.get_running_loop().create_future()
            self._changes[call_id] = changed
            change = ChangeAdapter(
                call_id=call_id, model=self.model, name=name, path=path, replace=True
            )
            self._frontend.post(AdapterAsked(change))
            try:
                problem = (await asyncio.wait_for(changed, ADAPTER_S)).problem
            finally:
                del self._changes[call_id]
            if problem is None:
                known = self._machine.membership.models[self.model].adapters
                return next(each.adapter_id for each in known if each.name == name)
            if problem.retry_after_s is None or time.monotonic() >= end_s:
                return problem
            await asyncio.sleep(AGAIN_S)  # those who have just begun do not know of each other yet

    def _deliver(self, effect: Effect) -> None:
        if isinstance(effect, DeliverAdapter):
            if (changed := self._changes.get(effect.changed.call_id)) is not None:
                changed.set_result(effect.changed)
            return
        assert isinstance(effect, Deliver)
        if (put := self._put.get(effect.request_id)) is not None:
            put(effect.item)


def _info(name: str, role: Role, worker: WorkerInfo | None = None) -> NodeInfo:
    return NodeInfo(node_id=name, role=role, epoch=_EPOCH, address=name, worker=worker)
