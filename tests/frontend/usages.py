"""A store of usage in memory, as Redis does it, and what may go wrong on the way there."""

from collections.abc import Sequence

from slipstream.frontend.journal import StoreError
from slipstream.frontend.usage import Rows, Said, Write, added
from slipstream.frontend.usage_store import Exchanged


class Accounts:
    """What is kept, of all frontends."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], dict[str, Rows]] = {}
        """(client, period) -> writer -> rows."""
        self.unix_s = 1_795_000_000.0

    def exchange(self, writer: str, writes: Sequence[Write]) -> list[Said | None]:
        said: list[Said | None] = []
        for write in writes:
            key = write.account.tenant, write.account.period.name
            kept = self.kept.setdefault(key, {})
            others = added(*(rows for name, rows in kept.items() if name != writer))
            said.append(Said(writer in kept, others))
            if write.rows:
                kept.setdefault(writer, {}).update(write.rows)
        return said


class MemoryUsage:
    """One frontend's way to it."""

    def __init__(self, accounts: Accounts, writer: str) -> None:
        self._accounts, self._writer = accounts, writer
        self.down = False
        self.forgotten: list[str] = []

    async def exchange(self, writes: Sequence[Write]) -> Exchanged:
        if self.down:
            raise StoreError("down")
        said = self._accounts.exchange(self._writer, writes)
        return Exchanged(self._accounts.unix_s, said)

    async def forget(self, oldest: str) -> None:
        self.forgotten.append(oldest)

    async def close(self) -> None:
        pass
