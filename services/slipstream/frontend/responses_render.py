"""An answer in items and events of the Responses API."""

import time
from collections.abc import Callable

from slipstream.errors import ERRORS, Problem
from slipstream.frontend.generation import Choice, alternatives, finite
from slipstream.frontend.responses_shapes import (
    ArgumentsDone,
    ArgumentsGrew,
    Broken,
    CallItem,
    Completed,
    Created,
    Event,
    Failed,
    Incomplete,
    IncompleteDetails,
    InProgress,
    InputTokensDetails,
    Item,
    ItemAdded,
    ItemDone,
    LogprobOut,
    MessageItem,
    OutputText,
    OutputTokensDetails,
    PartAdded,
    PartDone,
    ReasoningDone,
    ReasoningGrew,
    ReasoningItem,
    ReasoningText,
    ResponseBody,
    ResponseError,
    ResponseUsage,
    TextDone,
    TextGrew,
    TopLogprobOut,
)
from slipstream.frontend.sse import named_event
from slipstream.frontend.tool_calls import Block, Blocks, Change
from slipstream.messages import PartKind, TextDelta, TextLogprob

RATE_LIMITED = "rate_limit_exceeded"


class Rendering:
    """Follows an answer; `body` is the response as it is by now. What it returns are framed
    events, none of them if nobody `streams`."""

    def __init__(
        self,
        body: ResponseBody,
        top: int | None,
        *,
        streams: bool,
        named: Callable[[bytes], bytes] = bytes,
    ) -> None:
        """`top`: alternatives to show for each token; None: no logprobs. `named` puts an event's id
        on it."""
        self.body = body
        self.begun = False
        self.streams = streams
        self._top, self._named = top, named
        self._blocks = Blocks(body.id)
        self._events = bytearray()
        self._told = 0
        self._logprobs: list[LogprobOut] = []
        """Of tokens whose text has not come yet."""

    @property
    def blocks(self) -> list[Block]:
        return self._blocks.blocks

    def take(self, delta: TextDelta) -> bytes:
        self._begin()
        if self._top is not None:
            self._logprobs += [_logprob(entry, self._top) for entry in delta.logprobs or ()]
        for change, block, text in self._blocks.take(delta):
            self._changed(change, block, text)
        return self._out()

    def end(self, choice: Choice) -> bytes:
        self._begin()
        whole = choice.finish_reason != "length"
        for _, block, _ in self._blocks.close():
            self._close(block, "completed" if whole else "incomplete")
        self.body.usage = _usage(choice, self._blocks.reasoning_tokens)
        self.body.status = "completed" if whole else "incomplete"
        if whole:
            self.body.completed_at = int(time.time())
            self._say(Completed(response=self.body))
        else:
            self.body.incomplete_details = IncompleteDetails(reason="max_output_tokens")
            self._say(Incomplete(response=self.body))
        return self._out()

    def fail(self, problem: Problem) -> bytes:
        """In the middle of an answer. What has been said of it stays in the output."""
        for _, block, _ in self._blocks.close():
            self._close(block, "incomplete")
        limited = ERRORS[problem.code].status == 429
        code = RATE_LIMITED if limited else "server_error"
        self.body.status = "failed"
        self.body.error = ResponseError(code=code, message=problem.message)
        self._say(Failed(response=self.body))
        return self._out()

    def _begin(self) -> None:
        if not self.begun:
            self.begun = True
            self._say(Created(response=self.body))
            self._say(InProgress(response=self.body))

    def _say(self, event: Event) -> None:
        if self.streams:
            event.sequence_number = self._told
            self._told += 1
            self._events += self._named(named_event(event))

    def _out(self) -> bytes:
        out, self._events = bytes(self._events), bytearray()
        return out

    # --- Blocks become items ---

    def _changed(self, change: Change, block: Block, text: str) -> None:
        match change:
            case Change.OPENED:
                self._open(block)
            case Change.GREW:
                self._grow(block, text)
            case Change.CLOSED:
                self._close(block, "completed")

    def _open(self, block: Block) -> None:
        item = self._item(block)
        self.body.output.append(item)
        self._say(ItemAdded(output_index=block.index, item=item))
        match item:
            case MessageItem():
                item.content = [OutputText(text="")]
                part = item.content[0]
                self._say(PartAdded(item_id=item.id, output_index=block.index, part=part))
            case ReasoningItem():
                item.content = [ReasoningText(text="")]
                thought = item.content[0]
                self._say(PartAdded(item_id=item.id, output_index=block.index, part=thought))

    def _grow(self, block: Block, text: str) -> None:
        item, index = self.body.output[block.index], block.index
        match item:
            case MessageItem():
                new, self._logprobs = self._logprobs, []
                item.content[0].logprobs += new
                self._say(TextGrew(item_id=item.id, output_index=index, delta=text, logprobs=new))
            case ReasoningItem():
                self._logprobs.clear()
                self._say(ReasoningGrew(item_id=item.id, output_index=index, delta=text))
            case CallItem():
                self._logprobs.clear()
                self._say(ArgumentsGrew(item_id=item.id, output_index=index, delta=text))

    def _close(self, block: Block, status: str) -> None:
        item, index, text = self.body.output[block.index], block.index, block.text
        item.status = status
        match item:
            case MessageItem(content=[part]):
                part.text = text
                part.logprobs += self._logprobs
                self._logprobs = []
                done: Event = TextDone(
                    item_id=item.id, output_index=index, text=text, logprobs=part.logprobs
                )
                self._say(done)
                self._say(PartDone(item_id=item.id, output_index=index, part=part))
            case ReasoningItem(content=[thought]):
                thought.text = text
                self._say(ReasoningDone(item_id=item.id, output_index=index, text=text))
                self._say(PartDone(item_id=item.id, output_index=index, part=thought))
            case CallItem():
                item.arguments = text
                self._say(ArgumentsDone(item_id=item.id, output_index=index, arguments=text))
        self._say(ItemDone(output_index=index, item=item))

    def _item(self, block: Block) -> Item:
        name, status = f"{self.body.id.removeprefix('resp_')}_{block.index}", "in_progress"
        match block.kind:
            case PartKind.CONTENT:
                return MessageItem(id=f"msg_{name}", status=status)
            case PartKind.REASONING:
                return ReasoningItem(id=f"rs_{name}", status=status)
        call_id, function = block.call_id, block.name
        return CallItem(id=f"fc_{name}", status=status, call_id=call_id, name=function)


def _logprob(entry: TextLogprob, top: int) -> LogprobOut:
    return LogprobOut(
        token=entry.text,
        bytes=list(entry.raw),
        logprob=finite(entry.logprob),
        top_logprobs=[
            TopLogprobOut(token=one.text, bytes=list(one.raw), logprob=finite(one.logprob))
            for one in alternatives(entry, top)
        ],
    )


def _usage(choice: Choice, reasoning_tokens: int) -> ResponseUsage:
    usage = choice.final_usage()
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=usage.cached_tokens),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=reasoning_tokens),
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
    )


def broken(problem: Problem) -> bytes:
    """A stream that ends before its response has begun, once its status is out."""
    return named_event(
        Broken(code=problem.code.value, message=problem.message, param=problem.param)
    )
