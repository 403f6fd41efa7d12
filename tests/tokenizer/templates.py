"""Chat templates in the manner of known models, and tokenizers with those models' markers."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from slipstream.tokenizer.codec import TokenizerCodec
from tokenizer.models import CHATML, byte_level

_TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{% for c in m.tool_calls or [] %}{{ CALL }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TOOLS = "{% if tools %}{{ 'TOOLS ' + (tools | tojson) + '\n' }}{% endif %}"


def _turns(call: str) -> str:
    return _TOOLS + _TURNS.replace("CALL", call)


QWEN = _turns(
    """'<tool_call>\n{"name": "' + c.function.name + '", "arguments": '"""
    """ + (c.function.arguments | tojson) + '}\n</tool_call>'"""
)
QWEN3 = QWEN.replace(
    "'<|im_start|>assistant\n' }}",
    "'<|im_start|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}",
)
LLAMA3 = _turns(
    """'{"name": "' + c.function.name + '", "parameters": '"""
    """ + (c.function.arguments | tojson) + '}'"""
) + ("{# <|python_tag|> for code #}")
LLAMA4 = _turns("'[' + c.function.name + '()]'") + "{# [func_name1(params_name1=value)] #}"
MISTRAL = _turns("""'[TOOL_CALLS][{"name": "' + c.function.name + '", "id": "' + c.id + '"}]'""")
MISTRAL_NAMED = _turns("""'[TOOL_CALLS]' + c.function.name + '[ARGS]{}'""")
R1 = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'") + (
    "{# </think> #}"
)
CODER = QWEN + "{# <function= #}"

SPECIAL = {
    MISTRAL: ["[TOOL_CALLS]"],
    MISTRAL_NAMED: ["[TOOL_CALLS]", "[ARGS]"],
    LLAMA3: ["<|python_tag|>"],
    LLAMA4: ["<|python_start|>", "<|python_end|>"],
    QWEN: ["<tool_call>", "</tool_call>"],
    R1: ["<think>", "</think>"],
}
"""Markers that are special tokens. The real Qwen and R1 have ordinary ones; others do not."""


def folder_of(template: str, folder: Path, *, special: bool = True) -> Path:
    made = byte_level(folder, chat_template=template)
    tokenizer = Tokenizer.from_file(str(made / "tokenizer.json"))
    if special and template in SPECIAL:
        marks = [AddedToken(text, special=True, normalized=False) for text in SPECIAL[template]]
        tokenizer.add_special_tokens(marks)
        tokenizer.save(str(made / "tokenizer.json"))
    return made


def codec_of(template: str, folder: Path, *, special: bool = True) -> TokenizerCodec:
    return TokenizerCodec(folder_of(template, folder, special=special))
