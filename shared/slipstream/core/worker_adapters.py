"""The LoRA adapters of one worker: what the scheduler wants here is loaded, and kept for as long as
a request has it."""

from collections.abc import Collection

import msgspec

from slipstream.core.machine import AdapterRead, DropAdapter, Effect, LoadAdapter, Send
from slipstream.messages import SCHEDULER, AdapterAnswer, AdapterInfo, UnwantAdapter, WantAdapter


class WorkerAdapters:
    def __init__(self, held: Collection[AdapterInfo]) -> None:
        """`held`: what it was started with."""
        self._held = {adapter.adapter_id: adapter for adapter in held}
        self._loading: dict[tuple[str, str], list[WantAdapter]] = {}
        """(Name, path) -> why it is read, and the last word of the scheduler since."""
        self._unwanted: set[str] = set()
        """Held still, for requests that have it."""

    @property
    def offered(self) -> tuple[AdapterInfo, ...]:
        return tuple(a for name, a in self._held.items() if name not in self._unwanted)

    def has(self, adapter_id: str) -> bool:
        return not adapter_id or adapter_id in self._held

    def want(self, message: WantAdapter) -> list[Effect]:
        key = message.name, message.path
        begun = self._loading.get(key)
        self._loading[key] = [message] if begun is None else [begun[0], message]
        return [] if begun else [LoadAdapter(*key)]

    def read(self, event: AdapterRead) -> list[Effect]:
        """To be told after what is `offered` now: who hears the answer knows that it is here."""
        wanted, *since = self._loading.pop((event.name, event.path))
        adapter = event.adapter
        if adapter is not None:
            adapter = msgspec.structs.replace(
                adapter, generation=wanted.generation, retired=wanted.retired
            )
            self._held[adapter.adapter_id] = adapter
            self._unwanted.discard(adapter.adapter_id)
        return [
            Send(
                SCHEDULER,
                AdapterAnswer(
                    name=event.name,
                    path=event.path,
                    generation=wanted.generation,
                    adapter=adapter,
                    problem=event.problem,
                ),
            ),
            # There may be another file by now.
            *(effect for message in since for effect in self.want(message)),
        ]

    def unwant(self, message: UnwantAdapter) -> None:
        name = message.adapter_id
        if message.at_once and name in self._held:
            self._unwanted.add(name)
        elif name in self._held:
            self._held[name] = msgspec.structs.replace(self._held[name], retired=True)

    def settle(self, used: Collection[str]) -> list[Effect]:
        """`used`: those of the requests that are here."""
        if not self._unwanted:
            return []
        gone = sorted(self._unwanted - set(used))
        self._unwanted -= set(gone)
        for adapter_id in gone:
            del self._held[adapter_id]
        return [DropAdapter(adapter_id) for adapter_id in gone]

    def check(self, used: Collection[str]) -> None:
        assert self._unwanted <= self._held.keys()
        assert set(used) - {""} <= self._held.keys()
