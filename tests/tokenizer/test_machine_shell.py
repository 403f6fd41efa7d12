"""What stands around the machine: encoding in threads, and what is read at the start."""

import asyncio
from pathlib import Path

import pytest

from slipstream.config import StartError
from slipstream.core.machine import Encoded, EncodePrompt, Event
from slipstream.errors import ErrorCode
from slipstream.messages import ChatPrompt, TextPrompt
from slipstream.tokenizer.__main__ import read_eos_token_ids, run
from slipstream.tokenizer.codec import TokenizerCodec
from slipstream.tokenizer.config import TokenizerConfig
from slipstream.tokenizer.executor import EncodeExecutor
from slipstream.tokenizer.grammar_check import GrammarCheck


async def test_every_prompt_ends_as_an_event(
    byte_level_codec: TokenizerCodec, byte_level_folder: Path
) -> None:
    limit = 0
    grammars = GrammarCheck(byte_level_folder, byte_level_codec.vocab_size, [2])
    executor = EncodeExecutor(byte_level_codec, grammars, 2, lambda: limit)
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
    await executor.start(lambda event: loop.call_soon_threadsafe(events.put_nowait, event))

    async def encoded(prompt: object) -> Encoded:
        executor.execute(EncodePrompt("r", prompt))  # type: ignore[arg-type]
        event = await asyncio.wait_for(events.get(), 10)
        assert isinstance(event, Encoded) and event.request_id == "r"
        return event

    text = TextPrompt(text="Hello world " * 1000)
    assert (await encoded(text)).tokens == tuple(byte_level_codec.encode(text))
    limit = 10
    refused = await encoded(text)
    assert refused.problem is not None and refused.problem.code is ErrorCode.CONTEXT_LENGTH
    broken = await encoded(TextPrompt(text=None))  # type: ignore[arg-type]
    assert broken.problem is not None and broken.problem.code is ErrorCode.INTERNAL
    assert (await encoded(ChatPrompt(messages=[{"role": "user", "content": "x"}]))).tokens
    await executor.close()


def test_eos_token_ids(tmp_path: Path) -> None:
    assert read_eos_token_ids(tmp_path) == frozenset()
    (tmp_path / "config.json").write_text('{"eos_token_id": 2, "vocab_size": 9}')
    assert read_eos_token_ids(tmp_path) == {2}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert read_eos_token_ids(tmp_path) == {2, 5}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert read_eos_token_ids(tmp_path) == {2}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(StartError, match=r"generation_config\.json") as raised:
        read_eos_token_ids(tmp_path)
    assert raised.value.exit_code == 4


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    config = TokenizerConfig(model=str(tmp_path), node_id="t", run_dir=str(tmp_path))
    with pytest.raises(StartError, match=r"tokenizer\.json") as raised:
        run(config)
    assert raised.value.exit_code == 4
