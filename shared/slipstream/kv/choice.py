"""Which transport serves which peer: all are connected and timed, the fastest is taken.

Until a peer has been measured, and after a READ from it has failed, the first that connects serves.
"""

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from slipstream.kv.device import DeviceBlocks
from slipstream.kv.transport import TransferError, Transport, read_now
from slipstream.messages import NodeInfo
from slipstream.types import Epoch, NodeId

_LOG = logging.getLogger(__name__)

PROBE_BYTES = 4 << 20
PROBE_READS = 3
PROBE_TIMEOUT_S = 2.0
CLEARLY = 1.2
"""How much faster a later transport has to be to be taken before an earlier one."""
RETRY_FIRST_S, RETRY_MAX_S = 1.0, 60.0
LASTING = frozenset({"epoch", "range", "layout"})
"""Causes of failed READs that say nothing about the transport."""


def best_of(rates: Mapping[str, float]) -> str:
    """Of transports in order of preference, with their rates."""
    best = next(iter(rates))
    for name, rate in rates.items():
        if rate > CLEARLY * rates[best]:
            best = name
    return best


@dataclass(slots=True)
class _Known:
    """One life of a peer."""

    epoch: Epoch
    transport: Transport | None = None
    rates: dict[str, float] = field(default_factory=dict)
    """GB/s, verified, by transport; empty until measured."""
    failed: set[str] = field(default_factory=set)
    """Transports whose last READ failed."""
    retry_s: float = RETRY_FIRST_S
    due_s: float = 0.0


class Transports:
    """The transports of one worker, in order of preference, and which of them serves which peer."""

    def __init__(
        self,
        transports: Sequence[Transport],
        kv_layout_id: str,
        block_bytes: int,
        host: str,
        absent: Mapping[str, str] | None = None,
        scratch: DeviceBlocks | None = None,
    ):
        """`host`: as in our own `NodeInfo`; a detour to a peer on the same host is worth a
        warning. `absent`: transports that cannot work here, and why. `scratch`: where READs that
        are timed land; none: in the host's memory, as our pool does."""
        self._transports = tuple(transports)
        self._kv_layout_id, self._block_bytes, self._host = kv_layout_id, block_bytes, host
        self.absent, self._scratch = dict(absent or {}), scratch
        self._known: dict[NodeId, _Known] = {}
        self._lock = threading.Lock()

    def advertise(self) -> dict[str, str]:
        """For `WorkerInfo.transports`."""
        return {transport.name: transport.advertise() for transport in self._transports}

    @property
    def peers(self) -> dict[NodeId, Epoch]:
        """Those to which something is kept open."""
        with self._lock:
            return {node_id: known.epoch for node_id, known in self._known.items()}

    def statistics(self) -> dict[str, float]:
        """`transfer_<name>_gbps`: mean of the measured rates; `transfer_<name>_peers`: whom it
        serves. Any thread."""
        with self._lock:
            lives = list(self._known.values())
        found: dict[str, float] = {}
        for name in (transport.name for transport in self._transports):
            rates = [known.rates[name] for known in lives if name in known.rates]
            if rates:
                found[f"transfer_{name}_gbps"] = sum(rates) / len(rates)
            serving = [known.transport for known in lives if known.transport]
            found[f"transfer_{name}_peers"] = sum(one.name == name for one in serving)
        return found

    def choose(self, peer: NodeInfo) -> Transport:
        """The fastest one that leads there, if they have been measured; else the first.

        TransferError `layout`: its blocks mean something else. `transport`: there is none.
        """
        known = self._life(peer)
        chosen = known.transport  # another thread may take it away
        if chosen is not None:
            return chosen
        common = self._common(peer)
        for transport in sorted(common, key=lambda one: one.name in known.failed):
            try:
                with _counted():
                    transport.connect(peer)
            except TransferError as error:
                self._tell(peer, transport, error, known)
                continue
            known.transport = transport
            return transport
        raise TransferError("transport", f"no way to {peer.node_id} that both sides have")

    def due(self, peer: NodeInfo, now_s: float) -> bool:
        """Whether this life of the peer is to be measured now; it is not ourselves."""
        if peer.worker is None or peer.worker.transports == self.advertise():
            return False
        with self._lock:
            known = self._known.get(peer.node_id)
            if known is None or known.epoch != peer.epoch:
                return True
            return not known.rates and known.due_s <= now_s

    def measure(self, peer: NodeInfo) -> None:
        """Connects every common transport, times READs, takes the fastest; blocks for seconds."""
        try:
            known, common = self._life(peer), self._common(peer)
        except TransferError as error:
            _LOG.warning("KV blocks of %s: %s", peer.node_id, error)
            self._life(peer).due_s = time.monotonic() + RETRY_MAX_S
            return
        rates: dict[str, float] = {}
        for transport in common:
            try:
                with _counted():
                    transport.connect(peer)
                    rates[transport.name] = self._rate(transport, peer)
            except TransferError as error:
                self._tell(peer, transport, error, known)
        if not rates:
            known.due_s = time.monotonic() + known.retry_s
            known.retry_s = min(2 * known.retry_s, RETRY_MAX_S)
            return
        name = best_of(rates)
        best = next(one for one in common if one.name == name)
        known.transport, known.rates, known.retry_s = best, rates, RETRY_FIRST_S
        known.failed -= rates.keys()
        others = ", ".join(
            f"{name} {rate:.2g}" for name, rate in rates.items() if name != best.name
        )
        _LOG.info(
            "KV blocks of %s come by %s, %.2g GB/s%s",
            peer.node_id,
            best.name,
            rates[best.name],
            f" ({others})" if others else "",
        )

    def failed(self, peer: NodeInfo, transport: Transport, cause: str) -> None:
        """A READ failed: what was measured no longer counts, and another way is tried first."""
        with self._lock:
            known = self._known.get(peer.node_id)
        if known is None or known.epoch != peer.epoch or cause in LASTING:
            return
        known.failed.add(transport.name)
        known.transport, known.rates = None, {}
        known.due_s = time.monotonic() + known.retry_s
        known.retry_s = min(2 * known.retry_s, RETRY_MAX_S)

    def forget(self, node_id: NodeId) -> None:
        with self._lock:
            self._known.pop(node_id, None)
        for transport in self._transports:
            transport.forget(node_id)

    def close(self) -> None:
        for transport in self._transports:
            transport.close()

    def _life(self, peer: NodeInfo) -> _Known:
        with self._lock:
            known = self._known.get(peer.node_id)
            if known is not None and known.epoch == peer.epoch:
                return known
        if known is not None:
            self.forget(peer.node_id)
        with self._lock:
            return self._known.setdefault(peer.node_id, _Known(peer.epoch))

    def _common(self, peer: NodeInfo) -> list[Transport]:
        worker = peer.worker
        if worker is None:
            raise TransferError("transport", f"{peer.node_id} is no worker")
        ours = (self._kv_layout_id, self._block_bytes)
        if (worker.kv_layout_id, worker.block_bytes) != ours:
            raise TransferError("layout", f"{peer.node_id} has {worker.kv_layout_id}")
        return [one for one in self._transports if one.name in worker.transports]

    def _rate(self, transport: Transport, peer: NodeInfo) -> float:
        """GB/s of verified READs into memory that is nobody's."""
        assert peer.worker is not None
        count = min(max(1, PROBE_BYTES // self._block_bytes), peer.worker.num_blocks)
        scratch = self._scratch or np.empty((count, self._block_bytes), np.uint8)
        times_s = []
        for _ in range(PROBE_READS):
            began_s = time.monotonic()
            rows = range(count)
            read_now(transport, peer, rows, scratch, rows, PROBE_TIMEOUT_S)
            times_s.append(time.monotonic() - began_s)
        return count * self._block_bytes / min(times_s) / 1e9

    def _tell(
        self, peer: NodeInfo, transport: Transport, error: TransferError, known: _Known
    ) -> None:
        """Once a life: a way that both sides have and that does not lead there."""
        if transport.name not in known.failed:
            known.failed.add(transport.name)
            level = logging.WARNING if peer.host == self._host else logging.INFO
            _LOG.log(level, "SLOW: no %s from %s: %s", transport.name, peer.node_id, error)


@contextmanager
def _counted() -> Iterator[None]:
    """What goes wrong here is that transport's failure; another one may lead there."""
    try:
        yield
    except TransferError:
        raise
    except Exception as error:
        _LOG.exception("a transport failed for no reason that is known")
        raise TransferError("internal", f"{type(error).__name__}: {error}") from error
