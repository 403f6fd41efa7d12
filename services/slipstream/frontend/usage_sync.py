"""The exchange of usage with the store: once a second, beside the requests and never before one."""

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence

from slipstream.frontend.journal import StoreError
from slipstream.frontend.usage import EXCHANGE_S, MONTHS_KEPT, Account, Ledger, Used, Write, month
from slipstream.frontend.usage_store import UsageStore

TIMEOUT_S = 1.0
"""For one script."""
ACCOUNTS_PER_SCRIPT = 64
"""Others wait for the store meanwhile, about a millisecond."""
ASK_S = 3.0
"""For all months of all clients, which somebody waits for."""
FORGET_S = 60.0
"""For a walk through all that the store has."""
CLOCKS_APART_S = 86_400.0
"""Of the store and this host: with more between them nothing is removed for its age."""

_log = logging.getLogger("slipstream.frontend")


class UsageSync:
    """Of one frontend; lives on its loop."""

    def __init__(
        self,
        ledger: Ledger,
        store: UsageStore,
        share: Callable[[Mapping[str, Used], float], None],
        clock: Callable[[], float],
    ) -> None:
        """`share`: is told after each exchange what others have used up of this minute."""
        self.ledger, self._store = ledger, store
        self._share, self._clock = share, clock
        self._up: bool | None = None
        self._counts: Counter[str] = Counter()
        self._forgotten = ""
        self._one_at_a_time = asyncio.Lock()

    async def run(self) -> None:
        """Until cancelled."""
        await asyncio.gather(self._again(self.exchange), self._again(self._forget))

    async def _again(self, chore: Callable[[], Awaitable[None]]) -> None:
        while True:
            await chore()
            await asyncio.sleep(EXCHANGE_S)

    async def exchange(self) -> None:
        """Says all that is due, and hears the rest."""
        async with self._one_at_a_time:
            writes = iter(self.ledger.due(self._clock()))
            try:
                while part := list(itertools.islice(writes, ACCOUNTS_PER_SCRIPT)):
                    if not await self._exchanged(part):
                        return
            finally:  # of what did not come to its turn
                self.ledger.failed(writes)

    async def ask(self, accounts: Sequence[Account]) -> bool:
        """Hears of these now; whether the store could say all of it in time."""
        try:
            async with asyncio.timeout(ASK_S), self._one_at_a_time:
                for first in range(0, len(accounts), ACCOUNTS_PER_SCRIPT):
                    part = accounts[first : first + ACCOUNTS_PER_SCRIPT]
                    if not await self._exchanged([account.write() for account in part]):
                        return False
        except TimeoutError:
            return False
        return True

    def statistics(self) -> dict[str, float]:
        counts = {f"{name}_total": float(count) for name, count in self._counts.items()}
        return {"usage_store_up": float(bool(self._up)), **counts}

    async def close(self) -> None:
        """What was counted last is said before the end."""
        await self.exchange()
        await self._store.close()

    async def _exchanged(self, writes: Sequence[Write]) -> bool:
        self._counts["usage_exchanges"] += 1
        try:
            async with asyncio.timeout(TIMEOUT_S):
                unix_s, said = await self._store.exchange(writes)
        except asyncio.CancelledError:
            self.ledger.failed(writes)
            raise
        except Exception as error:  # noqa: BLE001 a count is not worth the frontend, nor its next exchange
            if not isinstance(error, (StoreError, TimeoutError)):
                _log.exception("an exchange of usage failed")
            self.ledger.failed(writes)
            self._counts["usage_failures"] += 1
            if self._up is not False:
                _log.warning("usage is counted here alone, Redis does not answer: %s", error)
            self._up = False
            return False
        if self._up is False:
            _log.info("usage is counted together again")
        self._up = True
        now_s = self._clock()
        self._share(self.ledger.heard(writes, said, unix_s, now_s), now_s)
        return True

    async def _forget(self) -> None:
        """Once, and again with each month that begins."""
        unix_s = self.ledger.unix_s(self._clock())
        oldest = month(unix_s, MONTHS_KEPT - 1).name
        apart_s = abs(unix_s - time.time())
        if not self._up or oldest == self._forgotten or apart_s > CLOCKS_APART_S:
            return
        self._forgotten = oldest
        try:
            async with asyncio.timeout(FORGET_S):
                await self._store.forget(oldest)
        except Exception as error:  # noqa: BLE001 what is too old harms nobody, and is looked for again
            _log.warning("months before %s are not removed from Redis: %s", oldest, error)
