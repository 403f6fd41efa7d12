"""The transports that a worker offers: those asked for, or all that can work here."""

from collections.abc import Callable
from typing import NamedTuple

from slipstream.config import ConfigError
from slipstream.kv.bus import BusTransport
from slipstream.kv.cuda_driver import CudaDriver, CudaError
from slipstream.kv.cuda_ipc import CudaIpcTransport, DevicePool
from slipstream.kv.nixl import NixlTransport
from slipstream.kv.nixl_agent import NixlAgent, NixlError
from slipstream.kv.segment import Segment
from slipstream.kv.shm import ShmTransport
from slipstream.kv.transport import Transport

AUTO = "auto"
KINDS = ("cuda_ipc", "shm", "nixl", "bus")
"""In order of preference, for peers that have not been measured."""


class Pool(NamedTuple):
    """What a worker's transports serve from, and where."""

    segment: Segment
    node_id: str
    bus_bind: str
    """Where the KV socket listens: `kv.bus.bus_address`."""
    advertise: str
    """Our bus address, for the host in it."""
    device: DevicePool | None = None
    """The pool, where it is in the memory of a CUDA device."""
    host: str = ""
    """As in our `NodeInfo`."""


class Offers(NamedTuple):
    transports: list[Transport]
    absent: dict[str, str]
    """Transports that cannot work here, and why."""


class _Absent(Exception):
    pass


def offer(names: str, pool: Pool) -> Offers:
    """`names`: `auto`, or kinds parted by commas, best first.

    ConfigError: one of them is not known, or was asked for by name and cannot work here.
    StartError: an address is taken.
    """
    wanted = list(KINDS) if names == AUTO else names.split(",")
    for name in wanted:
        if name not in KINDS:
            known = ", ".join((AUTO, *KINDS))
            raise ConfigError(f"slipstream: --transports: {name} is not known (only {known})")
    offers = Offers([], {})
    try:
        for name in wanted:
            try:
                offers.transports.append(_MAKERS[name](pool))
            except _Absent as reason:
                if names != AUTO:
                    raise ConfigError(f"slipstream: --transports: no {name}: {reason}") from None
                offers.absent[name] = str(reason)
    except BaseException:
        for transport in offers.transports:
            transport.close()
        raise
    return offers


def _cuda_ipc(pool: Pool) -> Transport:
    if pool.device is None:
        raise _Absent("the pool is in host memory")
    try:
        return CudaIpcTransport(CudaDriver(), pool.device, pool.host)
    except CudaError as error:
        raise _Absent(str(error)) from None


def _nixl(pool: Pool) -> Transport:
    segment = pool.segment
    try:
        agent = NixlAgent(f"{pool.node_id}@{segment.header.epoch}")
        return NixlTransport(agent, segment.blocks)
    except NixlError as error:
        raise _Absent(str(error)) from None


def _bus(pool: Pool) -> Transport:
    segment = pool.segment
    return BusTransport(segment.blocks, segment.header.epoch, pool.bus_bind, pool.advertise)


_MAKERS: dict[str, Callable[[Pool], Transport]] = {
    "cuda_ipc": _cuda_ipc,
    "shm": lambda pool: ShmTransport(pool.segment),
    "nixl": _nixl,
    "bus": _bus,
}
