"""The timers of one machine, by key."""

import heapq
from collections.abc import Iterator


class Timers:
    """Times are in s of the shell's clock. Setting a key again replaces its time."""

    def __init__(self) -> None:
        self._at_s: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._at_s)

    def set(self, key: str, at_s: float) -> None:
        self._at_s[key] = at_s
        heapq.heappush(self._heap, (at_s, key))
        if len(self._heap) > 2 * len(self._at_s) + 64:  # mostly of timers that were replaced
            self._heap = [(at_s, key) for key, at_s in self._at_s.items()]
            heapq.heapify(self._heap)

    def cancel(self, key: str) -> None:
        self._at_s.pop(key, None)

    def next_s(self) -> float:
        """When the next one is due; infinity if there is none."""
        while self._heap and self._at_s.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else float("inf")

    def due(self, now_s: float) -> Iterator[str]:
        """Takes out what is due, one at a time: what a timer sets or cancels counts at once."""
        while self.next_s() <= now_s:
            _, key = heapq.heappop(self._heap)
            del self._at_s[key]
            yield key
