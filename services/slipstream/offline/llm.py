"""Batches without a server: the engine of `slipstream serve` in this process."""

import asyncio
import os
import random
import threading
from collections.abc import Coroutine, Iterable, Mapping, Sequence, Set
from numbers import Integral
from types import TracebackType
from typing import Any, TypeAlias, TypeVar

import msgspec
from rich.console import Console

from slipstream.cli.models import DEMO, models_dir, prepare
from slipstream.cli.progress import Advance, progress
from slipstream.errors import Problem
from slipstream.frontend.gateway import StreamItem
from slipstream.messages import ChatPrompt, Prompt, TextDelta, TextPrompt, Tokenize, TokenPrompt
from slipstream.offline.cluster import LONGEST_S, OPEN_MAX, Cluster
from slipstream.offline.outputs import CompletionOutput, RequestOutput, add
from slipstream.offline.params import LoRARequest, SamplingParams
from slipstream.offline.settings import worker_config
from slipstream.tokenizer.admission import unknown_token
from slipstream.tokenizer.codec import PromptError
from slipstream.types import pack_tokens

Text: TypeAlias = str | Mapping[str, Any] | Sequence[int]
"""A prompt: text, token ids, or `{"prompt": …}` or `{"prompt_token_ids": …}`."""
Chat: TypeAlias = Sequence[Mapping[str, Any]]
"""Messages of one conversation."""
_Prompt: TypeAlias = Prompt | list[int]
T = TypeVar("T")
Params: TypeAlias = SamplingParams | Sequence[SamplingParams] | None
Loras: TypeAlias = LoRARequest | Sequence[LoRARequest | None] | None


class LLM:
    """One model, loaded. `close` ends it, and so does the end of a `with`."""

    def __init__(self, model: str = DEMO, *, seed: int | None = None, **settings: Any) -> None:
        """`model`: a folder, a .gguf file, a hub id, or demo. `seed`: of prompts whose parameters
        name none, one after the other. `settings`: those of `slipstream decode`, such as dtype,
        quantization, max_model_len, kv_cache_bytes, max_num_seqs, threads or speculative; None:
        as if it were not there.

        ConfigError: a setting that is not there, or out of range. StartError: the model cannot be
        served, or not here.
        """
        found = prepare(model, models_dir(os.environ), Console(stderr=True))
        self._cluster = Cluster(worker_config(model, str(found.folder), settings, os.environ))
        self._random = random.Random(None if seed is None else int(seed))
        self._count = 0
        self._loaded: dict[str, tuple[str, str]] = {}
        """Name of a LoRA adapter -> its folder and id."""
        self._loop = asyncio.new_event_loop()
        self._error: BaseException | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llm", daemon=True)
        self._thread.start()
        self._call(self._cluster.start(self._failed))

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Frees model and KV blocks. Idempotent."""
        if self._thread.is_alive():
            self._call(self._cluster.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def generate(
        self,
        prompts: Text | Sequence[Text],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
        lora_request: Loras = None,
    ) -> list[RequestOutput]:
        """Answers in the order of the prompts. A prompt that cannot be served (too long, no token)
        has `error` in its output; the others are not harmed.

        `use_tqdm`: a bar on a terminal. `lora_request`: the adapter of all, or one or None for
        each. RuntimeError: the engine has ended. ValueError: an adapter cannot be loaded, and why.
        """
        listed: Sequence[Any] = [prompts] if _is_one(prompts) else list(prompts)
        texts = [_text(each) for each in listed]
        return self._answers(texts, sampling_params, use_tqdm, lora_request)

    def chat(
        self,
        messages: Chat | Sequence[Chat],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        lora_request: Loras = None,
    ) -> list[RequestOutput]:
        """As `generate`, of conversations, by the model's chat template."""
        chats: Sequence[Any] = messages
        if not messages or isinstance(messages[0], Mapping):
            chats = [messages]
        prompts: list[tuple[str | None, _Prompt]] = [
            (
                None,
                ChatPrompt(
                    messages=[dict(message) for message in chat],
                    tools=tools,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    template_args=dict(chat_template_kwargs or {}),
                ),
            )
            for chat in chats
        ]
        return self._answers(prompts, sampling_params, use_tqdm, lora_request)

    def encode(self, text: str) -> list[int]:
        """Token ids, as `generate` makes them."""
        return self._cluster.codec.encode(TextPrompt(text=text))

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's makers recommend, and what prompts without parameters are given."""
        recommended: dict[str, Any] = dict(self._cluster.sampling)
        return SamplingParams(**recommended)

    # --- Inside -----------------------------------------------------------------------------------

    def _answers(
        self, prompts: list[tuple[str | None, _Prompt]], params: Params, bar: bool, loras: Loras
    ) -> list[RequestOutput]:
        given = self.get_default_sampling_params() if params is None else params
        each = _each("sampling_params", given, len(prompts))
        for one in {id(one): one for one in each}.values():
            one.check()
        adapters = _each("lora_request", loras, len(prompts))
        seeds = [one.drawn_seed(self._random) for one in each]
        with progress(Console(stderr=True, quiet=not bar), "prompts") as advance:
            return self._call(self._all(prompts, each, seeds, adapters, advance))

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """On the loop, and waited for. Whoever stops waiting (Ctrl-C) has it cancelled."""
        running = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return running.result()
        except BaseException:
            running.cancel()
            raise

    def _failed(self, error: BaseException) -> None:
        """On the loop: nothing goes on any more."""
        self._error = self._error or error
        for task in self._running:
            task.cancel()

    async def _all(
        self,
        prompts: list[tuple[str | None, _Prompt]],
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        loras: Sequence[LoRARequest | None],
        advance: Advance,
    ) -> list[RequestOutput]:
        adapters = await self._adapters(loras)
        outputs: list[RequestOutput | None] = [None] * len(prompts)
        left = iter(range(len(prompts)))
        done = 0

        async def serve() -> None:
            nonlocal done
            for index in left:  # shared: whoever is free takes the next one
                outputs[index] = await self._one(
                    *prompts[index], params[index], seeds[index], adapters[index]
                )
                done += 1
                advance(done, len(prompts))

        choices = max((each.n for each in params), default=1)
        at_a_time = min(len(prompts), max(1, OPEN_MAX // choices))
        self._running = {asyncio.create_task(serve()) for _ in range(at_a_time)}
        try:
            await asyncio.gather(*self._running)
        except BaseException:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
            if self._error is not None:
                raise RuntimeError(f"the engine has ended: {self._error}") from self._error
            raise
        return [output for output in outputs if output is not None]

    async def _adapters(self, loras: Sequence[LoRARequest | None]) -> list[str]:
        """Their ids, loaded if they are not yet."""
        wanted = {each.lora_name: each.lora_path for each in loras if each}
        for lora in loras:
            if lora and lora.lora_path != wanted[lora.lora_name]:
                name = lora.lora_name
                raise ValueError(f"lora_request: {name} names two folders; give two names")
        for name, path in wanted.items():
            if self._loaded.get(name, ("", ""))[0] != path:
                found = await self._cluster.adapter(name, path)
                if isinstance(found, Problem):
                    raise ValueError(f"lora_request: {found.message}")
                self._loaded[name] = path, found
        return [self._loaded[each.lora_name][1] if each else "" for each in loras]

    async def _one(
        self, text: str | None, prompt: _Prompt, params: SamplingParams, seed: int, adapter: str
    ) -> RequestOutput:
        self._count += 1
        output = RequestOutput(str(self._count), text, [], [])
        if self._error is not None:
            raise RuntimeError(f"the engine has ended: {self._error}") from self._error
        try:
            tokens = await self._tokens(prompt)
        except PromptError as error:
            output.error = error.problem.message
            return output
        output.prompt_token_ids = tokens
        output.outputs = [CompletionOutput(index) for index in range(params.n)]
        any_choice = Tokenize(
            request_id="",
            prompt=TokenPrompt(tokens=pack_tokens(tokens)),
            sampling=params.wire(self._cluster.max_model_len, seed=seed),
            timeout_s=LONGEST_S,
            model=self._cluster.model,
            adapter=adapter,
            clamp_max_tokens=True,  # as vLLM: an answer ends where its context does
            constraint=params.constraint(),
            bad_words=tuple(params.bad_words or ()),
        )
        await asyncio.gather(*(self._choice(any_choice, output, each) for each in output.outputs))
        return output

    async def _tokens(self, prompt: _Prompt) -> list[int]:
        """PromptError: it cannot be served."""
        codec = self._cluster.codec
        if isinstance(prompt, list):
            if prompt and (problem := unknown_token(prompt, codec.vocab_size)):
                raise PromptError(problem)  # it may be one that cannot be packed
            prompt = TokenPrompt(tokens=pack_tokens(prompt))
        return await asyncio.to_thread(codec.encode, prompt)

    async def _choice(
        self, like: Tokenize, output: RequestOutput, choice: CompletionOutput
    ) -> None:
        items: asyncio.Queue[StreamItem] = asyncio.Queue()
        change = msgspec.structs.replace
        sampling = change(like.sampling, choice=choice.index)
        name = f"{output.request_id}-{choice.index}"
        close = self._cluster.open(
            change(like, request_id=name, sampling=sampling), items.put_nowait
        )
        try:
            while not choice.finish_reason:
                item = await items.get()
                if isinstance(item, Problem):
                    output.error = item.message
                    return
                if isinstance(item, TextDelta):
                    add(output, choice, item)
        finally:
            close()


_NO_TOKENS = (str, bytes, bytearray, memoryview, Mapping, Set)


def _is_one(prompts: Text | Sequence[Text]) -> bool:
    if isinstance(prompts, _NO_TOKENS):
        return True
    return len(prompts) > 0 and all(isinstance(each, Integral) for each in prompts)


def _text(prompt: Text) -> tuple[str | None, _Prompt]:
    match prompt:
        case str():
            return prompt, TextPrompt(text=prompt)
        case {"prompt_token_ids": tokens} if (ids := _ids(tokens)) is not None:
            return None, ids
        case {"prompt": str(text)}:
            return text, TextPrompt(text=text)
        case _ if (ids := _ids(prompt)) is not None:
            return None, ids
    raise ValueError(
        "a prompt is a text, token ids, or a dict with prompt or prompt_token_ids, not "
        f"{prompt!r:.80}"
    )


def _ids(tokens: Any) -> list[int] | None:
    """Of any list or array of integers; None if it is none."""
    if not isinstance(tokens, Iterable) or isinstance(tokens, _NO_TOKENS):
        return None
    found = list(tokens)
    return [int(each) for each in found] if all(isinstance(e, Integral) for e in found) else None


def _each(name: str, given: T | Sequence[T], count: int) -> Sequence[T]:
    if not isinstance(given, Sequence):
        return [given] * count
    if len(given) != count:
        raise ValueError(f"{len(given)} {name} for {count} prompts; give one, or as many")
    return given
