"""A stack whose workers made int8 of their weights: said at its start, right in its answers."""

from e2e.client import Client
from e2e.stack import Stack

COUNTING = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17,"


async def test_int8_answers_sensibly_through_a_transfer() -> None:
    stack = Stack(dtype="bfloat16", quantization="int8")
    try:
        assert ", int8 weights)\n" in stack.log
        async with Client(stack.url) as client:
            answer = await client.complete(COUNTING, max_tokens=8)
            assert answer.text.startswith(" 18, 19")
            again = await client.complete(COUNTING, max_tokens=8)
            assert again.text == answer.text
        reads = [fields for _, name, fields in stack.story("decode-0") if name == "PullDone"]
        assert reads and all(fields["error"] is None for fields in reads)
        stack.close()
    finally:
        stack.kill()
