"""An answer in blocks and events of Anthropic's API."""

from collections.abc import Callable

import msgspec

from slipstream.frontend.anthropic_shapes import (
    BlockDelta,
    BlockStart,
    BlockStop,
    ContentBlock,
    InputDelta,
    MessageDelta,
    MessageReply,
    MessageStart,
    MessageStop,
    MessageUsage,
    Ping,
    StopDelta,
    StreamEvent,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    ThinkingTokens,
    ToolUseBlock,
)
from slipstream.frontend.generation import Choice
from slipstream.frontend.sse import named_event
from slipstream.frontend.tool_calls import Block, Blocks, Change
from slipstream.messages import PartKind
from slipstream.messages import TextDelta as Delta


class Rendering:
    """Follows an answer; `reply` is the message at its end. What it returns are framed events,
    none of them if nobody `streams`."""

    def __init__(
        self,
        message_id: str,
        model: str,
        choice: Choice,
        *,
        streams: bool,
        named: Callable[[bytes], bytes] = bytes,
    ) -> None:
        """`named` puts an event's id on it."""
        self.streams, self._named = streams, named
        self._choice = choice
        self._blocks = Blocks(message_id)
        self._events = bytearray()
        self._begun = False
        usage = MessageUsage(input_tokens=0, output_tokens=0)
        self.reply = MessageReply(id=message_id, model=model, usage=usage)

    def take(self, delta: Delta) -> bytes:
        self._begin()
        for change, block, text in self._blocks.take(delta):
            self._changed(change, block, text)
        return self._out()

    def end(self) -> bytes:
        self._begin()
        for change, block, text in self._blocks.close():
            self._changed(change, block, text)
        reply, choice = self.reply, self._choice
        reply.content = [_block(block, whole=True) for block in self._blocks.blocks]
        reply.stop_reason = self._stop_reason()
        if reply.stop_reason == "stop_sequence":
            reply.stop_sequence = str(choice.stop_reason)
        reply.usage = _usage(choice, self._blocks.reasoning_tokens)
        delta = StopDelta(stop_reason=reply.stop_reason, stop_sequence=reply.stop_sequence)
        self._say(MessageDelta(delta=delta, usage=reply.usage))
        self._say(MessageStop())
        return self._out()

    def _stop_reason(self) -> str:
        if self._choice.finish_reason == "length":
            return "max_tokens"
        if any(block.kind is PartKind.CALL for block in self._blocks.blocks):
            return "tool_use"
        return "stop_sequence" if isinstance(self._choice.stop_reason, str) else "end_turn"

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self.reply.usage.input_tokens = self._choice.prompt_tokens
            self._say(MessageStart(message=self.reply))
            self._say(Ping())

    def _changed(self, change: Change, block: Block, text: str) -> None:
        match change:
            case Change.OPENED:
                self._say(BlockStart(index=block.index, content_block=_block(block, whole=False)))
            case Change.GREW:
                self._say(BlockDelta(index=block.index, delta=_grew(block.kind, text)))
            case Change.CLOSED:
                self._say(BlockStop(index=block.index))

    def _say(self, event: StreamEvent) -> None:
        if self.streams:
            self._events += self._named(named_event(event))

    def _out(self) -> bytes:
        out, self._events = bytes(self._events), bytearray()
        return out


def _grew(kind: PartKind, text: str) -> TextDelta | ThinkingDelta | InputDelta:
    match kind:
        case PartKind.CONTENT:
            return TextDelta(text=text)
        case PartKind.REASONING:
            return ThinkingDelta(thinking=text)
    return InputDelta(partial_json=text)


def _block(block: Block, *, whole: bool) -> ContentBlock:
    """`whole`: with what is in it."""
    text = block.text if whole else ""
    match block.kind:
        case PartKind.CONTENT:
            return TextBlock(text=text)
        case PartKind.REASONING:
            return ThinkingBlock(thinking=text)
    return ToolUseBlock(id=block.call_id, name=block.name, input=_arguments(text))


def _arguments(text: str) -> dict[str, object]:
    """Empty where the model was cut off, or wrote no object: `input` can be nothing else."""
    try:
        return msgspec.json.decode(text, type=dict[str, object])
    except msgspec.DecodeError:
        return {}


def _usage(choice: Choice, thinking_tokens: int) -> MessageUsage:
    usage = choice.final_usage()
    details = ThinkingTokens(thinking_tokens=thinking_tokens) if thinking_tokens else msgspec.UNSET
    return MessageUsage(
        input_tokens=usage.prompt_tokens - usage.cached_tokens,
        cache_read_input_tokens=usage.cached_tokens,
        output_tokens=usage.completion_tokens,
        output_tokens_details=details,
    )
