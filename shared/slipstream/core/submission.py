"""Which request a stream belongs to, for who takes it over and must show that it is his."""

import hashlib
from collections.abc import Iterable

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
    return _hash(_asked(submission))


def call_digest(submissions: Iterable[Tokenize]) -> bytes:
    """Of all choices of a call, likewise."""
    return _hash(b"".join(digest(submission) for submission in submissions))


def _asked(submission: Tokenize) -> bytes:
    asked = msgspec.structs.replace(submission, attempt=1, accepted=b"", timeout_s=0.0)
    return _encode(asked)


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()
