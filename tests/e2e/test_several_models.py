"""Two models behind one door: each answers as alone, by its name or an alias, while one more joins
and leaves under load."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from openai import NotFoundError, OpenAI
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from e2e.reference import model_folder
from e2e.stack import PATIENCE_S, Stack, until

COUNT = 16
NAMES = ("first", "second", "third")
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
        yield {name: Path(base) / name for name in NAMES}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[tuple[str, str], str]:
    """What `generate` says, by model and prompt."""
    found = {}
    for name, folder in folders.items():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for prompt in PROMPTS:
            tokens = torch.tensor([tokenizer(prompt)["input_ids"]])
            made = model.generate(tokens, do_sample=False, max_new_tokens=COUNT)
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
    """Requests for some models, one after the other from each of three threads, until stopped."""

    def __init__(self, url: str, names: tuple[str, ...], expected: dict[tuple[str, str], str]):
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(url, names, expected, number))
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
            if text != expected[name, prompt]:
                self.wrong.append(f"{name}: {text!r}")
            self.counts[name] += 1

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert not self.wrong, self.wrong


def page_of(stack: Stack) -> str:
    with urllib.request.urlopen(f"{stack.url}/metrics") as page:
        return str(page.read().decode())


def said(client: OpenAI, model: str, prompt: str) -> str:
    answer = client.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=COUNT)
    assert answer.model in NAMES
    return answer.choices[0].text


def test_models_join_answer_and_leave_under_load(
    folders: dict[str, Path], expected: dict[tuple[str, str], str], tmp_path: Path
) -> None:
    routes = tmp_path / "routes.toml"
    routes.write_text("")
    environ = {"SLIPSTREAM_MODEL": str(folders["first"]), "SLIPSTREAM_ROUTES_FILE": str(routes)}
    stack = Stack(environ=environ, max_model_len=0)
    try:
        client = OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=60)
        with joined(stack, folders["second"]):
            listed = {card.id: card.model_extra for card in client.models.list()}
            assert listed.keys() == {"first", "second"}
            assert [listed[n]["max_model_len"] for n in ("first", "second")] == [384, 512]
            load = Load(stack.url, ("first", "second"), expected)
            until(lambda: min(load.counts[n] for n in ("first", "second")) >= 2, "answers of both")
            with pytest.raises(
                NotFoundError, match=r"'third' does not exist\. Served here: 'first'"
            ):
                said(client, "third", "a")
            with joined(stack, folders["third"]) as third:
                for prompt in PROMPTS:
                    assert said(client, "third", prompt) == expected["third", prompt]
                _routes_change_without_a_restart(stack, client, routes, expected)
                routes.write_text("")
                third.send_signal(signal.SIGTERM)
                assert third.wait(PATIENCE_S) == 0
            assert said(client, "first", "a") == expected["first", "a"]
            load.stop()
            assert min(load.counts.values()) >= 2, load.counts
            page = page_of(stack)
            for name in ("first", "second", "third"):
                line = f'vllm:request_success_total{{finished_reason="length",model_name="{name}"}}'
                assert line in page, page
        stack.close()
    finally:
        stack.kill()


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
        page = page_of(stack)
        wanted = 'slipstream_shadow_requests_total{model_name="third",outcome="finished"}'
        lines = [line for line in page.splitlines() if line.startswith(wanted)]
        return float(lines[0].split()[-1]) if lines else 0.0

    until(lambda: shadowed() >= 1, "a copy of the second model's load was computed")
