"""Workers, jobs and messages for the tests of this folder."""

from collections.abc import Sequence
from typing import Any

import msgspec

from slipstream.core.job import Job
from slipstream.core.prefix import namespace
from slipstream.messages import Decode, NodeInfo, Prefill, WorkerInfo
from slipstream.types import NodeId, Role, SamplingParams, pack_tokens

LAYOUT = "fake/float32/l1"
EPOCH = 5


def worker_info(**changes: object) -> WorkerInfo:
    fields = {
        "model": "fake",
        "kv_layout_id": LAYOUT,
        "num_blocks": 16,
        "block_bytes": 64,
        "max_model_len": 200,
        "vocab_size": 64,
        "max_num_seqs": 4,
        "prefill_budget_tokens": 64,
        "accept_decode": True,
        **changes,
    }
    return msgspec.convert(fields, WorkerInfo)


def node_info(
    node_id: NodeId = "decode-0", epoch: int = EPOCH, worker: WorkerInfo | None = None
) -> NodeInfo:
    """A node of the role that its name begins with."""
    role = Role(node_id.partition("-")[0])
    return NodeInfo(node_id=node_id, role=role, epoch=epoch, address=node_id, worker=worker)


def sampling_of(fields: dict[str, object]) -> SamplingParams:
    return msgspec.convert({"max_tokens": 20, "seed": 1, **fields}, SamplingParams)


def _common(
    request_id: str, attempt: int, prompt: Sequence[int], accepted: Sequence[int], salt: str
) -> dict[str, Any]:
    return {
        "request_id": request_id,
        "attempt": attempt,
        "prompt": pack_tokens(list(prompt)),
        "accepted": pack_tokens(list(accepted)),
        "tokenizer": "tokenizer-0",
        "timeout_s": 100.0,
        "salt": salt,
    }


def decode(
    request_id: str = "r",
    prompt: Sequence[int] = (1, 2, 3),
    *,
    attempt: int = 1,
    accepted: Sequence[int] = (),
    source: NodeId | None = None,
    salt: str = "",
    claimed: int = 0,
    holder: NodeId | None = None,
    holder_blocks: int = 0,
    **sampling: object,
) -> Decode:
    """`source`: the prefill worker, of epoch 7; `holder`: of `EPOCH`."""
    return Decode(
        **_common(request_id, attempt, prompt, accepted, salt),
        sampling=sampling_of(sampling),
        prefill=source,
        prefill_epoch=7 if source else 0,
        claimed_blocks=claimed,
        holder=holder,
        holder_epoch=EPOCH if holder else 0,
        holder_blocks=holder_blocks,
    )


def prefill(
    request_id: str = "r",
    prompt: Sequence[int] = (1, 2, 3),
    *,
    attempt: int = 1,
    accepted: Sequence[int] = (),
    target: NodeId = "decode-0",
    salt: str = "",
    **sampling: object,
) -> Prefill:
    return Prefill(
        **_common(request_id, attempt, prompt, accepted, salt),
        sampling=sampling_of(sampling),
        decode=target,
    )


def job_of(message: Prefill | Decode, node_id: NodeId = "decode-0", now_s: float = 0.0) -> Job:
    return Job.of(message, namespace(LAYOUT, message.salt), node_id, now_s)
