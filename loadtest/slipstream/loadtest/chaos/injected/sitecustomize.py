"""Faults for the services of a stack: Python imports this before anything else, if this folder is
on its path.

A file arms a fault, `<faults>/<one of NAMES>/<fault>.<n>`; whoever commits it renames the file
first, so that each happens once, and says in it who did it to whom. `<faults>/<one of
NAMES>.<fault>.on` makes it happen at every occasion. Nothing of the product knows of this.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

HOLD_MAX_S = 60.0
"""A run that has failed opens no gate."""
HELD_BLOCKS_MIN = 24
"""A READ of so many is not over, by any transport, when its first block has been copied."""
STALL_SHARE = 0.9
SLOWNESS = 10


def argument(flag: str) -> str:
    words = sys.orig_argv
    return words[words.index(flag) + 1] if flag in words else ""


NODE_ID = argument("--node-id")
NAMES = (NODE_ID, NODE_ID.partition("-")[0], "any")
"""Whom a fault is for: this process, one of its role, one of all."""
FAULTS = Path(argument("--run-dir")).parent / "faults"
"""The run directory lies in the stack's folder, and so do the faults."""


def commit(fault: str, told: str = "") -> bool:
    """Whether this fault is armed; then it is this caller's."""
    for folder in (FAULTS / name for name in NAMES):
        for armed in sorted(folder.glob(f"{fault}.[0-9]*")):
            done = armed.with_name(f"done.{armed.name}")
            try:
                armed.rename(done)
            except FileNotFoundError:
                continue
            done.write_text(f"{NODE_ID} {told}".strip())
            return True
    return False


def switched(fault: str) -> str:
    """What it is switched to; empty: it does not happen."""
    for name in NAMES:
        try:
            return (FAULTS / f"{name}.{fault}.on").read_text()
        except FileNotFoundError:
            continue
    return ""


def wait_for_gate() -> None:
    deadline_s = time.monotonic() + HOLD_MAX_S
    while not (FAULTS / "gate").exists() and time.monotonic() < deadline_s:
        time.sleep(0.005)


def replace(owner: Any, **new: Any) -> None:
    """In a module or a class."""
    for name, value in new.items():
        setattr(owner, name, value)


def spoil_reads() -> None:
    import msgspec
    import numpy as np

    from slipstream.engine import transfers
    from slipstream.kernels.verified_copy import verified_copy
    from slipstream.kv import bus_reader, nixl_reads, shm
    from slipstream.kv.device import store
    from slipstream.kv.transport import Read, TransferError

    class Doomed(np.ndarray):
        """The pool, as the target of a READ to which something is going to happen."""

        fault = ""

    places: list[tuple[Any, str]] = [(shm, "verified_copy")]
    places += [(bus_reader, "store"), (nixl_reads, "store")]
    real_read, real_copy = Read, verified_copy
    rng = random.Random(NODE_ID)

    def read(peer: Any, sources: Any, into: Any, local: Any, deadline_s: float, done: Any) -> Any:
        """Every READ of the machine; those that measure a peer are made elsewhere."""
        rate = switched("lossy")
        if rate and rng.random() < float(rate):
            raise TransferError("transport", "injected")
        if commit("epoch", peer.node_id):
            peer = msgspec.structs.replace(peer, epoch=peer.epoch - 1)
        fault = next((name for name in ("flip", "swap") if commit(name, peer.node_id)), "")
        if not fault and len(sources) >= HELD_BLOCKS_MIN:
            fault = next((name for name in ("hold", "stall") if commit(name, peer.node_id)), "")
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
        if fault == "swap":
            source, rows = np.roll(source[list(rows)], 64, axis=1), range(len(rows))
        if fault in ("hold", "stall"):
            cut = 1 if fault == "hold" else max(1, int(len(rows) * STALL_SHARE))
            first = real_copy(source, rows[:cut], plain, targets[:cut], digest)
            wait_for_gate()
            return first + real_copy(source, rows[cut:], plain, targets[cut:], digest)
        return real_copy(source, rows, plain, targets, digest)

    replace(transfers, Read=read)
    for module, name in places:
        assert getattr(module, name) in (real_copy, store)
        replace(module, **{name: copy})


def restrict_transports() -> None:
    """To the one that is switched on, as `--transports` would without starting anew."""
    from slipstream.kv.choice import Transports

    real_common, real_choose = Transports._common, Transports.choose

    def allowed(transport: Any) -> bool:
        return switched("transport") in ("", transport.name)

    def common(self: Any, peer: Any) -> Any:
        return [one for one in real_common(self, peer) if allowed(one)]

    def choose(self: Any, peer: Any) -> Any:
        known = self._life(peer)
        if known.transport is not None and not allowed(known.transport):
            known.transport = None
        return real_choose(self, peer)

    replace(Transports, _common=common, choose=choose)


def spoil_leases() -> None:
    from slipstream.core.exchange import Exchange
    from slipstream.core.lender import Lender

    real_renew, real_release = Exchange.renew, Lender.release

    def renew(self: Any) -> Any:
        """No word to the lender as long as it is switched on."""
        effects = real_renew(self)
        if effects and switched("mute"):
            (FAULTS / NODE_ID).mkdir(exist_ok=True)
            (FAULTS / NODE_ID / "done.mute.0").touch()
            return []
        return effects

    def release(self: Any, lease_id: str, reader: str, now_s: float) -> bool:
        """It ran out just before its reader asked, or its lender dies at the question."""
        lease = self.table.live.get(lease_id)
        if lease is not None and commit("lose", reader):
            lease.expires_s = now_s
        if lease is not None and commit("die", reader):
            os.kill(os.getpid(), signal.SIGKILL)
        return bool(real_release(self, lease_id, reader, now_s))

    replace(Exchange, renew=renew)
    replace(Lender, release=release)


def spoil_steps() -> None:
    from slipstream.engine.decoder import Decoder
    from slipstream.engine.runner import Runner

    real_launch, real_forward = Runner.launch, Decoder.forward

    def launch(self: Any, plan: Any) -> Any:
        poison = switched("poison")
        if poison and any(int(poison) in admitted.tokens for admitted in plan.admitted):
            commit("poisoned")
            os.kill(os.getpid(), signal.SIGKILL)
        if plan.rows and commit("step_fail"):
            raise RuntimeError("injected: an illegal memory access was encountered")
        began_s = time.monotonic()
        if any(row.num_tokens > 1 for row in plan.rows) and commit("prompt_hold"):
            wait_for_gate()
        if plan.rows and commit("step_hold"):
            wait_for_gate()
        step = real_launch(self, plan)
        if switched("slow"):
            time.sleep((SLOWNESS - 1) * (time.monotonic() - began_s))
        return step

    def forward(self: Any, batch: Any, pool: Any) -> Any:
        logits = real_forward(self, batch, pool)
        if logits.shape[0] and commit("nan"):
            logits[0] = float("nan")
        return logits

    replace(Runner, launch=launch)
    replace(Decoder, forward=forward)


def spoil_encoding() -> None:
    from slipstream.tokenizer.executor import EncodeExecutor

    real_encode: Any = EncodeExecutor._encode

    def encode(self: Any, *given: Any) -> None:
        if commit("encode_hold"):
            wait_for_gate()
        real_encode(self, *given)

    replace(EncodeExecutor, _encode=encode)


if NODE_ID.startswith(("prefill-", "decode-")):
    restrict_transports()
    spoil_reads()
    spoil_leases()
    spoil_steps()
elif NODE_ID.startswith("tokenizer-"):
    spoil_encoding()
