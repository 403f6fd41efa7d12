"""`LLM`: batches in this process, against Transformers' own tokens."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from engine.tiny import WORDS, prompt_of, save_model
from slipstream import LLM, LoRARequest, RequestOutput, SamplingParams
from slipstream.config import ConfigError, StartError
from slipstream.offline.cluster import LONGEST_S, OPEN_MAX

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("llm")
    return folder, save_model(folder, WORDS)


@pytest.fixture(scope="module")
def llm(saved: tuple[Path, PreTrainedModel]) -> Iterator[LLM]:
    with LLM(str(saved[0]), dtype="float32", kv_cache_bytes="4MiB", max_num_seqs=8) as found:
        yield found


def right(model: PreTrainedModel, prompt: tuple[int, ...], count: int) -> list[int]:
    generated = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None
    )
    return generated[0, len(prompt) :].tolist()


def test_tokens_are_those_of_transformers(llm: LLM, saved: tuple[Path, PreTrainedModel]) -> None:
    prompts = [prompt_of(5 + 7 * n, n) for n in range(20)]
    outputs = llm.generate(prompts, GREEDY)
    assert [tuple(each.prompt_token_ids) for each in outputs] == prompts
    for prompt, output in zip(prompts, outputs, strict=True):
        (choice,) = output.outputs
        assert choice.token_ids == right(saved[1], prompt, 12)
        assert choice.finish_reason == "length" and output.finished and not output.error


def test_each_form_of_a_prompt(llm: LLM) -> None:
    text = "the sea is wide"
    tokens = llm.encode(text)
    (one,) = llm.generate(text, GREEDY)
    forms = [text, tokens, {"prompt": text}, {"prompt_token_ids": tokens}]
    outputs = llm.generate(forms, GREEDY, use_tqdm=False)
    assert [each.prompt for each in outputs] == [text, None, text, None]
    assert {tuple(each.outputs[0].token_ids) for each in outputs} == {
        tuple(one.outputs[0].token_ids)
    }
    assert outputs[1].outputs[0].text == one.outputs[0].text != ""
    with pytest.raises(ValueError, match="a prompt is a text"):
        llm.generate([4.5])  # type: ignore[list-item]


def test_choices_and_seeds(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=7, max_tokens=8, ignore_eos=True, logprobs=2)
    (one,), (again,) = llm.generate("a", params), llm.generate("a", params)
    drawn = [each.token_ids for each in one.outputs]
    assert drawn == [each.token_ids for each in again.outputs]
    assert len({tuple(each) for each in drawn}) == 3 and [x.index for x in one.outputs] == [0, 1, 2]
    unseeded = SamplingParams(max_tokens=8, ignore_eos=True)
    outputs = llm.generate(["a"] * 2, unseeded)
    assert outputs[0].outputs[0].token_ids != outputs[1].outputs[0].token_ids
    choice = one.outputs[0]
    assert choice.logprobs is not None
    for token, said in zip(choice.token_ids, choice.logprobs, strict=True):
        ranks = {each.rank for each in said.values()}
        assert token in said and {1, 2} <= ranks and len(said) in (2, 3)
    total = sum(said[t].logprob for t, said in zip(choice.token_ids, choice.logprobs, strict=True))
    assert choice.cumulative_logprob == pytest.approx(total)


def test_one_seed_for_the_whole_program(saved: tuple[Path, PreTrainedModel]) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=1.5)
    drawn = []
    for seed in (3, 3, 4):
        with LLM(str(saved[0]), seed=seed, dtype="float32", kv_cache_bytes="4MiB") as llm:
            outputs = [*llm.generate(["a"] * 3, params), *llm.generate("a", params)]
            drawn.append([each.outputs[0].token_ids for each in outputs])
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({tuple(each) for each in drawn[0]}) == 4


def test_params_for_each_prompt(llm: LLM) -> None:
    each = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (1, 5)]
    outputs = llm.generate(["a", "b"], each)
    assert [len(x.outputs[0].token_ids) for x in outputs] == [1, 5]
    with pytest.raises(ValueError, match="2 sampling_params for 3 prompts"):
        llm.generate(["a", "b", "c"], each)


def test_answers_are_held_to_what_was_asked(llm: LLM) -> None:
    outputs = llm.generate(
        ["a", "b"],
        [SamplingParams(regex="[0-9]{3}", max_tokens=20), SamplingParams(choice=["yes", "no"])],
    )
    assert len(outputs[0].outputs[0].text) == 3 and outputs[0].outputs[0].text.isdigit()
    assert outputs[1].outputs[0].text in ("yes", "no")
    (prompt_scored,) = llm.generate("abc", SamplingParams(prompt_logprobs=0, max_tokens=1))
    scores = prompt_scored.prompt_logprobs
    assert scores is not None and scores[0] is None
    assert len(scores) == len(prompt_scored.prompt_token_ids)


def test_token_ids_beyond_every_vocabulary_harm_no_other(llm: LLM) -> None:
    outputs = llm.generate([[1, 2**33], [5, 6], [-5], [1, -(2**70)], []], GREEDY)
    assert [bool(each.error) for each in outputs] == [True, False, True, True, True]
    told = f"Token id {2**33} is outside the vocabulary"
    assert told in outputs[0].error and "-5" in outputs[2].error


def test_numbers_of_numpy_are_token_ids(llm: LLM) -> None:
    ids = np.array([5, 6, 7])
    wanted = llm.generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids
    forms = [ids, list(ids), [ids, list(ids), {"prompt_token_ids": ids}], np.stack([ids, ids])]
    for form in forms:
        for output in llm.generate(form, GREEDY):
            assert output.outputs[0].token_ids == wanted
            assert output.prompt_token_ids == [5, 6, 7]
    odd: list[Any] = [[[1.5]], [{"prompt_token_ids": "ab"}], [{}], [np.array([0.5])]]
    for wrong in (*odd, b"hello", [b"hello"], {1, 2}, [{1, 2}]):
        with pytest.raises(ValueError, match="a prompt is a text"):
            llm.generate(wrong)


def test_an_answer_ends_where_its_context_does(llm: LLM) -> None:
    for wanted in (4096, None):
        params = SamplingParams(max_tokens=wanted, temperature=0, ignore_eos=True)
        (output,) = llm.generate([prompt_of(500, 1)], params)
        assert not output.error and len(output.outputs[0].token_ids) == 12
        assert output.outputs[0].finish_reason == "length"


def test_without_parameters_the_models_own_are_used(
    llm: LLM, saved: tuple[Path, PreTrainedModel]
) -> None:
    assert llm.get_default_sampling_params() == SamplingParams()
    file = saved[0] / "generation_config.json"
    before = file.read_bytes()
    file.write_text('{"temperature": 0, "top_k": -1, "repetition_penalty": 1.5}')
    try:
        with LLM(str(saved[0]), dtype="float32", kv_cache_bytes="4MiB") as recommends:
            wanted = SamplingParams(temperature=0, top_k=-1, repetition_penalty=1.5)
            assert recommends.get_default_sampling_params() == wanted
            plain, said = (recommends.generate(["ab"] * 3, each) for each in (None, wanted))
    finally:
        file.write_bytes(before)
    tokens = [each.outputs[0].token_ids for each in (*plain, *said)]
    assert len(tokens[0]) and all(each == tokens[0] for each in tokens)


def test_a_prompt_that_cannot_be_served_harms_no_other(llm: LLM) -> None:
    outputs = llm.generate(["a", "x " * 2000, [9_999], "b"], GREEDY)
    assert [bool(each.error) for each in outputs] == [False, True, True, False]
    assert "maximum context length" in outputs[1].error and "9999" in outputs[2].error
    assert all(each.finished for each in outputs)


def test_more_than_run_at_a_time(llm: LLM) -> None:
    count = OPEN_MAX + 40
    outputs = llm.generate([[5, n % 90 + 3] for n in range(count)], SamplingParams(max_tokens=1))
    assert [each.prompt_token_ids[1] for each in outputs] == [n % 90 + 3 for n in range(count)]
    assert all(each.finished and not each.error for each in outputs)


def test_a_chat_goes_through_the_template(saved: tuple[Path, PreTrainedModel]) -> None:
    folder = saved[0]
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    try:
        with LLM(str(folder), dtype="float32", kv_cache_bytes="4MiB") as llm:
            chat = [{"role": "user", "content": "hi"}]
            (one,) = llm.chat(chat, GREEDY)
            both = llm.chat([chat, [*chat, {"role": "assistant", "content": "ho"}]], GREEDY)
            assert one.prompt_token_ids == llm.encode("<user>hi")
            assert [len(each.prompt_token_ids) for each in both] == [
                len(llm.encode("<user>hi")),
                len(llm.encode("<user>hi<assistant>ho")),
            ]
            assert both[0].outputs[0].token_ids == one.outputs[0].token_ids
    finally:
        (folder / "chat_template.jinja").unlink()


def test_who_stops_waiting_leaves_nothing_behind(llm: LLM) -> None:
    """As Ctrl-C does: what runs is dropped, and the next batch is served."""
    frontend = llm._cluster._frontend._node.machine
    long = SamplingParams(max_tokens=400, ignore_eos=True)
    whole: list[list[RequestOutput]] = []
    thread = threading.Thread(target=lambda: _quietly(llm, [[7, 8]] * 30, long, whole))
    thread.start()
    _until(lambda: len(frontend._requests) == 30)
    llm._loop.call_soon_threadsafe(lambda: [task.cancel() for task in llm._running])
    thread.join(20)
    assert not thread.is_alive() and not whole
    _until(lambda: not frontend._requests)
    assert llm.generate("a", GREEDY)[0].outputs[0].token_ids


def _quietly(llm: LLM, prompts: Any, params: SamplingParams, found: list[Any]) -> None:
    with contextlib.suppress(BaseException):  # cancelled, whatever the class
        found.append(llm.generate(prompts, params))


def _until(condition: Any) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_an_engine_that_ends_says_so(saved: tuple[Path, PreTrainedModel]) -> None:
    with LLM(str(saved[0]), dtype="float32", kv_cache_bytes="4MiB") as llm:
        llm._loop.call_soon_threadsafe(llm._failed, MemoryError("no more"))
        with pytest.raises(RuntimeError, match="the engine has ended: no more"):
            llm.generate("a", GREEDY)
    llm.close()


def test_settings_are_those_of_the_command(saved: tuple[Path, PreTrainedModel]) -> None:
    folder = str(saved[0])
    with pytest.raises(ConfigError, match=r"max-modl-len.*did you mean --max-model-len"):
        LLM(folder, max_modl_len=5)
    with pytest.raises(StartError, match="the model has 512"):
        LLM(folder, max_model_len=513)
    with pytest.raises(StartError, match="no such folder"):
        LLM("nowhere/at/all")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"temperature": 3.0}, "temperature"),
        ({"n": 0}, "n is 0; it may be 1 to"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, r"min_tokens is 5; it may be 0 to max_tokens \(4\)"),
        ({"stop": ""}, "stop has an empty string"),
        ({"stop": ["a", ""]}, "stop has an empty string"),
        ({"logprobs": -1}, "logprobs is -1: of all tokens they are not given; name 0 to 20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1"),
        ({"detokenize": False}, "detokenize=False is not served; leave it out"),
        ({"structured_outputs": {"json": {}}}, "not served; name json_schema, regex, choice or"),
        ({"regex": "a", "choice": ["b"]}, "regex and choice exclude each other"),
    ],
)
def test_parameters_that_cannot_be(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SamplingParams(**wrong)


def test_the_defaults_of_vllm_may_be_said(llm: LLM) -> None:
    said = SamplingParams(
        stop=None, stop_token_ids=None, allowed_token_ids=None, bad_words=None, logit_bias=None,
        detokenize=True, spaces_between_special_tokens=True, structured_outputs=None,
        truncate_prompt_tokens=None, extra_args=None, logits_processors=None,
    )  # fmt: skip
    assert said == SamplingParams()
    assert llm.generate("a", said)[0].outputs[0].token_ids


def test_parameters_may_be_changed_and_are_checked_again(llm: LLM) -> None:
    params = SamplingParams(temperature=0, ignore_eos=True)
    params.max_tokens = 5
    params.stop = ["never said"]
    assert len(llm.generate("a", params)[0].outputs[0].token_ids) == 5
    params.stop = ""
    with pytest.raises(ValueError, match="stop has an empty string"):
        llm.generate(["b", "a"], [GREEDY, params])
    assert llm.generate("a", GREEDY)[0].outputs[0].token_ids


def test_the_program_of_the_page_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "offline.md").read_text(encoding="utf-8")
    program = page.partition("```python\n")[2].partition("```")[0]
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ran.returncode == 0 and "Paris" in ran.stdout, ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr and "Loop" not in ran.stderr, ran.stderr


def test_adapters_are_mixed_in_one_call(
    llm: LLM, saved: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    """The tokens of PEFT, with a request for each prompt, for all, and in a chat."""
    pytest.importorskip("peft")
    from engine.tiny_lora import save_adapter

    made = [save_adapter(tmp_path / str(n), saved[1], n, lora_alpha=8 + n) for n in range(2)]
    first, second = (LoRARequest(f"a{n}", n + 1, str(tmp_path / str(n))) for n in range(2))
    prompt = prompt_of(40, 3)
    outputs = llm.generate([prompt] * 4, GREEDY, lora_request=[first, None, second, first])
    wanted = [right(model, prompt, 12) for model in (made[0], saved[1], made[1], made[0])]
    assert [each.outputs[0].token_ids for each in outputs] == wanted and wanted[0] != wanted[1]
    (again,) = llm.generate([prompt], GREEDY, lora_request=second)
    assert again.outputs[0].token_ids == wanted[2] and again.num_cached_tokens  # its own blocks
    (plain,) = llm.generate([prompt], GREEDY)
    assert plain.outputs[0].token_ids == wanted[1]
    moved = LoRARequest("a0", 1, str(tmp_path / "1"))  # another one in its place
    (output,) = llm.generate([prompt], GREEDY, lora_request=moved)
    assert output.outputs[0].token_ids == wanted[2]


def test_what_no_adapter_is_says_why(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lora_request: .*No such file or directory"):
        llm.generate("a", GREEDY, lora_request=LoRARequest("x", 1, str(tmp_path / "none")))
    with pytest.raises(ValueError, match="2 lora_request for 1 prompts; give one, or as many"):
        llm.generate(["a"], GREEDY, lora_request=[None, None])
    two = [LoRARequest("x", 1, "/a"), LoRARequest("x", 1, "/b")]
    with pytest.raises(ValueError, match="x names two folders; give two names"):
        llm.generate(["a", "b"], GREEDY, lora_request=two)
    with pytest.raises(ValueError, match="needs lora_name and lora_path"):
        LoRARequest("", 1, "/a")
    assert llm.generate("a", GREEDY)[0].outputs[0].token_ids


def test_what_is_left_of_the_time_may_be_said(llm: LLM) -> None:
    """It is a difference of times, rounded: no message is refused for what it says."""
    for _ in range(30):
        llm.generate(["a"] * 8, SamplingParams(max_tokens=1))
    processes = llm._cluster._frontend._network.processes.values()
    assert [process._node.frames_malformed for process in processes] == [0] * len(processes)
    limit = 86_400.0  # of `messages.Seconds`
    assert all(now + LONGEST_S - now < limit for now in (0.1, 47_329.123, 1e6 / 3, 1e9 / 7))
