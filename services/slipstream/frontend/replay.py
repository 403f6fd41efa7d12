"""What a journal holds of a call: the items of its choices, in the order in which they came."""

from collections.abc import Iterable, Iterator

import msgspec

from slipstream.core.machine import Taken
from slipstream.messages import TextDelta
from slipstream.types import FinishReason, count_tokens


class Entry(msgspec.Struct, frozen=True, array_like=True):
    choice: int
    item: int | TextDelta
    """The number of prompt tokens, or a piece of the answer."""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[Entry]).decode


def packed(entries: Iterable[tuple[int, int | TextDelta]]) -> bytes:
    """Without the requests' names, which every piece would repeat."""
    return _encode([Entry(choice, _nameless(item)) for choice, item in entries])


def _nameless(item: int | TextDelta) -> int | TextDelta:
    if isinstance(item, int):
        return item
    return msgspec.structs.replace(item, request_id="")


class Replay:
    """Puts a journal together, as far as it goes: what does not follow on what came before, or
    cannot be read, is left out."""

    def __init__(self, choices: int) -> None:
        self.items: list[tuple[int, int | TextDelta]] = []
        self.ended = [False] * choices
        self._told = [False] * choices
        self._accepted = [bytearray() for _ in range(choices)]

    def read(self, packs: Iterable[bytes]) -> None:
        for choice, item in self._entries(packs):
            if isinstance(item, int):
                fits = not self._told[choice]
                self._told[choice] = True
            else:
                fits = self._told[choice] and self._follows(choice, item)
            if fits:
                self.items.append((choice, item))

    def _entries(self, packs: Iterable[bytes]) -> Iterator[tuple[int, int | TextDelta]]:
        for pack in packs:
            try:
                entries = _decode(pack)
            except msgspec.DecodeError:
                continue
            yield from ((e.choice, e.item) for e in entries if 0 <= e.choice < len(self.ended))

    def _follows(self, choice: int, delta: TextDelta) -> bool:
        accepted = self._accepted[choice]
        torn = len(delta.tokens) % 4
        if torn or self.ended[choice] or delta.position != count_tokens(accepted):
            return False
        accepted += delta.tokens
        self.ended[choice] = delta.finish_reason is not None
        return delta.finish_reason is not FinishReason.ERROR

    def taken(self, choice: int, owner: int, *, journaled: bool) -> Taken:
        """What is known of a choice that has not ended."""
        return Taken(owner, journaled, bytes(self._accepted[choice]), self._told[choice])
