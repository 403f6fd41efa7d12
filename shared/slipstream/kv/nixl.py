"""Transport `nixl`: UCX, through NIXL: RDMA where there is some, else TCP."""

import base64
import math

import msgspec

from slipstream.kv.device import DeviceBlocks, PoolBlocks
from slipstream.kv.nixl_agent import NixlAgent
from slipstream.kv.nixl_reads import NAME, Address, NixlReads
from slipstream.kv.read_thread import ReadThread
from slipstream.kv.transport import Read, TransferError
from slipstream.messages import NodeInfo
from slipstream.types import NodeId

CONNECT_TIMEOUT_S = 5.0


class NixlTransport:
    """Serves our pool by NIXL's own thread; reads those of others by one of ours."""

    name = NAME

    def __init__(self, agent: NixlAgent, blocks: PoolBlocks):
        """NixlError: the pool cannot be registered."""
        self._agent: NixlAgent | None = agent
        self._pool = blocks
        if isinstance(blocks, DeviceBlocks):
            base, gpu = blocks.pointer, blocks.gpu
        else:
            base, gpu = int(blocks.ctypes.data), None
        agent.serve(base, math.prod(blocks.shape), gpu)
        address = Address(agent.metadata(), base, gpu)
        self._address = base64.b64encode(msgspec.msgpack.encode(address)).decode()
        block_bytes = int(blocks.shape[1])
        self._thread = ReadThread(NAME, lambda: NixlReads(agent.reader(), block_bytes))

    def advertise(self) -> str:
        return self._address

    def connect(self, peer: NodeInfo) -> None:
        try:
            self._thread.ask(lambda reads: reads.add(peer)).result(CONNECT_TIMEOUT_S)
        except TimeoutError:
            raise TransferError("timeout", f"{peer.node_id}: NIXL does not answer") from None

    def read(self, read: Read) -> None:
        self._thread.read(read)

    def forget(self, node_id: NodeId) -> None:
        self._thread.ask(lambda reads: reads.remove(node_id))

    def close(self) -> None:
        self._thread.close()
        agent, self._agent = self._agent, None
        if agent is not None:
            agent.close()
