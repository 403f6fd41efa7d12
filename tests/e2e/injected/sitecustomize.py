"""Faults for the workers of a stack: Python imports this before anything else, if this folder is on
its path.

A test arms a fault by a file, `<faults>/<node id>/<fault>.<n>`; whoever commits it renames the file
first, so that each happens once, and the test sees that it has happened. Nothing of the product
knows of this.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

HOLD_MAX_S = 60.0
"""A test that has failed opens no gate."""
HELD_BLOCKS_MIN = 24
"""A READ of so many is not over, by any transport, when its first block has been copied."""


def node_id() -> str:
    words = sys.orig_argv
    return words[words.index("--node-id") + 1] if "--node-id" in words else ""


FAULTS = Path(os.environ.get("E2E_FAULTS", "/nonexistent"))
HERE = FAULTS / node_id()


def commit(fault: str) -> bool:
    """Whether this fault is armed; then it is this caller's."""
    for armed in sorted(HERE.glob(f"{fault}.[0-9]*")):
        try:
            armed.rename(HERE / f"done.{armed.name}")
        except FileNotFoundError:
            continue
        return True
    return False


def wait_for_gate() -> None:
    deadline_s = time.monotonic() + HOLD_MAX_S
    while not (FAULTS / "gate").exists() and time.monotonic() < deadline_s:
        time.sleep(0.005)


def spoil_reads() -> None:
    import msgspec
    import numpy as np

    from slipstream.engine import transfers
    from slipstream.kv import bus_reader, nixl_reads, shm

    class Doomed(np.ndarray):
        """The pool, as the target of a READ to which something is going to happen."""

        fault = ""

    real_read, real_copy = transfers.Read, shm.verified_copy

    def read(peer: Any, sources: Any, into: Any, local: Any, deadline_s: float, done: Any) -> Any:
        """Every READ of the machine; those that measure a peer are made elsewhere."""
        if commit("epoch"):
            peer = msgspec.structs.replace(peer, epoch=peer.epoch - 1)
        fault = "flip" if commit("flip") else ""
        if not fault and len(sources) >= HELD_BLOCKS_MIN and commit("hold"):
            fault = "hold"
        if fault:
            into = into.view(Doomed)
            into.fault = fault
        return real_read(peer, sources, into, local, deadline_s, done)

    def copy(source: Any, rows: Any, target: Any, targets: Any, digest: bool) -> tuple[bytes, ...]:
        """What each transport stores and digests with, in one pass."""
        fault, plain = getattr(target, "fault", ""), np.asarray(target)
        if fault and digest:
            target.fault = ""
        if fault == "flip":
            source, rows = source[list(rows)], range(len(rows))
            # In the exponent of a float32: whoever computes with it says something else.
            source[len(rows) // 2, source.shape[1] // 3 | 3] ^= 0x40
        if fault == "hold":
            first = real_copy(source, rows[:1], plain, targets[:1], digest)
            wait_for_gate()
            return first + real_copy(source, rows[1:], plain, targets[1:], digest)
        return real_copy(source, rows, plain, targets, digest)

    transfers.Read = read
    for module in (shm, bus_reader, nixl_reads):
        assert module.verified_copy is real_copy
        module.verified_copy = copy


def restrict_transports() -> None:
    """To the one that the test names, as `--transports` would without starting anew."""
    from slipstream.kv.choice import Transports

    real_common, real_choose = Transports._common, Transports.choose

    def allowed(transport: Any) -> bool:
        named = FAULTS / "transport"
        return not named.exists() or transport.name == named.read_text()

    def common(self: Any, peer: Any) -> Any:
        return [one for one in real_common(self, peer) if allowed(one)]

    def choose(self: Any, peer: Any) -> Any:
        known = self._life(peer)
        if known.transport is not None and not allowed(known.transport):
            known.transport = None
        return real_choose(self, peer)

    Transports._common, Transports.choose = common, choose


def spoil_leases() -> None:
    from slipstream.core.exchange import Exchange
    from slipstream.core.lender import Lender

    real_renew, real_release = Exchange.renew, Lender.release

    def renew(self: Any) -> Any:
        """No word to the lender as long as the test says so."""
        effects = real_renew(self)
        if effects and (HERE / "mute").exists():
            (HERE / "done.mute").touch()
            return []
        return effects

    def release(self: Any, lease_id: str, reader: str, now_s: float) -> bool:
        """It ran out just before its reader asked."""
        lease = self.table.live.get(lease_id)
        if lease is not None and commit("lose"):
            lease.expires_s = now_s
        return bool(real_release(self, lease_id, reader, now_s))

    Exchange.renew, Lender.release = renew, release


if HERE.name.startswith(("prefill-", "decode-")):
    restrict_transports()
    spoil_reads()
    spoil_leases()
