"""Steps on a thread of their own. The next one is launched while the one before it computes, where
neither the device nor the plan makes the host wait."""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

from slipstream.core.machine import BatchPlan, Event, RowOutput
from slipstream.grammar import STACK_BYTES, stack_of

FLYING_MAX = 2
"""Steps that have been launched and have not ended."""
LOOK_EVERY_S = 50e-6
"""At a step that computes, and for the plan of the next one."""

_LOG = logging.getLogger(__name__)

Outputs = tuple[RowOutput, ...]


class Step(Protocol):
    """A step that the device has been given."""

    def ready(self) -> bool:
        """Whether `finish` will not wait for the device."""

    def finish(self) -> Outputs:
        """What it made. Once, and of several in the order in which they were launched."""


class StepRunner(Protocol):
    def waits(self, plan: BatchPlan) -> bool:
        """Whether the plan has to know, on the host, what the step before it made."""

    def launch(self, plan: BatchPlan) -> Step: ...


class Made(NamedTuple):
    """A step that had ended when it was launched."""

    outputs: Outputs

    def ready(self) -> bool:
        return True

    def finish(self) -> Outputs:
        return self.outputs


class _Flight(NamedTuple):
    plan: BatchPlan
    step: Step | Exception
    began_s: float

    def ready(self) -> bool:
        return isinstance(self.step, Exception) or self.step.ready()


class StepLoop:
    """Each plan ends as exactly one event, in order, whatever happens."""

    def __init__(
        self,
        runner: StepRunner,
        post: Callable[[Event], None],
        done: Callable[[BatchPlan, Outputs, float], Event],
        failed: Callable[[BatchPlan, Exception], Event],
    ) -> None:
        """`done`: told when the step began to compute; if it fails, the step has. All of them are
        called by the thread."""
        self._runner, self._post, self._done, self._failed = runner, post, done, failed
        self._plans: queue.SimpleQueue[BatchPlan | Callable[[], None] | None] = queue.SimpleQueue()
        self._flying: deque[_Flight] = deque()
        self._ended_s = 0.0
        self._closed = False
        with stack_of(STACK_BYTES):  # it follows grammars
            self._thread = threading.Thread(target=self._run, name="compute_0", daemon=True)
            self._thread.start()

    def submit(self, plan: BatchPlan) -> None:
        self._plans.put(plan)

    def between(self, work: Callable[[], None]) -> None:
        """On the thread, behind the steps submitted so far, which may still compute; it must be
        short, and must not raise."""
        self._plans.put(work)

    def close(self) -> None:
        """What has not begun never will, and ends as nothing: its machine is gone. Waits for what
        is under way."""
        self._closed = True
        self._plans.put(None)
        self._thread.join()

    def _run(self) -> None:
        while not self._closed:
            if self._flying and (len(self._flying) == FLYING_MAX or self._is_ready()):
                self._finish()
                continue
            try:
                plan = self._plans.get(timeout=LOOK_EVERY_S if self._flying else None)
            except queue.Empty:
                continue
            if plan is None or self._closed:
                continue
            if isinstance(plan, BatchPlan):
                self._launch(plan)
            else:
                plan()
        while self._flying:
            self._finish()

    def _is_ready(self) -> bool:
        try:
            return self._flying[0].ready()
        except Exception:  # noqa: BLE001 whatever the device says is for `finish` to hear
            return True

    def _launch(self, plan: BatchPlan) -> None:
        while self._flying and self._runner.waits(plan):
            self._finish()
        began_s = time.monotonic()
        try:
            step: Step | Exception = self._runner.launch(plan)
        except Exception as error:  # noqa: BLE001 it is told when those before it have ended
            step = error
        self._flying.append(_Flight(plan, step, began_s))

    def _finish(self) -> None:
        plan, step, began_s = self._flying.popleft()
        try:
            if isinstance(step, Exception):
                raise step
            outputs = step.finish()
            event = self._done(plan, outputs, max(began_s, self._ended_s))
        except Exception as error:  # noqa: BLE001 whatever it is, the machine has to hear of it
            _LOG.error("step %d failed", plan.step, exc_info=error)
            event = self._failed(plan, error)
        self._ended_s = time.monotonic()
        self._post(event)
