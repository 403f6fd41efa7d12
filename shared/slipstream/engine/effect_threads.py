"""Threads that carry out effects: each ends as exactly one event, whatever happens."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from slipstream.core.machine import Event
from slipstream.grammar import stack_of

CAUSE_CHARACTERS = 300

_LOG = logging.getLogger(__name__)


class EffectThreads:
    def __init__(self, count: int, name: str, stack_bytes: int = 0):
        """`stack_bytes`: of the first of them, 0 for the system's."""
        self._pool = ThreadPoolExecutor(count, name)
        with stack_of(stack_bytes):
            self._pool.submit(int)  # starts it

    def submit(
        self,
        post: Callable[[Event], None],
        what: str,
        work: Callable[[], Event],
        failed: Callable[[Exception], Event],
    ) -> None:
        """Post what `work` comes to. `failed`: what its machine learns instead of nothing, which
        it would wait for without an end; `what` names it in the log."""
        self._pool.submit(_carry_out, post, what, work, failed)

    def cancel(self) -> None:
        """What has not begun never will, and ends as nothing: its machine is gone."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """As `cancel`; waits for what is under way."""
        self._pool.shutdown(cancel_futures=True)


def _carry_out(
    post: Callable[[Event], None],
    what: str,
    work: Callable[[], Event],
    failed: Callable[[Exception], Event],
) -> None:
    try:
        event = work()
    except Exception as error:  # noqa: BLE001 whatever it is, the machine has to hear of it
        _LOG.exception("%s failed", what)
        event = failed(error)
    post(event)


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:CAUSE_CHARACTERS]
