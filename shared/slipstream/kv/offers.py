"""The transports that a worker offers: those asked for, or all that can work here."""

from collections.abc import Callable
from typing import NamedTuple

from slipstream.config import AUTO_TRANSPORTS, SetupError
from slipstream.curve import Keys
from slipstream.kv.bus import BusTransport
from slipstream.kv.cuda_driver import CudaDriver, CudaError
from slipstream.kv.cuda_ipc import CudaIpcTransport
from slipstream.kv.device import DeviceBlocks, DeviceSegment
from slipstream.kv.nixl import NixlTransport
from slipstream.kv.nixl_agent import NOT_INSTALLED, NixlAgent, NixlError, nixl_installed
from slipstream.kv.segment import Segment
from slipstream.kv.shm import ShmTransport
from slipstream.kv.transport import Transport
from slipstream.types import TRANSPORTS

_HOST_POOL = "the pool is in host memory"
_GPU_POOL = "the pool is in a GPU's memory"


class Pool(NamedTuple):
    """What a worker's transports serve from, and where."""

    segment: Segment | DeviceSegment
    node_id: str
    bus_bind: str
    """Where the KV socket listens: `kv.bus.bus_address`."""
    advertise: str
    """Our bus address, for the host in it."""
    host: str = ""
    """As in our `NodeInfo`."""
    keys: Keys | None = None
    """Of the bus."""


class Offers(NamedTuple):
    transports: list[Transport]
    absent: dict[str, str]
    """Transports that cannot work here, and why."""


class _Absent(Exception):
    pass


def offer(names: str, pool: Pool) -> Offers:
    """`names`: `auto`, or kinds parted by commas, best first.

    SetupError: one of them was asked for by name and cannot work here. StartError: an address is
    taken.
    """
    wanted = TRANSPORTS if names == AUTO_TRANSPORTS else names.split(",")
    offers = Offers([], {})
    try:
        for name in wanted:
            try:
                offers.transports.append(_MAKERS[name](pool))
            except _Absent as reason:
                if names != AUTO_TRANSPORTS:
                    raise _refusal(name, str(reason)) from None
                offers.absent[name] = str(reason)
    except BaseException:
        for transport in offers.transports:
            transport.close()
        raise
    return offers


def require_possible(names: str, on_gpu: bool | None) -> None:
    """What is known before there is a pool, in a GPU's memory, the host's, or one of the two.
    SetupError: a transport was asked for by name, and cannot work on this machine."""
    wanted = [] if names == AUTO_TRANSPORTS else names.split(",")
    if "nixl" in wanted and not nixl_installed():
        raise _refusal("nixl", NOT_INSTALLED)
    if "cuda_ipc" in wanted and on_gpu is False:
        raise _refusal("cuda_ipc", _HOST_POOL)
    if "shm" in wanted and on_gpu:
        raise _refusal("shm", _GPU_POOL)


def _refusal(name: str, reason: str) -> SetupError:
    return SetupError(
        f"slipstream: --transports: no {name}: {reason}; leave it out, or take {AUTO_TRANSPORTS}"
    )


def _cuda_ipc(pool: Pool) -> Transport:
    blocks = pool.segment.blocks
    if not isinstance(blocks, DeviceBlocks):
        raise _Absent(_HOST_POOL)
    try:
        return CudaIpcTransport(CudaDriver(blocks.gpu), blocks, pool.host)
    except CudaError as error:
        raise _Absent(str(error)) from None


def _shm(pool: Pool) -> Transport:
    if isinstance(pool.segment, DeviceSegment):
        raise _Absent(_GPU_POOL)
    return ShmTransport(pool.segment)


def _nixl(pool: Pool) -> Transport:
    segment = pool.segment
    try:
        agent = NixlAgent(f"{pool.node_id}@{segment.header.epoch}")
        return NixlTransport(agent, segment.blocks)
    except NixlError as error:
        raise _Absent(str(error)) from None


def _bus(pool: Pool) -> Transport:
    segment = pool.segment
    return BusTransport(
        segment.blocks, segment.header.epoch, pool.bus_bind, pool.advertise, pool.keys
    )


_MAKERS: dict[str, Callable[[Pool], Transport]] = {
    "cuda_ipc": _cuda_ipc,
    "shm": _shm,
    "nixl": _nixl,
    "bus": _bus,
}
