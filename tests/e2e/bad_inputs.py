"""Requests as nobody should send them: the catalogue of bad inputs, by its numbers.

What is expected is (status, code, param); None as code or param: whatever it is. 14 to 16 and 85
to 88 are in `test_bad_connections.py`; what needs keys, a start, or a loss stands where these are.
"""

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from e2e.client import MODEL

CHAT, COMPLETE, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
SAYS = {"model": MODEL, "max_tokens": 4, "messages": [{"role": "user", "content": "Hello"}]}
GOES_ON = {"model": MODEL, "max_tokens": 4, "prompt": "Hello"}
ASKS = {"model": MODEL, "max_output_tokens": 16, "input": "Hello"}
CONTEXT, VOCAB = 2048, 49152


class Case(NamedTuple):
    number: int
    what: str
    path: str
    body: bytes
    status: int
    code: str | None = None
    param: str | None = None
    method: str = "POST"
    headers: Mapping[str, str] = MappingProxyType({"Content-Type": "application/json"})


def encoded(body: Any) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def without(body: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key != name}


def chat(number: int, change: Any, status: int, code: str | None = None, param: str = "") -> Case:
    """`change`: members of a good body, or a body as it is; the first member is the one to be named
    if `param` says nothing."""
    return _of(CHAT, SAYS, number, change, status, code, param)


def complete(
    number: int, change: Any, status: int, code: str | None = None, param: str = ""
) -> Case:
    return _of(COMPLETE, GOES_ON, number, change, status, code, param)


def responses(
    number: int, change: Any, status: int, code: str | None = None, param: str = ""
) -> Case:
    return _of(RESPONSES, ASKS, number, change, status, code, param)


def _of(
    path: str, good: Any, number: int, change: Any, status: int, code: str | None, param: str
) -> Case:
    named = param or (next(iter(change), "") if isinstance(change, dict) else "")
    what = f"{path.rpartition('/')[2]} {reprlib.repr(change)[:60]}"
    body = encoded({**good, **change} if isinstance(change, dict) else change)
    wants = named if status in (400, 404) and code is not None and param != ANY else None
    return Case(number, what, path, body, status, code, wants or None)


def said(number: int, messages: Any, status: int, code: str | None, param: str) -> Case:
    return chat(number, {"messages": messages}, status, code, param)


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


FUNCTION = {"name": "f", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ANY = "*"
BAD, TYPE, JSON = "invalid_value", "invalid_type", "invalid_json"


def tools(number: int, given: Any, param: str, code: str = BAD, **more: Any) -> Case:
    return chat(number, {"tools": given, **more}, 400, code, param)


def schema(given: Any) -> dict[str, Any]:
    of = {"name": "s", "schema": given}
    return {"response_format": {"type": "json_schema", "json_schema": of}}


OPENS, SHUTS = b'{"type":"object","properties":{"a":', b"}}"
DEEP = (
    encoded(SAYS)[:-1]
    + b', "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": '
    + (OPENS * 1000 + b"{}" + SHUTS * 1000)
    + b"}}}"
)

BODIES = [
    *(case(1, b"", 400, JSON) for case in (chat, complete, responses)),
    *(case(2, b'{"model": "', 400, JSON) for case in (chat, complete, responses)),
    *(chat(3, body, 400, TYPE) for body in (b"[]", b'"hi"', b"7", b"null")),
    chat(4, b'{"model": "\xff"}', 400, JSON),
    chat(4, b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, JSON),
    chat(5, b" \n\t" + encoded(SAYS), 200),
    chat(5, b"\xef\xbb\xbf" + encoded(SAYS), 400, JSON),
    chat(6, encoded(SAYS)[:-1] + b', "n": 1, "n": 999}', 400, "integer_above_max_value"),
    *(
        chat(7, encoded(SAYS)[:-1] + b', "temperature": ' + word + b"}", 400, None)
        for word in (b"NaN", b"Infinity", b"1e999")
    ),
    chat(8, b"[" * 10_000, 400, TYPE),
    chat(8, b'{"a":' * 10_000, 400, None),
    chat(9, encoded(SAYS)[:-1] + b', "max_tokens": ' + b"9" * 5000 + b"}", 400, None),
    # --- The model, messages ---
    chat(25, encoded(without(SAYS, "model")), 400, "missing_required_parameter"),
    chat(26, {"model": ""}, 400, BAD),
    chat(26, {"model": None}, 400, TYPE),
    chat(26, {"model": 5}, 400, TYPE),
    chat(27, {"model": "gpt-4"}, 404, "model_not_found"),
    chat(28, {"model": "../../etc/passwd"}, 404, "model_not_found"),
    chat(28, {"model": "x" * 10_240}, 404, "model_not_found"),
    chat(28, {"model": "a\r\nb\0\x1b[31m"}, 404, "model_not_found"),
    chat(29, encoded(without(SAYS, "messages")), 400, "missing_required_parameter"),
    said(30, [], 400, "empty_array", "messages"),
    *(said(31, wrong, 400, TYPE, "messages") for wrong in ("hi", {}, None)),
    said(32, user("a") * 10_001, 400, "array_above_max_length", "messages"),
    said(33, [{"content": "x"}], 400, None, "messages"),
    said(33, [{"role": "robot", "content": "x"}], 400, BAD, "messages[0].role"),
    said(33, [{"role": None, "content": "x"}], 400, None, "messages"),
    said(33, [{"role": "tool", "content": "x"}], 400, None, "messages[0].tool_call_id"),
    said(34, [{"role": "developer", "content": "x"}, *user("y")], 200, None, ""),
    said(35, user(None), 400, None, "messages[0].content"),
    chat(
        36,
        {
            "messages": [
                *user("x"),
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c", "content": "1"},
            ]
        },
        200,
    ),
    said(37, user([]), 400, None, "messages[0].content"),
    said(37, user([{"type": "text"}]), 400, None, "messages[0].content[0].text"),
    said(37, user([{"type": "text", "text": None}]), 400, None, "messages"),
    said(38, user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), 200, None, ""),
    *(
        said(39, user([part]), 400, "unsupported_content_type", "messages[0].content[0]")
        for part in (
            {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}},
            {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
            {"type": "file", "file": {"file_id": "f"}},
        )
    ),
    *(
        said(
            *(40, user([{"type": "image_url", "image_url": {"url": url}}]), 400),
            *("unsupported_content_type", "messages[0].content[0]"),
        )
        for url in ("file:///etc/passwd", "http://169.254.169.254", "http://a\\@b")
    ),
    *(
        said(41, user(text), 200, None, "")
        for text in ("<|im_start|>system", "</s>", "\0", "\u202e\u200b", "\U0001f600")
    ),
    # --- Lengths ---
    complete(42, {"prompt": [5] * CONTEXT, "max_tokens": 1}, 400, "context_length_exceeded"),
    complete(43, {"max_tokens": CONTEXT}, 400, "context_length_exceeded", "max_tokens"),
    complete(44, {"prompt": " " * (50 << 20)}, 413, "request_too_large"),
    complete(44, {"prompt": "a" * 7_000_000}, 400, "context_length_exceeded"),
    complete(45, {"prompt": ""}, 400, None),
    *(complete(46, {"prompt": p}, 400, None) for p in ([], [""], [[]], ["a", 1])),
    *(complete(47, {"prompt": [t]}, 400, None) for t in (-1, VOCAB, 2**63, True, 1.5)),
    complete(48, {"prompt": ["a"] * 5000}, 400, "array_above_max_length"),
    # --- Numbers ---
    chat(49, {"max_tokens": 0}, 400, "integer_below_min_value"),
    complete(49, {"max_tokens": 0}, 400, "integer_below_min_value"),
    complete(49, {"max_tokens": 0, "echo": True, "logprobs": 1}, 200),
    chat(50, {"max_tokens": -1}, 400, "integer_below_min_value"),
    *(chat(50, {"max_tokens": wrong}, 400, TYPE) for wrong in (1.5, "10", True)),
    chat(50, {"max_tokens": 10**12}, 400, None),
    complete(50, {"max_tokens": None}, 200),
    chat(51, {"max_tokens": 3, "max_completion_tokens": 4}, 400, None),
    chat(51, {"max_tokens": 4, "max_completion_tokens": 4}, 200),
    chat(52, {"temperature": -0.1}, 400, "decimal_below_min_value"),
    chat(52, {"temperature": 2.01}, 400, "decimal_above_max_value"),
    chat(52, {"temperature": "hot"}, 400, TYPE),
    chat(52, {"temperature": None}, 200),
    chat(53, {"top_p": 0}, 200),
    chat(53, {"top_p": -1}, 400, "decimal_below_min_value"),
    chat(53, {"top_p": 1.0001}, 400, "decimal_above_max_value"),
    chat(54, {"top_k": -2}, 400, "integer_below_min_value"),
    chat(54, {"top_k": 0}, 200),
    chat(54, {"top_k": 1.5}, 400, TYPE),
    chat(54, {"min_p": 2}, 400, "decimal_above_max_value"),
    *(
        chat(55, {name: sign * 2.1}, 400, None)
        for name in ("presence_penalty", "frequency_penalty")
        for sign in (1, -1)
    ),
    *(chat(56, {"repetition_penalty": wrong}, 400, None) for wrong in (0, -1)),
    chat(57, {"n": 0}, 400, "integer_below_min_value"),
    chat(57, {"n": -1}, 400, "integer_below_min_value"),
    *(chat(57, {"n": wrong}, 400, "integer_above_max_value") for wrong in (129, 10**9)),
    *(chat(57, {"n": wrong}, 400, TYPE) for wrong in ("2", 1.5)),
    chat(58, {"n": 2, "temperature": 0}, 200),
    complete(59, {"best_of": 1, "n": 2}, 400, None),
    complete(59, {"best_of": 2, "stream": True}, 400, None),
    # --- Words ---
    chat(60, {"stop": ["a"] * 5}, 400, "array_above_max_length"),
    *(chat(60, {"stop": wrong}, 400, None) for wrong in ("", [""], [1], "x" * 102_400)),
    chat(60, {"stop": None}, 200),
    *(
        chat(62, {"logit_bias": wrong}, 400, None)
        for wrong in (
            *({"abc": 1}, {"-1": 1}, {"999999": 1}, {"1": 101}, {"1": "x"}),
            {str(token): 1 for token in range(301)},
        )
    ),
    *(chat(63, {"top_logprobs": n, "logprobs": True}, 400, None) for n in (21, -1)),
    chat(63, {"top_logprobs": 2}, 400, BAD),
    complete(64, {"logprobs": -1}, 400, "integer_below_min_value"),
    *(chat(65, {"seed": wrong}, 400, None) for wrong in (2**63, 1.5, "x")),
    chat(65, {"seed": -1}, 200),
    *(chat(66, {"stream": wrong}, 400, TYPE) for wrong in ("yes", 1)),
    chat(66, {"stream": None}, 200),
    chat(67, {"stream_options": {"include_usage": True}}, 400, None),
    chat(
        68,
        {"stream_options": {"include_usage": "x"}, "stream": True},
        400,
        None,
        "stream_options.include_usage",
    ),
    # --- Structured output, tools ---
    *(chat(69, {"response_format": wrong}, 400, None) for wrong in ({"type": "yaml"}, "json")),
    *(
        chat(70, {"response_format": {"type": "json_schema", **wrong}}, 400, None)
        for wrong in (
            {},
            {"json_schema": {"schema": {}}},
            {"json_schema": {"name": "s", "schema": 7}},
        )
    ),
    *(
        chat(71, schema(wrong), 400, "invalid_schema", ANY)
        for wrong in (
            {"type": "thing"},
            {"type": "string", "pattern": "("},
            {"$ref": "http://127.0.0.1:9/schema"},
            {"enum": ["x" * 21] * 100_000},
        )
    ),
    chat(71, DEEP, 400, None),
    chat(72, {"response_format": {"type": "json_object"}}, 200),
    tools(73, [], "tools", "empty_array"),
    tools(74, [TOOL] * 129, "tools", "array_above_max_length"),
    tools(74, [TOOL, TOOL], "tools[1].function.name", BAD),
    *(
        tools(
            74, [{"type": "function", "function": {"name": name}}], "tools[0].function.name", code
        )
        for name, code in (("a b", BAD), ("x" * 65, BAD))
    ),
    chat(
        74, {"tools": [{"type": "function", "function": {"name": "f", "parameters": 7}}]}, 400, None
    ),
    *(
        chat(75, {"tool_choice": choice, **more}, 400, None)
        for choice, more in (
            ("required", {}),
            ({"type": "function", "function": {"name": "g"}}, {"tools": [TOOL]}),
            ("sometimes", {"tools": [TOOL]}),
            ({"type": "function"}, {"tools": [TOOL]}),
        )
    ),
    said(
        76,
        [*user("x"), {"role": "tool", "tool_call_id": "z", "content": "1"}],
        400,
        None,
        "messages",
    ),
    said(
        76,
        [{"role": "assistant", "content": None, "tool_calls": [CALL]}, *user("x")],
        400,
        None,
        "messages",
    ),
    said(
        *(
            77,
            [
                *user("x"),
                {
                    "role": "assistant",
                    "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {}}}],
                },
            ],
        ),
        *(400, None, "messages"),
    ),
    said(
        78,
        [*user("x"), {"role": "assistant", "tool_calls": [{**CALL, "id": None}]}],
        400,
        None,
        "messages",
    ),
    # --- Fields that are unknown, removed, too long ---
    chat(79, {"foo": 1}, 200),
    chat(80, {"chat_template": "{{ 7 }}"}, 400, "unsupported_parameter"),
    chat(80, {"ignore_eos": True, "min_tokens": 1, "priority": 3, "cache_salt": "a"}, 200),
    *(chat(81, {"min_tokens": wrong}, 400, None) for wrong in (5, 10**9)),
    *(chat(82, {"cache_salt": wrong}, 400, None) for wrong in ("", "x" * 10_240, 7)),
    chat(93, {"suffix": "x"}, 400, "unsupported_parameter"),
    complete(93, {"suffix": "x"}, 400, "unsupported_parameter"),
    responses(89, encoded(without(ASKS, "input")), 400, None),
    responses(89, {"previous_response_id": "resp_none"}, 404, "previous_response_not_found"),
    responses(89, {"background": True}, 400, None),
    responses(
        89, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, None, "input"
    ),
]

TEXT = {"Content-Type": "text/plain"}
GZIP = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
UTF8 = {"Content-Type": "application/json; charset=utf-8"}
GOOD = encoded(SAYS)
PATHS = [
    Case(10, "text/plain", CHAT, GOOD, 415, "unsupported_media_type", headers=TEXT),
    Case(10, "no type", CHAT, GOOD, 415, "unsupported_media_type", headers={}),
    Case(11, "charset", CHAT, GOOD, 200, headers=UTF8),
    Case(12, "gzip", CHAT, b"\x1f\x8b" * 100, 415, "unsupported_media_type", headers=GZIP),
    Case(13, "9 MiB", CHAT, b" " * (9 << 20) + GOOD, 413, "request_too_large"),
    Case(21, "GET", CHAT, b"", 405, "method_not_allowed", method="GET"),
    Case(22, "unknown", "/v1/unknown", GOOD, 404, "unknown_url"),
    Case(23, "two slashes", "/v1//chat/completions", GOOD, 404, "unknown_url"),
    Case(23, "a slash behind", CHAT + "/", GOOD, 404, "unknown_url"),
    Case(23, "dots", "/v1/%2e%2e/v1/chat/completions", GOOD, 404, "unknown_url"),
    Case(24, "OPTIONS", CHAT, b"", 405, "method_not_allowed", method="OPTIONS"),
    Case(90, "embeddings", "/v1/embeddings", GOOD, 404, "unsupported_endpoint"),
    Case(90, "audio", "/v1/audio/speech", GOOD, 404, "unsupported_endpoint"),
    Case(91, "a model", "/v1/models/unknown", b"", 404, "model_not_found", method="GET"),
    Case(92, "tokenize", "/tokenize", b'{"prompt": 7}', 400, None),
    Case(92, "long", "/tokenize", encoded({"prompt": " " * (9 << 20)}), 413, "request_too_large"),
    Case(92, "detokenize", "/detokenize", b'{"tokens": [-1]}', 400, None),
    Case(84, "id with colour", CHAT, GOOD, 200, headers={**UTF8, "X-Request-Id": "a b\tc"}),
    Case(84, "long id", CHAT, GOOD, 200, headers={**UTF8, "X-Request-Id": "x" * 4000}),
    Case(98, "Host", CHAT, GOOD, 200, headers={**UTF8, "Host": "evil.example"}),
    Case(98, "Origin", CHAT, GOOD, 200, headers={**UTF8, "Origin": "http://evil.example"}),
]

LEAKS = ("Traceback", "0x7f", "/usr/", f"{Path.home()}/", "site-packages")
"""What no answer shows of our insides."""
