"""What is served at `/`, under `/playground` and at `/cluster`."""

import re
from typing import Any

import pytest

from frontend.fakes import Server
from slipstream.frontend.cluster import STATES
from slipstream.frontend.playground_api import NAMES
from slipstream.messages import ClusterLoad
from slipstream.scheduler.request import State

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
CSP = {
    "default-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "object-src": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}


async def fetch(server: Server, path: str, **headers: str) -> tuple[int, dict[str, str], str]:
    async with server.client.get(server.url + path, headers=headers) as response:
        names = {name.lower(): value for name, value in response.headers.items()}
        return response.status, names, await response.text()


def policy(headers: dict[str, str]) -> dict[str, str]:
    parts = headers["content-security-policy"].split(";")
    return dict(part.strip().split(" ", 1) for part in parts)  # type: ignore[misc]


async def test_browsers_get_the_page_and_programs_the_index(server: Server) -> None:
    status, headers, page = await fetch(server, "/", Accept=BROWSER)
    assert status == 200 and page.startswith("<!doctype html>")
    assert headers["content-type"] == "text/html; charset=utf-8"
    for accept in ("application/json", "*/*"):
        status, other, text = await fetch(server, "/", Accept=accept)
        assert (status, other["content-type"]) == (200, "application/json")
        assert '"name":"slipstream"' in text and "/v1/chat/completions" in text
        assert headers["vary"] == other["vary"] == "Accept"


@pytest.mark.parametrize("path", ["/", *(f"/playground/{name}" for name in NAMES)])
async def test_every_file_is_guarded_and_kept(server: Server, path: str) -> None:
    status, headers, text = await fetch(server, path, Accept=BROWSER)
    assert status == 200 and text
    assert policy(headers) == CSP
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-cache" and headers["x-request-id"]
    types = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    kind = types.get(path.rpartition(".")[2], "text/html")
    assert headers["content-type"].split(";")[0] == kind
    known = {"Accept": BROWSER, "If-None-Match": headers["etag"]}
    status, again, text = await fetch(server, path, **known)
    assert (status, text, again["etag"]) == (304, "", headers["etag"])
    assert policy(again) == CSP
    status, _, text = await fetch(server, path, **{**known, "If-None-Match": '"older"'})
    assert status == 200 and text


@pytest.mark.parametrize(
    "path",
    [
        "/playground/",
        "/playground/nothing.js",
        "/playground/..%2fapp.py",
        "/playground/%2e%2e%2fapp.py",
        "/playground/main.js%00",
        "/playground/sub/main.js",
    ],
)
async def test_nothing_else_is_there(server: Server, path: str) -> None:
    status, _, text = await fetch(server, path)
    assert status == 404 and '"code":"unknown_url"' in text


async def test_the_page_names_nothing_inline_and_nothing_from_elsewhere(server: Server) -> None:
    for name in NAMES:
        _, _, text = await fetch(server, f"/playground/{name}")
        there = text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|@import|\burl\((?!#)", there), name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text
        )
        if name.endswith("html"):
            assert not re.search(r"\s(style|on\w+)=|<style|<script(?![^>]*\ssrc=)", text)
            linked = re.findall(r'(?:src|href)="playground/([^"]+)"', text)
            assert linked and set(linked) <= set(NAMES)
        for imported in re.findall(r'from "\./([^"]+)"', text):
            assert imported in NAMES


async def test_files_are_short(server: Server) -> None:
    for name in NAMES:
        _, _, text = await fetch(server, f"/playground/{name}")
        assert text.count("\n") <= 400, name


# --- The cluster ----------------------------------------------------------------------------------

GAUGES = {
    "decode-0": {
        "running": 3,
        "waiting": 1,
        "waiting_tokens": 40,
        "steps": 9,
        "step_seconds_total": 0.5,
        "blocks_free": 50,
        "blocks_used": 10,
        "blocks_cached": 6,
        "blocks_leased": 4,
        "preemptions_total": 2,
        "prefix_hit_tokens_total": 16,
        "prefix_query_tokens_total": 90,
        "transfer_shm_reads_total": 5,
        "transfer_shm_bytes_total": 4096,
        "transfer_shm_seconds_total": 0.25,
        "transfer_shm_gbps": 4.5,
        "transfer_shm_peers": 1,
        "transfer_cuda_ipc_failures_timeout_total": 1,
        "transfer_cuda_ipc_failures_layout_total": 2,
    },
    "scheduler": {
        "requests_queued": 2,
        "requests_decoding": 3,
        "requests_accepted_total": 8,
        "requests_ended_total": 3,
        "requests_migrated_total": 1,
        "requests_placed_apart_total": 6,
        "requests_placed_alone_total": 2,
        "role_shifts_total": 1,
        "ttft_prediction_error_median": 0.25,
    },
}


async def cluster(server: Server) -> dict[str, Any]:
    async with server.client.get(server.url + "/cluster") as response:
        assert response.status == 200 and response.headers["Cache-Control"] == "no-store"
        found: dict[str, Any] = await response.json()
    return found


def test_every_state_of_a_request_is_shown() -> None:
    assert tuple(State) == STATES


async def test_a_cluster_that_has_not_reported(server: Server) -> None:
    found = await cluster(server)
    assert found["ready"] and found["model"] == "demo" and found["requests"] is None
    (worker,) = found["workers"]
    assert worker["load"] is None and worker["epoch"] == "7" and worker["num_blocks"] == 64
    scheduler = {"node_id": "scheduler", "role": "scheduler", "draining": False}
    assert found["services"] == [scheduler]
    assert found["frontend"] == {"node_id": "frontend-0", "requests_live": 2, "tokens_total": 9}


async def test_a_cluster_at_work(server: Server) -> None:
    read = {"decode-0": {"prefill-0": 12}}
    server.gateway.load = ClusterLoad(gauges=GAUGES, blocks_from=read)
    found = await cluster(server)
    (worker,) = found["workers"]
    nothing = {"reads_total": 0, "bytes_total": 0, "seconds_total": 0.0, "gbps": None}
    assert worker["load"] == {
        "running": 3,
        "waiting": 1,
        "waiting_tokens": 40,
        "steps_total": 9,
        "step_seconds_total": 0.5,
        "blocks": {"free": 50, "used": 10, "cached": 6, "leased": 4},
        "blocks_from": {"prefill-0": 12},
        "transports": {
            "shm": {
                "reads_total": 5,
                "bytes_total": 4096,
                "seconds_total": 0.25,
                "failures_total": 0,
                "gbps": 4.5,
            },
            "cuda_ipc": {**nothing, "failures_total": 3},
        },
        "prefix_hit_tokens_total": 16,
        "prefix_query_tokens_total": 90,
        "preemptions_total": 2,
    }
    states = {name: number for name, number in found["requests"]["states"].items() if number}
    assert states == {"queued": 2, "decoding": 3}
    assert found["requests"]["placed_total"] == {"alone": 2, "apart": 6, "fetching": 0}
    assert found["requests"]["ttft_prediction_error_median"] == 0.25


async def test_a_cluster_that_cannot_serve_is_shown_all_the_same(server: Server) -> None:
    now = server.gateway.now
    server.gateway.now = type(now)(ready=False, reason="no decode worker")
    found = await cluster(server)
    assert (found["ready"], found["reason"]) == (False, "no decode worker")
    assert found["workers"] == found["services"] == []
