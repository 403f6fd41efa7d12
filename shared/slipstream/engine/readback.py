"""Numbers on their way from the device to the host, which need not wait for them yet."""

from typing import Any

import torch
from torch import Tensor


class Readback:
    """What the device computes now is not waited for before `values`."""

    def __init__(self, *tensors: Tensor) -> None:
        self._event: Any = None
        self._host = tensors
        if tensors[0].is_cuda:
            self._host = tuple(_begun(tensor) for tensor in tensors)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(tensors[0].device))

    def ready(self) -> bool:
        """Whether `values` will not wait. RuntimeError: the device has failed."""
        return self._event is None or bool(self._event.query())

    def values(self) -> list[list[float]]:
        """Of each tensor. RuntimeError: the device has failed."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.tolist() for tensor in self._host]


def _begun(tensor: Tensor) -> Tensor:
    """Into pinned memory: any other is copied to while the host waits."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
