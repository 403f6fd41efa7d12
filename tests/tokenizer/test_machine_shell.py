"""What stands around the machine: encoding in threads, and what is read at the start."""

import asyncio
import math
import shutil
import time
from pathlib import Path

import pytest

from slipstream.config import StartError
from slipstream.core.machine import Encoded, EncodePrompt, Event
from slipstream.errors import ErrorCode, Problem
from slipstream.messages import ChatPrompt, TextPrompt
from slipstream.tokenizer.__main__ import read_logits, run
from slipstream.tokenizer.admission import fitted
from slipstream.tokenizer.codec import TokenizerCodec
from slipstream.tokenizer.config import TokenizerConfig
from slipstream.tokenizer.executor import EncodeExecutor
from slipstream.tokenizer.grammar_check import GrammarCheck
from tokenizer.machines import submission
from tokenizer.templates import QWEN, codec_of


async def test_every_prompt_ends_as_an_event(
    byte_level_codec: TokenizerCodec, byte_level_folder: Path
) -> None:
    limit = 0
    grammars = GrammarCheck(byte_level_folder, byte_level_codec.vocab_size, [2])
    executor = EncodeExecutor(byte_level_codec, grammars, 2, lambda: limit)
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
    await executor.start(lambda event: loop.call_soon_threadsafe(events.put_nowait, event))

    async def encoded(prompt: object, **more: float) -> Encoded:
        executor.execute(EncodePrompt("r", prompt, **more))  # type: ignore[arg-type]
        event = await asyncio.wait_for(events.get(), 10)
        assert isinstance(event, Encoded) and event.request_id == "r"
        return event

    text = TextPrompt(text="Hello world " * 1000)
    assert (await encoded(text)).tokens == tuple(byte_level_codec.encode(text))
    late = await encoded(TextPrompt(text=None), deadline_s=time.monotonic())  # type: ignore[arg-type]
    assert late.problem is not None and late.problem.code is ErrorCode.DEADLINE, "not even begun"
    limit = 10
    refused = await encoded(text)
    assert refused.problem is not None and refused.problem.code is ErrorCode.CONTEXT_LENGTH
    broken = await encoded(TextPrompt(text=None))  # type: ignore[arg-type]
    assert broken.problem is not None and broken.problem.code is ErrorCode.INTERNAL
    assert (await encoded(ChatPrompt(messages=[{"role": "user", "content": "x"}]))).tokens
    await executor.close()


async def test_a_history_that_no_prompt_can_hold_is_the_clients(tmp_path: Path) -> None:
    """Whatever the arguments of a call are: to be refused, where they are, and no fault of ours."""
    codec = codec_of(QWEN, tmp_path)
    executor = EncodeExecutor(codec, GrammarCheck(tmp_path, codec.vocab_size, [2]), 1, lambda: 0)
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
    await executor.start(lambda event: loop.call_soon_threadsafe(events.put_nowait, event))

    async def encoded(arguments: str) -> Encoded:
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
        asked = {"role": "assistant", "content": None, "tool_calls": [call]}
        executor.execute(EncodePrompt("r", ChatPrompt(messages=[asked]), deadline_s=math.inf))
        event = await asyncio.wait_for(events.get(), 10)
        assert isinstance(event, Encoded)
        return event

    try:
        halves = await encoded('{"a": "\\ud83d"}')
        assert halves.problem is None and "\ufffd" in codec.decode(halves.tokens)
        for depth in (100, 300, 600, 900, 5000):
            problem = (await encoded('{"a":' * depth + "1" + "}" * depth)).problem
            if depth == 100:
                assert problem is None
            elif problem is not None:
                assert (problem.code, problem.param) == (ErrorCode.INVALID_VALUE, "messages"), depth
    finally:
        await executor.close()


def test_log_probabilities_of_a_prompt_are_bounded() -> None:
    """262,144 of them: 12,483 tokens with 20 alternatives each, not one more."""
    scored = submission(prompt_logprobs=20, max_tokens=1)
    assert fitted(scored, 12_483, 0) == scored.sampling
    problem = fitted(scored, 12_484, 0)
    assert isinstance(problem, Problem) and problem.param == "prompt_logprobs"
    assert problem.code is ErrorCode.INVALID_VALUE
    assert all(number in problem.message for number in ("262164", "262144", "12484"))
    assert fitted(submission(max_tokens=1), 1 << 20, 0) == submission(max_tokens=1).sampling


def test_what_the_logits_are(tmp_path: Path) -> None:
    assert read_logits(tmp_path) == (0, frozenset())
    (tmp_path / "config.json").write_text('{"eos_token_id": 2, "vocab_size": 9}')
    assert read_logits(tmp_path) == (9, {2})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert read_logits(tmp_path) == (9, {2, 5})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert read_logits(tmp_path) == (9, {2})
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(StartError, match=r"generation_config\.json") as raised:
        read_logits(tmp_path)
    assert raised.value.exit_code == 4


def test_grammars_are_compiled_for_what_the_model_gives(
    byte_level_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than the tokenizer has, for models fill their output layer up."""
    folder = Path(shutil.copytree(byte_level_folder, tmp_path / "model"))
    (folder / "config.json").write_text('{"eos_token_id": [2, 0], "vocab_size": 512}')
    made: list[GrammarCheck] = []

    def served(config: object, node: object, machine: object, executor: object, **_: object) -> int:
        assert isinstance(executor, EncodeExecutor)
        made.append(executor._grammars)
        return 0

    monkeypatch.setattr("slipstream.tokenizer.__main__.run_service", served)
    run(TokenizerConfig(model=str(folder), node_id="t", run_dir=str(tmp_path)))
    (checker,) = made
    assert checker._command[-2:] == ["512", "0,2"]


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    config = TokenizerConfig(model=str(tmp_path), node_id="t", run_dir=str(tmp_path))
    with pytest.raises(StartError, match=r"tokenizer\.json") as raised:
        run(config)
    assert raised.value.exit_code == 4
