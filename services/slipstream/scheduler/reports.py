"""What workers said runs in them, while a young scheduler waits for tokenizers to ask for it."""

from slipstream.core.machine import Effect, Send
from slipstream.messages import LiveRequest
from slipstream.scheduler.request import drop
from slipstream.types import NodeId, RequestId


class Reports:
    def __init__(self) -> None:
        self._said: dict[RequestId, tuple[int, NodeId]] = {}

    def note(self, live: LiveRequest, source: NodeId) -> list[Effect]:
        """Perhaps a tokenizer asks for it. Of two attempts only the newer can be asked for."""
        known = self._said.get(live.request_id)
        said = (live.attempt, source)
        self._said[live.request_id] = said if known is None else max(known, said)
        if known is None or known[1] == source:
            return []
        attempt, worker = min(known, said)
        return [Send(worker, drop(live.request_id, attempt))]

    def take(self, request_id: RequestId, attempt: int) -> tuple[int, NodeId]:
        """What was said of the attempts up to this one, and is claimed by now; (0, "") if
        nothing."""
        known = self._said.get(request_id, (0, ""))
        if not 0 < known[0] <= attempt:
            return 0, ""
        return self._said.pop(request_id)

    def lost(self, worker: NodeId) -> None:
        self._said = {key: said for key, said in self._said.items() if said[1] != worker}

    def drain(self) -> dict[RequestId, tuple[int, NodeId]]:
        """Those that nobody has claimed."""
        said, self._said = self._said, {}
        return said
