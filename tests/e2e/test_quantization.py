"""A stack whose workers made int8 of their weights: said at its start, right in its answers."""

from openai import OpenAI

from e2e.stack import Stack


def test_int8_answers_sensibly_through_a_transfer() -> None:
    stack = Stack(dtype="bfloat16", quantization="int8")
    try:
        assert ", int8 weights)\n" in stack.log
        client = OpenAI(base_url=f"{stack.url}/v1", api_key="unused")
        answers = [
            client.chat.completions.create(
                model="smollm2-135m-instruct",
                messages=[{"role": "user", "content": "What is the capital of France?"}],
                temperature=0,
                max_tokens=24,
            )
            .choices[0]
            .message.content
            for _ in range(2)
        ]
        assert answers[0] == answers[1] and "Paris" in (answers[0] or "")
        reads = [fields for _, name, fields in stack.story("decode-0") if name == "PullDone"]
        assert reads and all(fields["error"] is None for fields in reads)
        stack.close()
    finally:
        stack.kill()
