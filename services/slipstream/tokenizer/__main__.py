"""`slipstream tokenizer`."""

from pathlib import Path

import msgspec

from slipstream.config import StartError
from slipstream.errors import ExitCode
from slipstream.messages import NodeInfo, TokenizerInfo
from slipstream.runtime.identity import host_identity, new_epoch
from slipstream.runtime.shell import run_service
from slipstream.runtime.wall import wall_offset_ns
from slipstream.tokenizer.codec import CodecError, TokenizerCodec
from slipstream.tokenizer.config import TokenizerConfig
from slipstream.tokenizer.executor import EncodeExecutor
from slipstream.tokenizer.grammar_check import GrammarCheck
from slipstream.tokenizer.machine import TokenizerMachine
from slipstream.tokenizer.recommended import recommended_sampling
from slipstream.tokenizer.settings import TokenizerSettings
from slipstream.tokenizer.spans import TokenizerSpans


class _ModelFile(msgspec.Struct):
    vocab_size: int = 0
    eos_token_id: int | list[int] | None = None


def run(config: TokenizerConfig) -> int:
    """Runs until it is drained; the exit code. StartError 4: the model's tokenizer is unusable."""
    folder = Path(config.model)
    try:
        codec = TokenizerCodec(folder, config.tool_format, config.reasoning_format)
    except CodecError as error:
        raise StartError(f"slipstream tokenizer: {error}", ExitCode.MODEL) from None
    vocab_size, eos_token_ids = read_logits(folder)
    settings = TokenizerSettings(max_model_len=config.max_model_len, eos_token_ids=eos_token_ids)
    node = NodeInfo(
        node_id=config.node_id,
        role=config.role,
        epoch=new_epoch(config),
        address=config.advertise,
        host=host_identity(),
        tokenizer=TokenizerInfo(
            model=config.served_model_name or folder.resolve().name,
            sampling=recommended_sampling(folder),
        ),
    )
    machine = TokenizerMachine(node, settings, codec)
    grammars = GrammarCheck(folder, vocab_size or codec.vocab_size, eos_token_ids)
    executor = EncodeExecutor(
        codec, grammars, config.threads, lambda: machine.limits().max_model_len
    )
    spans = TokenizerSpans(node, wall_offset_ns)
    return run_service(config, node, machine, executor, spans=spans)


def read_logits(folder: Path) -> tuple[int, frozenset[int]]:
    """How many numbers a model gives for a token, 0 where nothing says so, and which of them end an
    answer.

    As the workers read them, so that the same grammars fit: the ends of generation_config.json
    where it has any, else config.json's. Only these two files are needed, not the weights.
    StartError 4: not JSON."""
    model, generation = (_read(folder / f"{name}.json") for name in ("config", "generation_config"))
    ids = model.eos_token_id if generation.eos_token_id is None else generation.eos_token_id
    listed = [] if ids is None else ids if isinstance(ids, list) else [ids]
    return model.vocab_size, frozenset(listed)


def _read(file: Path) -> _ModelFile:
    try:
        return msgspec.json.decode(file.read_bytes(), type=_ModelFile)
    except FileNotFoundError:
        return _ModelFile()
    except (OSError, msgspec.MsgspecError) as error:
        raise StartError(f"slipstream tokenizer: {file}: {error}", ExitCode.MODEL) from None
