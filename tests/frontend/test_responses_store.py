"""What is kept of responses is bounded in number, bytes and time."""

from hypothesis import given
from hypothesis import strategies as st

from frontend.fakes import FakeGateway, Server, serving
from slipstream.frontend.app import AppSettings
from slipstream.frontend.responses_store import ENTRY_BYTES, Kept, MemoryStore

KEEP_S, ENTRIES, BYTES = 10.0, 4, 10 * ENTRY_BYTES
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["keep", "find", "drop", "wait"]),
        st.integers(0, 7),
        st.integers(0, 6 * ENTRY_BYTES),
    ),
    max_size=60,
)


def entry(num_bytes: int) -> Kept:
    return Kept(b"x" * num_bytes, b"", b"")


@given(STEPS)
async def test_bounds(steps: list[tuple[str, int, int]]) -> None:
    now_s = 0.0
    store = MemoryStore(BYTES, KEEP_S, ENTRIES, clock=lambda: now_s)
    kept: dict[str, tuple[float, Kept]] = {}
    """In the order of their age."""
    for what, number, size in steps:
        name = f"resp_{number}"
        if what == "keep":
            assert await store.keep(name, entry(size)) and store.num_bytes <= BYTES
            kept.pop(name, None)
            kept[name] = now_s + KEEP_S, entry(size)
        elif what == "wait":
            now_s += number
        kept = {one: had for one, had in kept.items() if had[0] > now_s}
        while len(kept) > ENTRIES or sum(e.num_bytes for _, e in kept.values()) > BYTES:
            del kept[next(iter(kept))]
        if what == "drop":
            assert await store.drop(name) == (kept.pop(name, None) is not None)
        for one in [name, *kept]:
            assert await store.find(one) == (kept[one][1] if one in kept else None)
        assert store.num_bytes == sum(e.num_bytes for _, e in kept.values())


async def test_what_is_too_large_is_not_kept() -> None:
    store = MemoryStore(BYTES, KEEP_S)
    await store.keep("small", entry(1))
    assert not await store.keep("large", entry(BYTES))
    assert await store.find("small") and await store.find("large") is None


async def test_a_frontend_may_keep_nothing() -> None:
    async with serving(FakeGateway(), AppSettings(response_store_bytes=0)) as server:
        made = await _ask(server)
        response = await server.client.get(f"{server.url}/v1/responses/{made}")
        assert response.status == 404


async def test_each_frontend_keeps_its_own() -> None:
    async with (
        serving(FakeGateway(), AppSettings()) as one,
        serving(FakeGateway(), AppSettings()) as other,
    ):
        made = await _ask(one)
        assert (await one.client.get(f"{one.url}/v1/responses/{made}")).status == 200
        response = await other.client.get(f"{other.url}/v1/responses/{made}")
        assert response.status == 404 and "by the frontend that made" in await response.text()


async def _ask(server: Server) -> str:
    response = await server.post("/v1/responses", {"model": "demo", "input": "Hi"})
    return str((await response.json())["id"])
