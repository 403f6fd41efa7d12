"""Two models behind one door, one with LoRA adapters: each name answers as alone, while a model
joins and leaves and an adapter is replaced, under load and without a failed request."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import NotFoundError, OpenAI
from peft import PeftModel
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from e2e.reference import model_folder
from e2e.stack import PATIENCE_S, Stack, ports_in_a_row, until
from engine.tiny_lora import save_adapter

COUNT = 16
NAMES = ("first", "second", "third")
ADAPTERS = {"calm": 1, "wild": 2, "wilder": 3}
"""Of the first model: name -> seed. What is served as `wild` is replaced by the last one."""
PROMPTS = ("One, two, three,", "The river " * 20, "a")


@pytest.fixture(scope="module")
def folders() -> Iterator[dict[str, Path]]:
    """Tiny random models, each with weights of its own, and the demo's tokenizer."""
    demo = Path(model_folder())
    with tempfile.TemporaryDirectory(prefix="models-", dir="/tmp") as base:
        for seed, name in enumerate(NAMES):
            folder = Path(base) / name
            config = LlamaConfig(
                vocab_size=json.loads((demo / "config.json").read_text())["vocab_size"],
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512 if seed else 384,
                eos_token_id=2,
                pad_token_id=0,
            )
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(0.0, 0.2)
            model.save_pretrained(folder)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(demo / file, folder)
        first = LlamaForCausalLM.from_pretrained(Path(base) / "first", dtype=torch.float32)
        for name, seed in ADAPTERS.items():
            save_adapter(Path(base) / "loras" / name, first, seed)
        yield {name: Path(base) / name for name in (*NAMES, "loras")}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[tuple[str, str], str]:
    """What `generate` says, PEFT's with an adapter, by model or adapter and prompt."""
    found = {}
    for name in (*NAMES, *ADAPTERS):
        folder = folders["first" if name in ADAPTERS else name]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        if name in ADAPTERS:
            model = PeftModel.from_pretrained(model, str(folders["loras"] / name)).eval()
        for prompt in PROMPTS:
            tokens = torch.tensor([tokenizer(prompt)["input_ids"]])
            made = model.generate(input_ids=tokens, do_sample=False, max_new_tokens=COUNT)
            text = tokenizer.decode(made[0, tokens.shape[1] :], skip_special_tokens=True)
            found[name, prompt] = str(text)
    assert len(set(found.values())) == len(found), "no two answers are alike"
    return found


@contextmanager
def joined(stack: Stack, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One more model, by `slipstream serve --join`, until it is READY."""
    command = [sys.executable, "-m", "slipstream.cli.main", "serve", str(folder)]
    command += ["--join", str(stack.run_dir), "--port", str(stack.port), "--dtype", "float32"]
    command += ["--kv-cache-bytes", "32MiB", "--disaggregation", "always", "--threads", "1"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLIPSTREAM_")}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=env)

        def ready() -> bool:
            said.seek(0)
            text = said.read()
            assert process.poll() is None, text
            return "READY" in text

        try:
            until(ready, f"{folder.name} is READY")
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(PATIENCE_S)


class Load:
    """Requests for some names, one after the other from each of three threads, until stopped.
    `also`: what a name may say as well, for it is being replaced."""

    def __init__(
        self,
        urls: list[str],
        names: tuple[str, ...],
        expected: dict[tuple[str, str], str],
        also: dict[str, str],
    ):
        self.also, self.late = also, Counter[str]()
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._ask, args=(urls[number % len(urls)], names, expected, number)
            )
            for number in range(3)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(
        self, url: str, names: tuple[str, ...], expected: dict[tuple[str, str], str], number: int
    ) -> None:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        turn = number
        while not self._stop.is_set():
            turn += 1
            name, prompt = names[turn % len(names)], PROMPTS[turn // 2 % len(PROMPTS)]
            try:
                text = said(client, name, prompt)
            except Exception as error:  # noqa: BLE001 (whatever a client may meet is a failure here)
                self.wrong.append(f"{name}: {error!r}")
                return
            other = expected[self.also[name], prompt] if name in self.also else None
            if text not in (expected[name, prompt], other):
                self.wrong.append(f"{name}: {text!r}")
            self.counts[name] += 1
            self.late[name] += text == other

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert not self.wrong, self.wrong


def page_of(url: str) -> str:
    with urllib.request.urlopen(f"{url}/metrics") as page:
        return str(page.read().decode())


def said(client: OpenAI, model: str, prompt: str) -> str:
    answer = client.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=COUNT)
    assert answer.model == model
    return answer.choices[0].text


def change(stack: Stack, what: str, **body: Any) -> str:
    """Load or unload an adapter, as a client of vLLM would."""
    request = urllib.request.Request(
        f"{stack.url}/v1/{what}_lora_adapter",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return str(reply.read().decode())


def test_models_and_adapters_come_and_go_under_load(
    folders: dict[str, Path], expected: dict[tuple[str, str], str], tmp_path: Path
) -> None:
    routes = tmp_path / "routes.toml"
    routes.write_text("")
    environ = {"SLIPSTREAM_MODEL": str(folders["first"]), "SLIPSTREAM_ROUTES_FILE": str(routes)}
    environ |= {"SLIPSTREAM_LORA_DIR": str(folders["loras"]), "SLIPSTREAM_ALLOW_LORA_UPDATES": "1"}
    environ |= {"SLIPSTREAM_LORA_MODULES": "calm=calm"}
    stack = Stack(environ=environ, max_model_len=0, frontend=2, port=ports_in_a_row(2))
    urls = [stack.url, f"http://127.0.0.1:{stack.port + 1}"]
    try:
        client, other = (
            OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) for url in urls
        )
        with joined(stack, folders["second"]):
            loaded = change(stack, "load", lora_name="wild", lora_path="wild", base_model="first")
            assert loaded == "Success: LoRA adapter 'wild' added successfully."
            listed = {card.id: card.model_extra or {} for card in client.models.list()}
            assert listed.keys() == {"first", "second", "calm", "wild"}
            assert [listed[name]["max_model_len"] for name in listed] == [384, 512, 384, 384]
            assert listed["calm"]["parent"] == listed["wild"]["parent"] == "first"
            until(lambda: {card.id for card in other.models.list()} == listed.keys(), "both know")
            load = Load(urls, tuple(listed), expected, {"wild": "wilder"})
            until(lambda: min(load.counts[name] for name in listed) >= 2, "answers of all")
            assert not load.late["wild"]
            unknown = r"'third' does not exist\. Served here: 'first', 'second', 'calm', 'wild'"
            with pytest.raises(NotFoundError, match=unknown):
                said(client, "third", "a")
            with joined(stack, folders["third"]) as third:
                for prompt in PROMPTS:
                    assert said(client, "third", prompt) == expected["third", prompt]
                named = {"lora_name": "wild", "lora_path": "wilder", "base_model": "first"}
                change(stack, "load", **named, load_inplace=True)
                assert said(client, "wild", "a") == expected["wilder", "a"]
                until(lambda: said(other, "wild", "a") == expected["wilder", "a"], "both know")
                _routes_change_without_a_restart(stack, client, routes, expected)
                routes.write_text("")
                third.send_signal(signal.SIGTERM)
                assert third.wait(PATIENCE_S) == 0
            assert said(client, "first", "a") == expected["first", "a"]
            load.stop()
            assert min(load.counts.values()) >= 4, load.counts
            assert 0 < load.late["wild"] < load.counts["wild"]
            _an_adapter_is_taken_away(stack, client)
            page = page_of(urls[0]) + page_of(urls[1])
            assert 'running_lora_adapters="wild"' in page_of(urls[0])
            for name in ("first", "second", "third"):
                line = f'vllm:request_success_total{{finished_reason="length",model_name="{name}"}}'
                assert line in page, page
        stack.close()
    finally:
        stack.kill()


def _an_adapter_is_taken_away(stack: Stack, client: OpenAI) -> None:
    """And its memory is given back, when nobody can have it any more."""
    with pytest.raises(urllib.error.HTTPError, match="400"):
        change(stack, "load", lora_name="calm", lora_path="calm", base_model="first")
    change(stack, "unload", lora_name="calm")
    with pytest.raises(NotFoundError):
        said(client, "calm", "a")

    def let_go() -> int:
        return len(re.findall("drops the LoRA adapter calm@", stack.log))

    until(lambda: let_go() == 2, "both workers let it go")


def _routes_change_without_a_restart(
    stack: Stack, client: OpenAI, routes: Path, expected: dict[tuple[str, str], str]
) -> None:
    routes.write_text(
        "[alias.chat]\nfirst = 50\nthird = 50\n[shadow.second]\nto = 'third'\nshare = 1.0\n"
    )
    until(lambda: "chat" in {card.id for card in client.models.list()}, "the alias is listed")
    answers = []
    for _ in range(24):
        answer = client.completions.create(
            model="chat", prompt="a", temperature=0, max_tokens=COUNT
        )
        assert answer.choices[0].text == expected[answer.model, "a"]
        answers.append(answer.model)
    assert {"first", "third"} == set(answers), answers

    def shadowed() -> float:
        page = page_of(stack.url) + page_of(f"http://127.0.0.1:{stack.port + 1}")
        wanted = 'slipstream_shadow_requests_total{model_name="third",outcome="finished"}'
        lines = [line for line in page.splitlines() if line.startswith(wanted)]
        return sum(float(line.split()[-1]) for line in lines)

    until(lambda: shadowed() >= 1, "a copy of the second model's load was computed")
