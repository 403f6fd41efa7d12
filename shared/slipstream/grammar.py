"""What an answer may say: grammars, compiled for one model's tokens.

A tokenizer process compiles a client's grammar to find out whether it can, a worker compiles the
same text to obey it; both by these limits, so that what the first takes the second does not
refuse. Needs no torch.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

KEPT_MAX = 256
KEPT_CHARS_MAX = 4 << 20
"""Compiled grammars that are kept, and their texts' length together."""
KEPT_CPU_S = 5.0
"""What it took to compile all that are kept. Nobody says how large they are, but a core makes not
more than 100 MB of one in a second."""
STACK_BYTES = 64 << 20
CHECKER_STACK_BYTES = 4 << 20
"""Of a thread that compiles or follows grammars, in a worker and where they are checked. llguidance
descends as deep as a grammar is nested, and a stack that ends takes the process with it. What
passes in the smaller one has room in the other, also where an answer leads deeper."""
GRAMMAR_SIZE_MAX = 20_000
"""Symbols of one grammar: it compiles in less than a second of one core."""
LEXER_STATES_MAX = 50_000
"""Of one answer's lexer, 1 to 2 kB each."""
REASON_CHARS_MAX = 500


class GrammarError(Exception):
    """No answer can be held to this grammar, or none of this model to any. One line: why."""


def limits() -> LLParserLimits:
    """Those of llguidance, about 20 ms of one step's work, and our own two."""
    return LLParserLimits(
        max_grammar_size=GRAMMAR_SIZE_MAX, max_lexer_states=LEXER_STATES_MAX, verbose_errors=False
    )


def tokenizer(
    model_path: str | Path, vocab_size: int, eos_token_ids: Collection[int]
) -> LLTokenizer:
    """The tokens of a model folder. Takes a third of a second of one core for 49,152 tokens, and
    keeps every other Python thread waiting meanwhile.

    `vocab_size`: of the logits, as many as the tokenizer has or more. `eos_token_ids`: which end an
    answer, at least one.
    GrammarError: the folder has no tokenizer.json, or one that does not go with these.
    """
    file = Path(model_path) / "tokenizer.json"
    if not file.is_file():
        raise GrammarError(f"{file} is not there")
    try:
        return LLTokenizer(str(file), n_vocab=vocab_size, eos_token=sorted(eos_token_ids))
    except ValueError as error:
        raise GrammarError(f"{file}: {_one_line(error)}") from error


@contextmanager
def stack_of(size_bytes: int) -> Iterator[None]:
    """Threads that start in here have a stack of this size, whatever the system's limit is. Any
    other that happens to start meanwhile too: it takes addresses, not memory."""
    before = threading.stack_size(size_bytes)
    try:
        yield
    finally:
        threading.stack_size(before)


class Grammars:
    """Compiles, and keeps what was compiled of late. Any thread."""

    def __init__(self, tokens: LLTokenizer) -> None:
        self.tokens = tokens
        self._kept: OrderedDict[str, tuple[LLMatcher, float]] = OrderedDict()
        """And the seconds of a core that each took."""
        self._chars, self._cpu_s = 0, 0.0
        self._lock = threading.Lock()

    def matcher(self, grammar: str) -> LLMatcher:
        """One at the beginning of an answer that follows `grammar`, the caller's own.

        `grammar` is as `llguidance.grammar_from` and `LLMatcher.grammar_from_…` write it. A new one
        is compiled here and now, without Python's lock.
        GrammarError: it cannot be compiled within `limits`.
        """
        with self._lock:
            if (known := self._kept.get(grammar)) is not None:
                self._kept.move_to_end(grammar)
                return known[0].deep_copy()
        began_s = time.thread_time()
        made = LLMatcher(self.tokens, grammar, log_level=0, limits=limits())
        if not made.is_error():
            made.compute_bitmask()  # a copy inherits what its lexer has learnt
        if made.is_error():
            raise GrammarError(_one_line(made.get_error()))
        with self._lock:
            self._keep(grammar, made, time.thread_time() - began_s)
            return made.deep_copy()

    def _keep(self, grammar: str, matcher: LLMatcher, cpu_s: float) -> None:
        if grammar in self._kept:
            return  # two threads at once
        self._kept[grammar] = matcher, cpu_s
        self._chars += len(grammar)
        self._cpu_s += cpu_s
        while (
            len(self._kept) > KEPT_MAX or self._chars > KEPT_CHARS_MAX or self._cpu_s > KEPT_CPU_S
        ):
            oldest, (_, spent_s) = self._kept.popitem(last=False)
            self._chars -= len(oldest)
            self._cpu_s -= spent_s


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:REASON_CHARS_MAX]
