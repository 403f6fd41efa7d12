"""CUDA IPC: a pool in one process, read from another one on the same card.

python -m slipstream.loadtest.gpu.moves NUM_BLOCKS BLOCK_BYTES      (the process with the pool)
"""

import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import torch

from slipstream.engine.gpu import block_kernels, tensor_of
from slipstream.engine.model_config import ModelConfig
from slipstream.kv.cuda_driver import CudaDriver
from slipstream.kv.cuda_ipc import CudaIpcTransport
from slipstream.kv.device import DeviceSegment, create_device_segment
from slipstream.kv.probe import LAYOUT, ProbePool
from slipstream.kv.segment import SegmentHeader
from slipstream.kv.transport import read_now
from slipstream.loadtest.gpu.floors import DEVICE, median_ms
from slipstream.loadtest.gpu.results import Row, rate_row
from slipstream.messages import NodeInfo

POOL_BYTES = 4 << 30
WAIT_S = 30.0
WANTED = 0.8


def segment_of(num_blocks: int, block_bytes: int) -> DeviceSegment:
    header = SegmentHeader(
        kv_layout_id=LAYOUT, epoch=1, num_blocks=num_blocks, block_bytes=block_bytes
    )
    return create_device_segment(header, DEVICE.index, 0, block_kernels(DEVICE))


def measure(folder: Path, floors: dict[str, float], tell: Callable[[Row], None]) -> None:
    """Payload in GB/s, beside a copy of as many bytes within the process."""
    torch.cuda.set_device(DEVICE)
    size = ModelConfig.read(folder, dummy=True).kv_layout("bfloat16").block_bytes
    count = POOL_BYTES // size
    segment = segment_of(count, size)
    ours = tensor_of(segment.blocks)
    other = torch.randint_like(ours, 255)
    floor = ours.nbytes / median_ms(lambda: ours.copy_(other), 9) / 1e6
    tell(Row("a copy within a process", floor, "GB/s"))
    command = [sys.executable, "-m", "slipstream.loadtest.gpu.moves", str(count), str(size)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        peer = msgspec.json.decode(child.stdout.readline(), type=NodeInfo)
        transport = CudaIpcTransport(CudaDriver(DEVICE.index), segment.blocks, "here")
        transport.connect(peer)
        rows = list(range(count))
        mixed = random.Random(0).sample(rows, count)
        few = mixed[: max(1, (64 << 20) // size)]
        for name, asked, verify, wanted in (
            ("READ of all blocks, verified", mixed, True, WANTED),
            ("READ of all blocks, bare", mixed, False, 0.0),
            ("READ of all blocks in order, bare", rows, False, 0.0),
            ("READ of 64 MiB, verified", few, True, 0.0),
        ):
            local = random.Random(1).sample(rows, len(asked)) if asked is not rows else rows
            words = peer, asked, segment.blocks, local, WAIT_S, verify
            ms = median_ms(partial(read_now, transport, *words), 7)
            rate = len(asked) * size / ms / 1e6
            tell(rate_row(name, rate, "GB/s", floor, wanted))
    finally:
        child.kill()
        child.wait()


def main(argv: list[str]) -> int:
    torch.cuda.set_device(DEVICE)
    count, size = map(int, argv)
    segment = segment_of(count, size)
    tensor_of(segment.blocks).random_(0, 255)
    torch.cuda.synchronize()
    transport = CudaIpcTransport(CudaDriver(DEVICE.index), segment.blocks, "here")
    pool = ProbePool(Path(), "source", count, size)
    info = pool.info({transport.name: transport.advertise()})
    print(msgspec.json.encode(info).decode(), flush=True)
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
