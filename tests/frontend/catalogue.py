"""Bodies: what is refused with which status, code and parameter, and what must be let in."""

from typing import Any

from frontend.fakes import MODEL, chat_body

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
UNSET = object()


def chat(**members: Any) -> tuple[str, Any]:
    body = {name: value for name, value in chat_body(**members).items() if value is not UNSET}
    return CHAT, body


def complete(**members: Any) -> tuple[str, Any]:
    body = {"model": MODEL, "prompt": "Hi", **members}
    return COMPLETE, {name: value for name, value in body.items() if value is not UNSET}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def raw(text: str | bytes) -> tuple[str, bytes]:
    """A chat body whose text cannot come from an encoder; `%` stands for the usual members."""
    data = text.encode() if isinstance(text, str) else text
    usual = b'"model":"demo","messages":[{"role":"user","content":"Hi"}]'
    return CHAT, data.replace(b"%", usual)


def tool(name: Any, **members: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **members}}


def deep(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


def chosen(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def schema(value: Any, name: str | None = "s") -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": value}}


TOOL_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}

# name -> ((path, body), status, code, param)
REFUSED: dict[str, tuple[tuple[str, Any], int, str, str | None]] = {
    # Bodies
    "empty": (raw(""), 400, "invalid_json", None),
    "truncated": (raw("{"), 400, "invalid_json", None),
    "array": (raw("[]"), 400, "invalid_type", None),
    "string": (raw('"x"'), 400, "invalid_type", None),
    "number": (raw("5"), 400, "invalid_type", None),
    "null": (raw("null"), 400, "invalid_type", None),
    "invalid utf-8": (raw(b'{%,"user":"\xff"}'), 400, "invalid_json", None),
    "lone surrogate": (raw('{%,"user":"\\ud800"}'), 400, "invalid_json", None),
    "byte order mark": (raw(b"\xef\xbb\xbf{%}"), 400, "invalid_json", None),
    "after the end": (raw("{%}x"), 400, "invalid_json", None),
    "NaN": (raw('{%,"temperature":NaN}'), 400, "invalid_json", None),
    "Infinity": (raw('{%,"temperature":Infinity}'), 400, "invalid_json", None),
    "1e999": (raw('{%,"temperature":1e999}'), 400, "invalid_value", "temperature"),
    "deep": (raw('{%,"x":' + "[" * 10_000 + "]" * 10_000 + "}"), 400, "invalid_json", None),
    "deep, known": (raw('{%,"tool_choice":' + "[" * 40_000), 400, "invalid_json", None),
    "long integer": (raw('{%,"seed":' + "9" * 5000 + "}"), 400, "invalid_value", "seed"),
    "last one counts": (raw('{%,"n":1,"n":999}'), 400, "integer_above_max_value", "n"),
    "too large": (chat(user="x" * 200_000), 413, "request_too_large", None),
    # Model
    "no model": (chat(model=UNSET), 400, "missing_required_parameter", "model"),
    "empty model": (chat(model=""), 400, "invalid_value", "model"),
    "null model": (chat(model=None), 400, "invalid_type", "model"),
    "number model": (chat(model=5), 400, "invalid_type", "model"),
    "unknown model": (chat(model="gpt"), 404, "model_not_found", "model"),
    "path model": (chat(model="../../etc/passwd"), 404, "model_not_found", "model"),
    "long model": (chat(model="m" * 10_000), 404, "model_not_found", "model"),
    "control model": (chat(model="a\r\n\x1b[31m"), 404, "model_not_found", "model"),
    # Messages
    "no messages": (chat(messages=UNSET), 400, "missing_required_parameter", "messages"),
    "empty messages": (chat(messages=[]), 400, "empty_array", "messages"),
    "text messages": (chat(messages="hi"), 400, "invalid_type", "messages"),
    "null messages": (chat(messages=None), 400, "invalid_type", "messages"),
    "number message": (chat(messages=[user("a"), 3]), 400, "invalid_type", "messages[1]"),
    "many messages": (chat(messages=[{}] * 10_001), 400, "array_above_max_length", "messages"),
    "no role": (chat(messages=[{"content": "a"}]), 400, "invalid_value", "messages[0].role"),
    "robot": (
        chat(messages=[{"role": "robot", "content": "a"}]),
        400,
        "invalid_value",
        "messages[0].role",
    ),
    "list role": (
        chat(messages=[{"role": [], "content": "a"}]),
        400,
        "invalid_value",
        "messages[0].role",
    ),
    "tool without id": (
        chat(messages=[user("a"), {"role": "tool", "content": "a"}]),
        400,
        "missing_required_parameter",
        "messages[1].tool_call_id",
    ),
    "null content": (chat(messages=[user(None)]), 400, "invalid_type", "messages[0].content"),
    "number content": (chat(messages=[user(3)]), 400, "invalid_type", "messages[0].content"),
    "empty parts": (chat(messages=[user([])]), 400, "invalid_value", "messages[0].content"),
    "part without text": (
        chat(messages=[user([{"type": "text"}])]),
        400,
        "invalid_type",
        "messages[0].content[0].text",
    ),
    "number part": (
        chat(messages=[user([1])]),
        400,
        "invalid_type",
        "messages[0].content[0]",
    ),
    "image": (
        chat(messages=[user([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}])]),
        400,
        "unsupported_content_type",
        "messages[0].content[0]",
    ),
    "audio part": (
        chat(messages=[user([{"type": "text", "text": "a"}, {"type": "input_audio"}])]),
        400,
        "unsupported_content_type",
        "messages[0].content[1]",
    ),
    "tool call of a user": (
        chat(messages=[{**user("x"), "tool_calls": [TOOL_CALL]}]),
        400,
        "invalid_value",
        "messages[0].tool_calls",
    ),
    "tool call without id": (
        chat(messages=[{"role": "assistant", "tool_calls": [{**TOOL_CALL, "id": None}]}]),
        400,
        "invalid_type",
        "messages[0].tool_calls[0]",
    ),
    "name is a number": (
        chat(messages=[{**user("x"), "name": 3}]),
        400,
        "invalid_type",
        "messages[0].name",
    ),
    # Prompts
    "no prompt": (complete(prompt=UNSET), 400, "missing_required_parameter", "prompt"),
    "empty prompt": (complete(prompt=""), 400, "invalid_value", "prompt"),
    "null prompt": (complete(prompt=None), 400, "invalid_type", "prompt"),
    "object prompt": (complete(prompt={}), 400, "invalid_type", "prompt"),
    "[]": (complete(prompt=[]), 400, "empty_array", "prompt"),
    '[""]': (complete(prompt=[""]), 400, "invalid_value", "prompt"),
    "[[]]": (complete(prompt=[[]]), 400, "invalid_value", "prompt"),
    "text and number": (complete(prompt=["a", 1]), 400, "invalid_type", "prompt"),
    "number and text": (complete(prompt=[1, "a"]), 400, "invalid_value", "prompt"),
    "ids and text": (complete(prompt=[[1], "a"]), 400, "invalid_type", "prompt"),
    "negative id": (complete(prompt=[1, -1]), 400, "invalid_value", "prompt"),
    "id outside": (complete(prompt=[1000]), 400, "invalid_value", "prompt"),
    "huge id": (complete(prompt=[2**63]), 400, "invalid_value", "prompt"),
    "bool id": (complete(prompt=[True]), 400, "invalid_value", "prompt"),
    "float id": (complete(prompt=[1.5]), 400, "invalid_value", "prompt"),
    "many prompts": (complete(prompt=["a"] * 65), 400, "array_above_max_length", "prompt"),
    # Lengths
    **{
        f"max_tokens {value}": (chat(max_tokens=value), 400, code, "max_tokens")
        for value, code in [
            (0, "integer_below_min_value"),
            (-1, "integer_below_min_value"),
            (1.5, "invalid_type"),
            ("10", "invalid_type"),
            (True, "invalid_type"),
            (10**12, "context_length_exceeded"),
            (100, "context_length_exceeded"),
        ]
    },
    "two lengths": (
        chat(max_tokens=3, max_completion_tokens=4),
        400,
        "invalid_value",
        "max_completion_tokens",
    ),
    "min_tokens": (chat(min_tokens=9, max_tokens=8), 400, "invalid_value", "min_tokens"),
    "min_tokens 10**9": (chat(min_tokens=10**9), 400, "invalid_value", "min_tokens"),
    "min_tokens -1": (chat(min_tokens=-1), 400, "invalid_value", "min_tokens"),
    # Sampling
    **{
        f"{name} {value}": (chat(**{name: value}), 400, code, name)
        for name, value, code in [
            ("temperature", -0.1, "decimal_below_min_value"),
            ("temperature", 2.01, "decimal_above_max_value"),
            ("temperature", "hot", "invalid_type"),
            ("temperature", True, "invalid_type"),
            ("top_p", -1, "decimal_below_min_value"),
            ("top_p", 1.0001, "decimal_above_max_value"),
            ("top_k", -2, "integer_below_min_value"),
            ("top_k", 1.5, "invalid_type"),
            ("top_k", 2**40, "integer_above_max_value"),
            ("min_p", 2, "decimal_above_max_value"),
            ("presence_penalty", 2.1, "decimal_above_max_value"),
            ("frequency_penalty", -2.1, "decimal_below_min_value"),
            ("repetition_penalty", 0, "decimal_below_min_value"),
            ("repetition_penalty", -1, "decimal_below_min_value"),
            ("n", 0, "integer_below_min_value"),
            ("n", -1, "integer_below_min_value"),
            ("n", 17, "integer_above_max_value"),
            ("n", 10**9, "integer_above_max_value"),
            ("n", 1.0, "invalid_type"),
            ("n", "2", "invalid_type"),
            ("seed", 2**63, "integer_above_max_value"),
            ("seed", 1.5, "invalid_type"),
            ("seed", "x", "invalid_type"),
            ("stop", ["a"] * 5, "array_above_max_length"),
            ("stop", "", "string_below_min_length"),
            ("stop", [""], "string_below_min_length"),
            ("stop", "x" * 1001, "string_above_max_length"),
            ("stop_token_ids", [-1], "invalid_value"),
            ("stop_token_ids", [1000], "invalid_value"),
            ("stop_token_ids", [1] * 65, "array_above_max_length"),
            ("stream", "yes", "invalid_type"),
            ("stream", 1, "invalid_type"),
            ("timeout", 0, "decimal_below_min_value"),
            ("timeout", 1e9, "decimal_above_max_value"),
            ("cache_salt", "", "invalid_value"),
            ("cache_salt", "a/b", "invalid_value"),
            ("cache_salt", "a\x00b", "invalid_value"),
            ("cache_salt", "x" * 200, "invalid_value"),
            ("cache_salt", 5, "invalid_type"),
            ("chat_template_kwargs", {"x": [1]}, "invalid_type"),
            ("chat_template_kwargs", {"x": 2**63}, "invalid_type"),
            ("chat_template_kwargs", 3, "invalid_type"),
        ]
    },
    "stop [1]": (chat(stop=[1]), 400, "invalid_type", "stop[0]"),
    "21 logprobs": (
        chat(logprobs=True, top_logprobs=21),
        400,
        "integer_above_max_value",
        "top_logprobs",
    ),
    "-1 logprobs": (
        chat(logprobs=True, top_logprobs=-1),
        400,
        "integer_below_min_value",
        "top_logprobs",
    ),
    "top without logprobs": (chat(top_logprobs=3), 400, "invalid_value", "top_logprobs"),
    "completion logprobs": (complete(logprobs=21), 400, "integer_above_max_value", "logprobs"),
    "completion logprobs -1": (complete(logprobs=-1), 400, "integer_below_min_value", "logprobs"),
    "completion logprobs true": (complete(logprobs=True), 400, "invalid_type", "logprobs"),
    "options without stream": (
        chat(stream_options={"include_usage": True}),
        400,
        "invalid_value",
        "stream_options",
    ),
    "include_usage text": (
        chat(stream=True, stream_options={"include_usage": "x"}),
        400,
        "invalid_type",
        "stream_options.include_usage",
    ),
    # Tools
    **{
        f"tools {number}": (chat(**members), 400, code, param)
        for number, (members, code, param) in enumerate(
            [
                ({"tools": [tool("f")] * 129}, "array_above_max_length", "tools"),
                ({"tools": [tool("f"), tool("f")]}, "invalid_value", "tools[1].function.name"),
                ({"tools": [tool("a b")]}, "invalid_value", "tools[0].function.name"),
                ({"tools": [tool("x" * 65)]}, "invalid_value", "tools[0].function.name"),
                ({"tools": [tool(None)]}, "missing_required_parameter", "tools[0].function.name"),
                ({"tools": [tool(5)]}, "invalid_type", "tools[0].function.name"),
                (
                    {"tools": [tool("f", parameters="x")]},
                    "invalid_type",
                    "tools[0].function.parameters",
                ),
                ({"tools": [{"type": "web_search"}]}, "invalid_value", "tools[0].type"),
                ({"tools": [{"type": "function"}]}, "invalid_value", "tools[0].function"),
                ({"tools": ["f"]}, "invalid_type", "tools[0]"),
                ({"tool_choice": "auto"}, "invalid_value", "tool_choice"),
                (
                    {"tools": [tool("f")], "tool_choice": "sometimes"},
                    "invalid_value",
                    "tool_choice",
                ),
                (
                    {"tools": [tool("f")], "tool_choice": {"type": "function"}},
                    "invalid_value",
                    "tool_choice",
                ),
                (
                    {"tools": [tool("f")], "tool_choice": chosen("g")},
                    "invalid_value",
                    "tool_choice.function.name",
                ),
            ]
        )
    },
    "a long integer in a tool": (
        chat(tools=[tool("f", parameters={"maximum": 2**64})]),
        400,
        "invalid_value",
        "tools",
    ),
    "a deep tool": (chat(tools=[tool("f", parameters=deep(200))]), 400, "invalid_value", "tools"),
    "an answer to no call": (
        chat(messages=[user("a"), {"role": "tool", "content": "7", "tool_call_id": "c"}]),
        400,
        "invalid_value",
        "messages[1]",
    ),
    "a call that is not answered": (
        chat(messages=[{"role": "assistant", "tool_calls": [TOOL_CALL]}, user("a")]),
        400,
        "invalid_value",
        "messages[1]",
    ),
    "a last call that is not answered": (
        chat(messages=[{"role": "assistant", "tool_calls": [TOOL_CALL]}]),
        400,
        "invalid_value",
        "messages",
    ),
    "many ids": (complete(prompt=[1] * 100), 400, "context_length_exceeded", "prompt"),
    # What the answer must be
    **{
        f"format {number}": (chat(**members), 400, code, param)
        for number, (members, code, param) in enumerate(
            [
                ({"response_format": "json"}, "invalid_type", "response_format"),
                ({"response_format": {"type": "yaml"}}, "invalid_value", "response_format.type"),
                (
                    {"response_format": {"type": "json_schema"}},
                    "missing_required_parameter",
                    "response_format.json_schema",
                ),
                (
                    {"response_format": schema({}, name=None)},
                    "missing_required_parameter",
                    "response_format.json_schema.name",
                ),
                (
                    {"response_format": schema({}, name="a b")},
                    "invalid_value",
                    "response_format.json_schema.name",
                ),
                (
                    {"response_format": schema(None)},
                    "missing_required_parameter",
                    "response_format.json_schema.schema",
                ),
                (
                    {"response_format": schema("x")},
                    "invalid_type",
                    "response_format.json_schema.schema",
                ),
                ({"structured_outputs": {}}, "invalid_value", "structured_outputs"),
                (
                    {"structured_outputs": {"regex": "a", "grammar": "b"}},
                    "invalid_value",
                    "structured_outputs",
                ),
                ({"structured_outputs": {"regex": 5}}, "invalid_type", "structured_outputs.regex"),
                (
                    {"structured_outputs": {"regex": ""}},
                    "invalid_value",
                    "structured_outputs.regex",
                ),
                (
                    {"structured_outputs": {"choice": []}},
                    "empty_array",
                    "structured_outputs.choice",
                ),
                (
                    {"structured_outputs": {"choice": [1]}},
                    "invalid_type",
                    "structured_outputs.choice",
                ),
                (
                    {"structured_outputs": {"structural_tag": {}}},
                    "unsupported_parameter",
                    "structured_outputs.structural_tag",
                ),
                (
                    {
                        "structured_outputs": {"regex": "a"},
                        "response_format": {"type": "json_object"},
                    },
                    "invalid_value",
                    "structured_outputs",
                ),
            ]
        )
    },
    "a schema of 300 KB": (
        (
            CHAT,
            {**chat()[1], "messages": [user("x")], "structured_outputs": {"regex": "x" * 300_000}},
        ),
        413,
        "request_too_large",
        None,
    ),
    # Biases
    **{
        f"{name} {number}": (chat(**{name: value}), 400, code, name)
        for number, (name, value, code) in enumerate(
            [
                ("logit_bias", {"abc": 1}, "invalid_value"),
                ("logit_bias", {"-1": 1}, "invalid_value"),
                ("logit_bias", {"999999": 1}, "invalid_value"),
                ("logit_bias", {"1": 101}, "decimal_above_max_value"),
                ("logit_bias", {str(i): 1 for i in range(301)}, "array_above_max_length"),
                ("allowed_token_ids", [], "empty_array"),
                ("allowed_token_ids", [1000], "invalid_value"),
                ("bad_words", [""], "string_below_min_length"),
                ("bad_words", ["a"] * 129, "array_above_max_length"),
                ("prompt_logprobs", 21, "integer_above_max_value"),
                ("priority", 2**40, "integer_above_max_value"),
            ]
        )
    },
    "logit_bias text": (chat(logit_bias={"1": "x"}), 400, "invalid_type", "logit_bias"),
    "streamed prompt_logprobs": (
        chat(prompt_logprobs=1, stream=True),
        400,
        "invalid_value",
        "stream",
    ),
    "nothing at all": (complete(max_tokens=0), 400, "integer_below_min_value", "max_tokens"),
    "goes on with a user": (
        chat(continue_final_message=True),
        400,
        "invalid_value",
        "continue_final_message",
    ),
    # What would change the answer and is not served
    **{
        f"unserved {name}": (chat(**{name: value}), 400, "unsupported_parameter", name)
        for name, value in {
            "functions": [{"name": "f"}],
            "function_call": "auto",
            "audio": {"voice": "x"},
            "modalities": ["text", "audio"],
            "best_of": 2,
            "suffix": "x",
            "use_beam_search": True,
            "guided_json": {},
            "guided_regex": "a",
            "chat_template": "x",
            "prediction": {"type": "content"},
            "reasoning_effort": "high",
            "truncate_prompt_tokens": 5,
            "detokenize": False,
        }.items()
    },
    "empty tools": (chat(tools=[]), 400, "empty_array", "tools"),
    "suffix": (complete(suffix="x"), 400, "unsupported_parameter", "suffix"),
    # Other paths
    "tokenize nothing": (("/tokenize", {}), 400, "missing_required_parameter", "prompt"),
    "tokenize both": (
        ("/tokenize", {"prompt": "a", "messages": [user("a")]}),
        400,
        "missing_required_parameter",
        "prompt",
    ),
    "tokenize bad message": (
        ("/tokenize", {"messages": [{}]}),
        400,
        "invalid_value",
        "messages[0].role",
    ),
    "detokenize text": (
        ("/detokenize", {"tokens": ["a"]}),
        400,
        "invalid_type",
        "tokens[0]",
    ),
    "detokenize outside": (("/detokenize", {"tokens": [1000]}), 400, "invalid_value", "tokens"),
    "tokenize goes on with a user": (
        ("/tokenize", {"messages": [user("a")], "continue_final_message": True}),
        400,
        "invalid_value",
        "continue_final_message",
    ),
    "tokenize goes on and begins": (
        (
            "/tokenize",
            {
                "messages": [{"role": "assistant", "content": "a"}],
                "continue_final_message": True,
                "add_generation_prompt": True,
            },
        ),
        400,
        "invalid_value",
        "continue_final_message",
    ),
    "tokenize model": (
        ("/tokenize", {"model": "x", "prompt": "a"}),
        404,
        "model_not_found",
        "model",
    ),
    "unknown path": (("/v1/unknown", {}), 404, "unknown_url", None),
    "double slash": (("/v1//chat/completions", chat()[1]), 404, "unknown_url", None),
    "slash at the end": (("/v1/chat/completions/", chat()[1]), 404, "unknown_url", None),
    "embeddings": (("/v1/embeddings", {}), 404, "unsupported_endpoint", None),
    "speech": (("/v1/audio/speech", {}), 404, "unsupported_endpoint", None),
    "nearly embeddings": (("/v1/embeddings2", {}), 404, "unknown_url", None),
}

ACCEPTED: dict[str, tuple[str, Any]] = {
    "whitespace": raw(b" \n\t{%}\r\n"),
    "developer": chat(messages=[{"role": "developer", "content": "x"}, user("y")]),
    "parts": chat(messages=[user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])]),
    "no content beside a call": chat(
        messages=[
            {"role": "assistant", "content": [], "reasoning": "x", "tool_calls": [TOOL_CALL]},
            {"role": "tool", "content": "7", "tool_call_id": "c"},
        ]
    ),
    "refusal": chat(
        messages=[{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}]
    ),
    "tool round": chat(
        messages=[
            user("a"),
            {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]},
            {"role": "tool", "content": "7", "tool_call_id": "c"},
        ]
    ),
    "special text": chat(messages=[user("<|im_start|>\x00\u202e\u200b😀</s>")]),
    "nulls": chat(
        max_tokens=None,
        temperature=None,
        stop=None,
        stream=None,
        seed=None,
        n=None,
        tools=None,
        logit_bias=None,
        stream_options=None,
    ),
    "neutral": chat(
        tool_choice="none",
        response_format={"type": "text"},
        logit_bias={},
        modalities=["text"],
        best_of=1,
        suffix="",
        use_beam_search=False,
        detokenize=True,
    ),
    "harmless": chat(
        user="me",
        metadata={"a": "b"},
        store=True,
        service_tier="auto",
        parallel_tool_calls=True,
        safety_identifier="x",
        foo={"bar": 1},
    ),
    "limits": chat(
        temperature=2,
        top_p=0,
        top_k=-1,
        min_p=1,
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=100,
        seed=-(2**63),
        n=16,
        stop=["a"] * 4,
        max_tokens=99,
        max_completion_tokens=99,
    ),
    "greedy choices": chat(n=2, temperature=0),
    "prompt ids": complete(prompt=[0, 999]),
    "one id": complete(prompt=[5]),
    "prompts of ids": complete(prompt=[[1], [2, 3]]),
    "64 prompts": complete(prompt=["a"] * 64),
}
