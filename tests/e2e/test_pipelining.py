"""KV blocks travel while the prompt is still being computed."""

from e2e.client import Client
from e2e.stack import Stack


async def test_the_first_read_ends_before_the_last_chunk_starts(
    twin: Stack, twin_client: Client
) -> None:
    prompt = [1000 + index for index in range(800)]
    answer = await twin_client.complete(prompt, max_tokens=2)
    request_id = f"{answer.id}-0"
    prefill, _, decode = twin.path(answer.id).partition(">")
    chunks = [
        (now_s, row)
        for now_s, name, fields in twin.story(prefill)
        if name == "RunBatch"
        for row in fields["plan"]["rows"]
        if row["request_id"] == request_id
    ]
    assert len(chunks) >= 6 and [row["sample"] for _, row in chunks] == [False] * (
        len(chunks) - 1
    ) + [True]
    reads = [
        (now_s, fields)
        for now_s, name, fields in twin.story(decode)
        if name == "PullDone" and fields["pull_id"].startswith(f"{request_id}/")
    ]
    assert len(reads) >= 2 and all(fields["error"] is None for _, fields in reads)
    assert reads[0][0] < chunks[-1][0]
