"""A pool in a process of its own, to read from: for the doctor, the benchmark and the tests.

    python -m slipstream.kv.probe FOLDER NODE_ID TRANSPORTS LISTEN NUM_BLOCKS BLOCK_BYTES [EPOCH]

Prints its `NodeInfo` as one line of JSON and serves until its standard input ends. Block i is full
of bytes drawn with seed i. With a line `flip I` one bit of block I is flipped.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from slipstream.config import AUTO_TRANSPORTS
from slipstream.kv.bus import bus_address
from slipstream.kv.offers import Pool, offer
from slipstream.kv.segment import Blocks, SegmentHeader, create_segment
from slipstream.kv.transport import TransferError, Transport, read_now
from slipstream.messages import NodeInfo, WorkerInfo
from slipstream.types import Role

LAYOUT = "probe/uint8"
PATIENCE_S = 30.0


class ProbePool(NamedTuple):
    """How large the pool is, and what it is called."""

    folder: Path
    node_id: str
    num_blocks: int
    block_bytes: int
    epoch: int = 1

    def info(self, transports: dict[str, str]) -> NodeInfo:
        return NodeInfo(
            node_id=self.node_id,
            role=Role.PREFILL,
            epoch=self.epoch,
            address="",
            host="probe",
            worker=WorkerInfo(
                model="probe",
                kv_layout_id=LAYOUT,
                num_blocks=self.num_blocks,
                block_bytes=self.block_bytes,
                max_model_len=1,
                vocab_size=1,
                max_num_seqs=1,
                prefill_budget_tokens=1,
                accept_decode=False,
                transports=transports,
            ),
        )


def block_bytes_of(block: int, block_bytes: int) -> Blocks:
    """What block `block` of a probe holds, `[1, block_bytes]`."""
    return np.random.default_rng(block).integers(0, 256, (1, block_bytes), np.uint8)


class Probe:
    """A running probe; `wrap` is put before its command, `environ` replaces its environment."""

    def __init__(
        self,
        pool: ProbePool,
        transports: str,
        listen: str = "",
        wrap: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
    ):
        listen = listen or f"ipc://{pool.folder}/{pool.node_id}.sock"
        words = (pool.folder, pool.node_id, transports, listen, *pool[2:])
        self.process = subprocess.Popen(
            [*wrap, sys.executable, "-P", "-m", "slipstream.kv.probe", *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environ,
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:  # NIXL and UCX print there too
            if line.startswith(b"{"):
                self.info = msgspec.json.decode(line, type=NodeInfo)
                return
        self.stop()
        raise RuntimeError(f"the probe {pool.node_id} ended with {self.process.returncode}")

    def flip(self, block: int) -> None:
        """Flips a bit of the block; it is done when this returns."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"flip {block}\n".encode())
        self.process.stdin.flush()
        while self.process.stdout.readline() != b"flipped\n":
            assert self.process.poll() is None

    def stop(self) -> None:
        """Ends the process, stopped or not. Idempotent."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait(PATIENCE_S)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


def rate(
    transport: Transport, peer: NodeInfo, into: Blocks, verify: bool, repeats: int = 7
) -> float:
    """GB/s of READs of all blocks of the peer into the first of `into`: best of `repeats`."""
    assert peer.worker is not None
    rows = range(min(peer.worker.num_blocks, len(into)))
    times_s = []
    for _ in range(repeats):
        began_s = time.perf_counter()
        read_now(transport, peer, rows, into, rows, PATIENCE_S, verify)
        times_s.append(time.perf_counter() - began_s)
    return len(rows) * int(into.shape[1]) / min(times_s) / 1e9


def memcpy_rate(source: Blocks, target: Blocks, repeats: int = 7) -> float:
    """GB/s of one `memcpy` of everything: best of `repeats`."""
    times_s = []
    for _ in range(repeats):
        began_s = time.perf_counter()
        np.copyto(target, source)
        times_s.append(time.perf_counter() - began_s)
    return source.nbytes / min(times_s) / 1e9


class Row(msgspec.Struct, frozen=True):
    """One transport, between two processes of this machine. GB/s."""

    name: str
    verified: float = 0.0
    bare: float = 0.0
    reason: str = ""
    """Why it does not work here."""


def measure_all(
    folder: Path, num_blocks: int, block_bytes: int, repeats: int
) -> tuple[float, list[Row]]:
    """GB/s of memcpy, and of every kind of transport; `folder`: in memory, for the segments."""
    header = SegmentHeader(
        kv_layout_id=LAYOUT, epoch=1, num_blocks=num_blocks, block_bytes=block_bytes
    )
    with ExitStack() as stack:
        ours = create_segment(folder / "reader.kv", header)
        stack.callback(ours.close)
        source = np.ones_like(ours.blocks)
        memcpy = memcpy_rate(source, ours.blocks, repeats)
        del source
        bind = f"ipc://{folder}/reader.kv.sock"
        offers = offer(AUTO_TRANSPORTS, Pool(ours, "reader", bind, bind))
        for made in offers.transports:
            stack.callback(made.close)
        probe = Probe(ProbePool(folder, "source", num_blocks, block_bytes), AUTO_TRANSPORTS)
        stack.callback(probe.stop)
        rows = []
        for transport in offers.transports:
            try:
                transport.connect(probe.info)
                read_now(transport, probe.info, [0], ours.blocks, [0], PATIENCE_S)
                verified, bare = (
                    rate(transport, probe.info, ours.blocks, verify, repeats)
                    for verify in (True, False)
                )
                rows.append(Row(transport.name, verified, bare))
            except TransferError as error:
                rows.append(Row(transport.name, reason=str(error)))
        return memcpy, rows + [Row(name, reason=why) for name, why in offers.absent.items()]


def main(argv: Sequence[str]) -> int:
    folder, node_id, transports, listen, *numbers = argv
    pool = ProbePool(Path(folder), node_id, *map(int, numbers))
    header = SegmentHeader(
        kv_layout_id=LAYOUT,
        epoch=pool.epoch,
        num_blocks=pool.num_blocks,
        block_bytes=pool.block_bytes,
    )
    with ExitStack() as stack:
        segment = create_segment(pool.folder / f"{node_id}-{pool.epoch}.kv", header)
        stack.callback(segment.close)
        for block in range(pool.num_blocks):
            segment.blocks[block] = block_bytes_of(block, pool.block_bytes)
        offers = offer(
            transports, Pool(segment, node_id, bus_address(listen, folder, node_id), listen)
        )
        for made in offers.transports:
            stack.callback(made.close)
        info = pool.info({made.name: made.advertise() for made in offers.transports})
        print(msgspec.json.encode(info).decode(), flush=True)
        for line in sys.stdin:
            segment.blocks[int(line.split()[1]), pool.block_bytes // 2] ^= 1
            print("flipped", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
