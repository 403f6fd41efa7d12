"""Tokens that may come next, looked up in what a request has said so far.

Where the last tokens stood before, what followed them then is proposed. The model computes what is
proposed in one step and takes as much of it as it would have said itself, so that answers do not
change. Source: Saxena, "Prompt Lookup Decoding", 2023.
"""

from collections.abc import Sequence

SIZES = (4, 3, 2)
"""Last tokens to look for, the longest first."""
LOOK_BACK = 4096
"""How far back it looks at first; it forgets all but so many tokens when it knows twice as many."""
AT_A_TIME = 512
"""Tokens that are looked at in one step, which others wait for: the rest with the next ones."""


class Drafts:
    """Of one request. What it proposes grows while it is right: a wrong token costs as much
    computing as a right one, and saves no step."""

    def __init__(self) -> None:
        self._follows: dict[tuple[int, ...], int] = {}
        """Some tokens -> where what followed them begins, the last time."""
        self._first = 0
        self._known = 1
        """From where and up to where tokens have been looked at."""
        self._most = 1

    def propose(self, tokens: Sequence[int], most: int) -> tuple[int, ...]:
        """What may follow `tokens`, at most `most`; they only grow, or `forget` was called."""
        self._look_at(tokens)
        count = min(most, self._most)
        for size in SIZES:
            begin = self._follows.get(tuple(tokens[-size:]), 0)
            if begin and count > 0:
                return tuple(tokens[begin : begin + count])
        return ()

    def _look_at(self, tokens: Sequence[int]) -> None:
        if len(tokens) - self._first > 2 * LOOK_BACK:
            self._follows.clear()
            self._first = self._known = len(tokens) - LOOK_BACK
        end = min(len(tokens), self._known + AT_A_TIME)
        for begin in range(self._known, end):
            for size in SIZES:
                if begin >= size:
                    self._follows[tuple(tokens[begin - size : begin])] = begin
        self._known = max(self._known, end)

    def learn(self, proposed: int, right: int) -> None:
        """How many of those proposed last were right."""
        if proposed:
            self._most = 2 * right + 1

    def forget(self) -> None:
        """Tokens were taken back."""
        self._follows.clear()
        self._first, self._known = 0, 1
