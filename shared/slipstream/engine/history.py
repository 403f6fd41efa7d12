"""What the device remembers of a request: its tokens, and what sampling asks about them."""

from collections import Counter

import numpy as np

from slipstream.core.machine import Admission
from slipstream.engine.drafts import Drafts
from slipstream.engine.guide import Guide
from slipstream.engine.shaping import Ids, Shaping, is_plain
from slipstream.types import SamplingParams


class History:
    """Prompt and output tokens of one attempt, grown by one at every sample."""

    def __init__(self, admission: Admission, guide: Guide | None = None) -> None:
        """`guide`: where the parameters have a grammar."""
        self.request_id = admission.request_id
        self.sampling: SamplingParams = admission.sampling
        self.num_prompt = admission.num_prompt
        self.adapter = admission.adapter
        self.tokens: list[int] = list(admission.tokens)
        self._prompt_ids: Ids | None = None
        self._output_counts = Counter(self.tokens[self.num_prompt :])
        self.drafts = Drafts()
        self.guide = guide
        self.shaping = Shaping.of(self.sampling, self.num_prompt, guide)
        self.plain = is_plain(self.sampling)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self._output_counts[token] += 1

    def truncate(self, num_output: int) -> None:
        """Forgets outputs from position `num_output` on: they are to be sampled again."""
        if num_output >= self.num_output:
            return
        self.drafts.forget()
        if self.guide is not None:
            self.guide.truncate(self.num_prompt + num_output)
        for token in self.tokens[self.num_prompt + num_output :]:
            self._output_counts[token] -= 1
        self._output_counts += Counter()  # drops the zeros
        del self.tokens[self.num_prompt + num_output :]

    def drop(self) -> None:
        """It is over."""
        if self.guide is not None:
            self.guide.drop()

    def output_counts(self) -> tuple[Ids, Ids]:
        """Distinct output tokens, and how often each occurred."""
        size = len(self._output_counts)
        ids = np.fromiter(self._output_counts.keys(), np.int64, size)
        return ids, np.fromiter(self._output_counts.values(), np.int64, size)

    def seen_ids(self) -> Ids:
        """Distinct tokens of prompt and output."""
        if self._prompt_ids is None:
            self._prompt_ids = np.unique(np.asarray(self.tokens[: self.num_prompt], np.int64))
        return np.union1d(self._prompt_ids, self.output_counts()[0])
