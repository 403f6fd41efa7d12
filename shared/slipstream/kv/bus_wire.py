"""What readers and servers of transport `bus` say to each other.

A reader asks for a few MiB at a time and has a few questions under way, so the server keeps no
state and queues no more than that for one READ.
"""

from typing import Literal, TypeAlias

import msgspec

NAME = "bus"
REPLY_BYTES = 4 << 20
"""Block bytes in one reply, unless a single block is larger."""
REQUEST_BYTES_MAX = 64 << 10
Refusal: TypeAlias = Literal["epoch", "range", "size"]


class ReadRequest(msgspec.Struct, frozen=True, array_like=True):
    """First question of a READ, and every later one: these blocks, if you are still `epoch`."""

    read_id: int
    part: int
    epoch: int
    blocks: list[int]


class ReadReply(msgspec.Struct, frozen=True, array_like=True):
    """Comes before the blocks, one frame each; with `error` there are none."""

    read_id: int
    part: int
    epoch: int
    error: Refusal | Literal[""] = ""


def blocks_per_reply(block_bytes: int) -> int:
    return max(1, REPLY_BYTES // block_bytes)
