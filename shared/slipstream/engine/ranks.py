"""The processes that hold one model between them, as each of them sees the others' tensors."""

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

JOIN_TIMEOUT_S = 120.0
"""Until all ranks are there. In a step they wait for each other without an end of their own: who
dies is noticed by its control socket (`engine.team`)."""
STEP_TIMEOUT_S = 3600.0


class Ranks:
    """One of them. Every rank calls the same operations in the same order, on one thread."""

    def __init__(self, size: int, rank: int, meeting: Path, device: torch.device) -> None:
        """`meeting`: a file that only these ranks know; it is made, and may be removed when all are
        there. RuntimeError: somebody did not come in time."""
        # Imported here: not every build of torch has it.
        from torch._C._distributed_c10d import FileStore

        self.size, self.rank, self.device = size, rank, device
        store = FileStore(str(meeting), size)
        store.set_timeout(timedelta(seconds=JOIN_TIMEOUT_S))
        kind = "nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            kind,
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=STEP_TIMEOUT_S),
            device_id=device if device.type == "cuda" else None,
        )
        self._mark = torch.zeros(1, device=device)
        self.meet()

    def reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, in place, the same bits everywhere."""
        dist.all_reduce(x)
        return x

    def meet(self) -> None:
        """Nobody goes on before all are here, with what each has begun before done."""
        dist.all_reduce(self._mark)

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's `x`, in place."""
        dist.broadcast(x, 0)
        return x

    def close(self) -> None:
        dist.destroy_process_group()


class Part:
    """Which share of a tensor is this rank's; `Part()` is all of it."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    def of(self, length: int) -> slice:
        """Of a dimension that `size` divides."""
        share = length // self.size
        return slice(self.rank * share, (self.rank + 1) * share)
