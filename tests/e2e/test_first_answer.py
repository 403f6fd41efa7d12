"""A client of OpenAI's own library, six processes, one answer."""

from openai import OpenAI

from e2e.stack import Stack


def test_a_streamed_answer_is_right_and_came_through_a_transfer(stack: Stack) -> None:
    client = OpenAI(base_url=f"{stack.url}/v1", api_key="unused")
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "Paris" in text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    usage = chunks[-1].usage
    assert usage is not None and usage.completion_tokens > 0
    reads = [fields for _, name, fields in stack.story("decode-0") if name == "PullDone"]
    assert reads and all(fields["error"] is None for fields in reads)


def test_every_process_is_there(stack: Stack) -> None:
    expected = {"serve", "redis", "scheduler-0", "kvindex-0", "tokenizer-0", "frontend-0"}
    assert stack.pids().keys() == expected | {"prefill-0", "decode-0"}
    assert len(stack.segments()) == 2
