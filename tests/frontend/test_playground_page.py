"""The playground in a browser, in front of a gateway that answers from a script."""

import ast
import json
import shlex
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from browser import Browser, browsing, needs_chromium
from frontend.fakes import (
    FakeGateway,
    Pause,
    Script,
    Server,
    answer,
    parted,
    serving,
    think,
    until,
)
from frontend.test_callers import entry
from frontend.test_playground import GAUGES
from slipstream.errors import ErrorCode, Problem
from slipstream.frontend.app import AppSettings
from slipstream.frontend.gateway import ClusterStatus, ModelCard
from slipstream.messages import ChatPrompt, ClusterLoad, Part, PartKind, Tokenize

pytestmark = needs_chromium

HOSTILE = "<img src=x onerror=alert(1)> <b>wörld</b> 😀 你好"
IDLE = "!document.querySelector('[aria-busy=true]') && document.querySelector('.assistant')"


@pytest.fixture
async def page(server: Server) -> AsyncIterator[Browser]:
    async with browsing() as browser:
        await browser.open(server.url + "/")
        await browser.until("document.querySelector('#ready').dataset.state === 'ready'")
        yield browser


async def ask(page: Browser, text: str) -> None:
    await page.run("document.querySelector('#prompt').focus()")
    await page.type(text)
    await page.press("Enter")


async def set_control(page: Browser, name: str, value: str) -> None:
    control = f"document.querySelector('#{name}')"
    await page.run(f"{control}.value = {value!r}; {control}.dispatchEvent(new Event('input'))")


async def test_an_answer_is_text_with_its_numbers(server: Server, page: Browser) -> None:
    pieces = [HOSTILE[i : i + 3] for i in range(0, len(HOSTILE), 3)]

    def script(submission: Tokenize) -> Script:
        items = answer(submission, pieces)
        return [thing for item in items for thing in (Pause(0.01), item)]

    server.gateway.script = script
    await ask(page, "  Hi <i>there</i>")
    await page.until(IDLE)
    assert await page.text(".assistant .text") == HOSTILE
    assert await page.text(".user .text") == "Hi <i>there</i>"
    assert not await page.run("document.querySelectorAll('.message :is(img, b, i)').length")
    numbers = (await page.text(".numbers")).replace("\n", " ")
    for expected in ("TTFT", "12 ms", "ITL", "tokens/s", "prompt 5", "cached 2"):
        assert expected in numbers, numbers
    assert f"output {len(pieces)}" in numbers and "prefill-0 → decode-0" in numbers
    assert await page.text("#context") == f"{5 + len(pieces)} of 100 tokens"
    assert page.complaints == []


async def test_what_the_model_thinks_stands_before_its_answer(
    server: Server, page: Browser
) -> None:
    def script(submission: Tokenize) -> Script:
        said = [think("I <b>see"), think("."), Part(PartKind.CONTENT, "Yes.")]
        items = parted(submission, *([part] for part in said))
        return [thing for item in items for thing in (Pause(0.01), item)]

    server.gateway.script = script
    await ask(page, "Do you?")
    await page.until(IDLE)
    assert await page.text(".assistant .thoughts") == "I <b>see."
    assert await page.text(".assistant .text") == "Yes."
    assert await page.run("document.querySelector('.assistant').firstChild.className") == "thoughts"
    await ask(page, "Sure?")
    await page.until(IDLE)
    prompt = server.gateway.submissions[-1].prompt
    assert isinstance(prompt, ChatPrompt) and b"see" not in msgspec.json.encode(prompt)
    assert page.complaints == []


async def test_what_is_set_is_sent(server: Server, page: Browser) -> None:
    await ask(page, "one")
    await page.until(IDLE)
    plain = server.gateway.submissions[-1]
    assert plain.prompt == ChatPrompt(messages=[{"role": "user", "content": "one"}])
    assert plain.clamp_max_tokens and plain.sampling.temperature == 1.0
    changes = {"system": "Be brief.", "temperature": "0.5", "max_tokens": "7", "seed": "-3"}
    for name, value in changes.items():
        await set_control(page, name, value)
    await set_control(page, "key", "secret")
    await page.open(server.url + "/")  # they stay in this tab
    await page.until("document.querySelector('#model').textContent")
    await ask(page, "two")
    await page.until(IDLE)
    sent = server.gateway.submissions[-1]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "two"}]
    assert sent.prompt == ChatPrompt(messages=messages)
    sampling = sent.sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.seed) == (0.5, 7, -3)
    assert sampling.top_p == 1.0
    await page.click("#reset")
    await ask(page, "three")
    await page.until("document.querySelectorAll('.assistant[aria-busy=false]').length === 2")
    assert server.gateway.submissions[-1].clamp_max_tokens
    assert page.complaints == []


async def test_of_several_models_one_is_chosen(server: Server, page: Browser) -> None:
    assert await page.run("document.querySelector('#model').disabled"), "there is one alone"
    now = server.gateway.now
    style = ModelCard(name="style", max_model_len=50, root="/loras/style", parent=now.model)
    server.gateway.now = msgspec.structs.replace(now, models=[*now.models, style])
    await page.until("document.querySelectorAll('#model option').length === 2")
    assert await page.text("#model option:last-child") == f"style ({now.model})"
    asked: list[str] = []
    status = server.gateway.status

    def remembered(name: str = "", key: str = "") -> ClusterStatus:
        asked.append(name)
        return status(name, key)

    server.gateway.status = remembered  # type: ignore[method-assign]
    choose = "const all = document.querySelector('#model'); all.value = 'style'; "
    await page.run(choose + "all.dispatchEvent(new Event('change'))")
    await ask(page, "Hi")
    await page.until(IDLE)
    assert "style" in asked
    assert (await page.text("#context")).endswith("of 50 tokens")
    for width in (1000, 360):
        await page.size(width, 800)
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert await page.run(wide) <= 0
    assert page.complaints == []


async def test_a_conversation_goes_on_is_asked_again_and_forgotten(
    server: Server, page: Browser
) -> None:
    await ask(page, "one")
    await page.until(IDLE)
    await ask(page, "two")
    await page.until("document.querySelectorAll('.assistant[aria-busy=false]').length === 2")
    spoken = server.gateway.submissions[-1].prompt
    assert isinstance(spoken, ChatPrompt)
    roles = [message["role"] for message in spoken.messages]
    assert roles == ["user", "assistant", "user"]
    assert spoken.messages[1]["content"] == "Hello world"
    await page.run(
        "document.querySelectorAll('.assistant')[0].querySelectorAll('button')[1].click()"
    )
    await page.until(IDLE)
    again = server.gateway.submissions[-1].prompt
    assert isinstance(again, ChatPrompt) and len(again.messages) == 1
    assert await page.run("document.querySelectorAll('.message').length") == 2
    await page.click("#new-chat")
    assert await page.run("document.querySelectorAll('.message').length") == 0
    assert page.complaints == []


async def test_stop(server: Server, page: Browser) -> None:
    for end in ("document.querySelector('#stop').click()", ""):
        server.gateway.script = lambda submission: [
            *answer(submission, ["Hel", "lo"])[:2],
            Pause(60.0),
        ]
        await ask(page, "Hi")
        await page.until("document.querySelector('.assistant:last-child .text').textContent")
        if end:
            await page.run(end)
        else:
            await page.press("Escape")
        await page.until(IDLE)
        assert "stopped" in await page.text(".assistant:last-child .numbers")
        await page.until("document.querySelector('#stop').hidden")
        await until(lambda: server.gateway.streams[-1].closed == 1)
    assert page.complaints == []


async def test_refusals_are_shown(server: Server, page: Browser) -> None:
    server.gateway.refuse(Problem(code=ErrorCode.QUEUE_FULL, message="8 requests are <live>."))
    await ask(page, "Hi")
    await page.until(IDLE)
    said = await page.text(".problem")
    assert ErrorCode.QUEUE_FULL.value in said and "8 requests are <live>." in said
    assert "HTTP 429" in said and "request " in said
    server.gateway.script = lambda submission: [
        *answer(submission, ["Hel", "lo"])[:2],
        Problem(code=ErrorCode.INTERNAL, message="It broke."),
    ]
    await page.click("#new-chat")
    await ask(page, "Hi")
    await page.until(IDLE)
    assert await page.text(".assistant .text") == "Hel"
    assert "It broke." in await page.text(".problem")
    (complaint,) = page.complaints  # the browser's own line about the 429
    assert "429" in complaint


async def test_commands_to_paste(server: Server, page: Browser) -> None:
    await set_control(page, "key", "secret")
    await ask(page, "It's \"5 o'clock\" \\ $HOME 😀\nyes")
    await page.until(IDLE)
    await page.run("[...document.querySelectorAll('.actions button')].at(-1).click()")
    shown = {}
    for index, name in enumerate(("Request", "Response", "curl", "Python")):
        await page.run(f"document.querySelectorAll('#raw-tabs button')[{index}].click()")
        shown[name] = str(await page.run("document.querySelector('#raw-text').textContent"))
    request = json.loads(shown["Request"])
    assert "x-slipstream-path: prefill-0>decode-0" in shown["Response"]
    assert shown["Response"].rstrip().endswith("data: [DONE]")
    words = shlex.split(shown["curl"].replace("\\\n", ""))
    body = json.loads(words[words.index("-d") + 1])
    assert body["messages"] == request["messages"] and body["stream"] is True
    assert words[2] == server.url + "/v1/chat/completions"
    call = next(
        node
        for node in ast.walk(ast.parse(shown["Python"]))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("completions.create")
    )
    members = {one.arg: ast.literal_eval(one.value) for one in call.keywords}
    assert members["messages"] == request["messages"] and members["stream"] is True
    assert not any("secret" in text for text in shown.values())
    assert page.complaints == []


async def test_characters_in_pieces(page: Browser) -> None:
    """A read may end anywhere: inside a character, inside a line's end."""
    found = await page.run("""
        import("./playground/stream.js").then(async ({ arrivals }) => {
          const lines = [': comment\\n', 'data: {"a": "😀é"}\\r\\n\\r'];
          lines.push('data: 2\\n', 'data: [DONE]\\n');
          const text = lines.map((line) => `${line}\\n`).join("");
          const bytes = new TextEncoder().encode(text);
          const body = new ReadableStream({
            start(to) {
              for (const byte of bytes) to.enqueue(new Uint8Array([byte]));
              to.close();
            },
          });
          const found = [];
          for await (const events of arrivals(body)) {
            found.push(...events.map(({ data }) => data));
          }
          return found;
        })""")
    assert found == ['{"a": "😀é"}', "2", "[DONE]"]


async def test_tokens_that_come_together_share_the_wait(page: Browser) -> None:
    found = await page.run("""
        import("./playground/stream.js").then(({ Meter }) => {
          const real = performance.now.bind(performance);
          let now = 0;
          performance.now = () => now;
          const meter = new Meter();
          for (const [ms, tokens] of [[100, 1], [110, 2], [150, 6], [151, 6], [250, 7]]) {
            now = ms;
            meter.take(tokens);
          }
          performance.now = real;
          return [meter.ttft, meter.itl, meter.rate];
        })""")
    assert found == [100, 10, 40]


async def test_the_panel_shows_who_reads_from_whom(server: Server, page: Browser) -> None:
    worker = server.gateway.now.nodes[0]
    other = type(worker)(
        node_id="prefill-0", role=worker.role, epoch=3, address="c", worker=worker.worker
    )
    server.gateway.now.nodes.append(other)
    gauges = {**GAUGES, "prefill-0": GAUGES["decode-0"]}
    for blocks in (12, 15):
        read = {"decode-0": {"prefill-0": blocks}}
        server.gateway.load = ClusterLoad(gauges=gauges, blocks_from=read)
        await page.until("document.querySelectorAll('.edge').length === 1")
    await page.until("document.querySelector('.moves').textContent.includes('3 blocks')")
    assert "decode-0 read 3 blocks from prefill-0" in await page.text("#moves")
    assert await page.text("#queue") == "2"
    assert "2 waiting, 3 decoding" in await page.text("#requests")
    cells = await page.run(
        "['active', 'leased', 'cached'].map((kind) => "
        "document.querySelector('.pool').querySelectorAll('.' + kind).length)"
    )
    assert cells == [6, 6, 9], "of 96 cells, for 4, 4 and 6 of 64 blocks"
    server.gateway.now.nodes.pop()
    await page.until("!document.querySelector('.edge')")
    assert page.complaints == []


async def test_a_key_is_asked_for_and_shown_to_every_path(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(entry("alice", "key-a") + entry("root", "key-r", operator=True))
    settings = AppSettings(api_keys_file=str(keys))
    async with serving(FakeGateway(), settings) as server, browsing() as page:
        await page.open(server.url + "/")
        state = "document.querySelector('#ready').dataset.state"
        await page.until(f"{state} === 'locked'")
        assert await page.run("document.querySelector('#request-fold').open")
        await set_control(page, "key", "key-a")
        await page.until(f"{state} === 'ready'")
        assert await page.text("#cluster-note") == "for operators"
        await ask(page, "Hi")
        await page.until(IDLE)
        assert server.gateway.submissions[-1].tenant == "alice"
        await set_control(page, "key", "key-r")
        await page.until("document.querySelector('#cluster-note').textContent === '1 worker'")
