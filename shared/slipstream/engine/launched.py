"""A step on its way: which rows draw, and what they have drawn, on the device."""

from collections.abc import Callable, Sequence

from torch import Tensor

from slipstream.core.machine import BatchPlan, Row
from slipstream.engine.readback import Readback
from slipstream.engine.step_loop import Outputs


class Launched:
    def __init__(
        self,
        finish: Callable[["Launched"], Outputs],
        plan: BatchPlan,
        rows: Sequence[Row],
        tokens: Tensor,
        tops: Tensor,
    ) -> None:
        """`rows`: those that sample; `tokens`, `tops`: of each, as of `Backend.draw_async`."""
        self.plan, self.rows, self.tokens = plan, rows, tokens
        self.places = {(row.request_id, row.attempt): index for index, row in enumerate(rows)}
        """In `tokens`."""
        self.readback = Readback(tokens, tops)
        self._finish = finish

    def ready(self) -> bool:
        return self.readback.ready()

    def finish(self) -> Outputs:
        return self._finish(self)
