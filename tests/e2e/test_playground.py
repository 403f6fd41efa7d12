"""The playground in a browser, in front of a real cluster: one sees the hand-over happen."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from browser import Browser, browsing, needs_chromium
from e2e.stack import Stack

pytestmark = needs_chromium


@pytest.fixture
async def page(stack: Stack) -> AsyncIterator[Browser]:
    async with browsing() as browser:
        await browser.open(stack.url)
        await browser.until("document.querySelector('#ready').dataset.state === 'ready'")
        yield browser


async def ask(page: Browser, text: str) -> None:
    await page.run("document.activeElement.blur()")
    await page.press("/")
    await page.type(text)
    await page.press("Enter")


async def set_number(page: Browser, name: str, value: float) -> None:
    control = f"document.querySelector('#{name}')"
    await page.run(f"{control}.value = {value}; {control}.dispatchEvent(new Event('input'))")


async def test_an_answer_and_what_it_moved(page: Browser) -> None:
    await set_number(page, "temperature", 0)
    await ask(page, "What is the capital of France?")
    await page.until("document.querySelector('.assistant[aria-busy=true] .text')?.textContent")
    await page.until("document.querySelector('.assistant[aria-busy=false]')")
    assert "Paris" in await page.text(".assistant .text")
    numbers = await page.text(".numbers")
    for name in ("TTFT", "ITL", "tokens/s", "prompt", "cached", "output"):
        assert name in numbers
    assert "prefill-0 → decode-0" in numbers
    await page.until("document.querySelector('#moves').textContent.includes('from prefill-0')")
    assert "decode-0 read" in await page.text("#moves")
    nodes = await page.run("[...document.querySelectorAll('.worker')].map((w) => w.dataset.node)")
    assert nodes == ["prefill-0", "decode-0"]
    assert await page.run("document.querySelectorAll('.edge').length") == 1
    assert page.complaints == []


async def test_stop_and_again(stack: Stack, page: Browser) -> None:
    await ask(page, "Tell a very long story about the sea.")
    await page.until("document.querySelector('.assistant .text')?.textContent.length > 20")
    await page.click("#stop")
    await page.until("document.querySelector('.assistant[aria-busy=false]')")
    assert "stopped" in await page.text(".numbers")
    await page.run("document.querySelectorAll('.assistant button')[1].click()")
    await page.until("document.querySelector('.assistant[aria-busy=true] .text')?.textContent")
    await page.press("Escape")
    await page.until("document.querySelector('.assistant[aria-busy=false]')")
    assert await page.run("document.querySelectorAll('.message').length") == 2
    await asyncio.to_thread(stack.until_settled)
    assert page.complaints == []


@pytest.mark.parametrize("width", [360, 1280])
async def test_it_fits_in_light_and_dark(stack: Stack, page: Browser, width: int) -> None:
    await page.size(width, 740)
    await page.open(stack.url)
    await page.until("document.querySelector('.worker')")
    await page.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    await set_number(page, "max_tokens", 30)
    await ask(page, "Say " + "x" * 300)
    await page.until("document.querySelector('.assistant[aria-busy=false]')")
    grounds = set()
    for scheme in ("light", "dark"):
        await page.scheme(scheme)
        assert await page.run("document.documentElement.scrollWidth") <= width
        wide = await page.run(
            "[...document.querySelectorAll('main *, .top *')].filter((one) => "
            f"one.getBoundingClientRect().right > {width} + 0.5).map((one) => one.outerHTML)"
        )
        assert not wide
        grounds.add(await page.run("getComputedStyle(document.body).backgroundColor"))
        assert len(await page.screenshot()) > 5000
    assert len(grounds) == 2
    assert page.complaints == []
