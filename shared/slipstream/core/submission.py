"""Which request a stream belongs to, for who takes it over and must show that it is his."""

import hashlib

import msgspec

from slipstream.errors import ErrorCode, Problem
from slipstream.messages import Tokenize

TAKEN = Problem(
    code=ErrorCode.STREAM_TAKEN,
    message="Another frontend has taken this stream over; it goes on there.",
)

_encode = msgspec.msgpack.Encoder().encode


def digest(submission: Tokenize) -> bytes:
    """32 bytes over all that was asked and who asked it: the same for each attempt, whatever is
    left of the time budget."""
    asked = msgspec.structs.replace(submission, attempt=1, accepted=b"", timeout_s=0.0)
    return hashlib.blake2b(_encode(asked), digest_size=32).digest()
