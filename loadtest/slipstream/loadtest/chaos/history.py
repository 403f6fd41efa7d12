"""What a client was told, request by request, and what was found in it. Data."""

import msgspec

REFUSALS = frozenset({"not_ready", "draining", "queue_full"})
"""Said before any work was done: a client comes again, and elsewhere."""


class Choice(msgspec.Struct):
    text: str = ""
    finish_reason: str = ""
    logprobs: list[float] = []


class Entry(msgspec.Struct, kw_only=True):
    """One request. Times in seconds on the host's monotonic clock."""

    ask: str
    """Name of what was asked: whose answer is known."""
    timeout_s: float
    """Its time budget."""
    sent_s: float = 0.0
    end_s: float = 0.0
    times_s: list[float] = []
    """When pieces of the answer came; of one that is not streamed none."""
    status: int = 0
    code: str = ""
    """Of the error that ended it."""
    broken: str = ""
    """How its connection ended, if not with the end of an answer."""
    done: bool = False
    """The server has said that this is all."""
    left: bool = False
    """By the client, on purpose."""
    refused: int = 0
    """Times that it was sent again because nobody had begun it."""
    answer_id: str = ""
    path: str = ""
    choices: dict[int, Choice] = {}
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def decode(self) -> str:
        """Worker that makes the answer; known with the first piece."""
        return self.path.rpartition(">")[2]

    @property
    def failed(self) -> bool:
        return not self.left and bool(self.code or self.broken or not self.done)


class Facts(msgspec.Struct, kw_only=True):
    """What is left some time after the last request."""

    stranded: int = 0
    """KV blocks that something holds though nothing runs."""
    unsettled: list[str] = []
    leaked: list[str] = []
    """Shared memory, processes."""


class Found(msgspec.Struct, kw_only=True):
    """What a checker says of one row."""

    requests: int = 0
    failed: int = 0
    """Without a whole answer, allowed or not; those that the client left do not count."""
    wrong: int = 0
    refused: int = 0
    pauses_s: list[float] = []
    """Longest silence within each stream that ran when the blow fell."""
    problems: list[str] = []
    """What may not be; empty: the row holds."""
