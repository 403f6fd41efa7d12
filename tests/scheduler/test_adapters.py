"""Adapters are wanted: every worker of the model has them before they can be asked for."""

import msgspec

from scheduler.rig import DECODE, PREFILL, WORKING, Rig, node, submit
from slipstream.core.machine import PeerDown
from slipstream.errors import ErrorCode, Problem
from slipstream.messages import (
    AdapterAnswer,
    AdapterChanged,
    AdapterInfo,
    ChangeAdapter,
    Decode,
    Failed,
    NodeInfo,
    Peers,
    Prefill,
    StreamEnded,
    UnwantAdapter,
    WantAdapter,
)
from slipstream.scheduler.adapters import AGAIN_S, AWAY_S, LOAD_S, RETIRE_S
from slipstream.types import NodeId

FRONTEND = "frontend-0"


def having(node_id: NodeId, *adapters: AdapterInfo) -> NodeInfo:
    known = node(node_id)
    assert known.worker is not None
    worker = msgspec.structs.replace(known.worker, adapters=adapters)
    return msgspec.structs.replace(known, worker=worker)


def info(version: str = "1", generation: int = 1, path: str = "/a", **more: bool) -> AdapterInfo:
    return AdapterInfo(
        adapter_id=f"a@{version}", name="a", path=path, generation=generation, **more
    )


class Desk(Rig):
    """With a frontend, and an operator behind it."""

    def __init__(self) -> None:
        super().__init__(*WORKING, FRONTEND)

    def ask(self, path: str = "/a", replace: bool = False, model: str = "fake") -> None:
        call_id = f"{path} {self.now_s}"
        change = ChangeAdapter(call_id=call_id, model=model, name="a", path=path, replace=replace)
        self.hear(FRONTEND, change)

    def load(self, adapter: AdapterInfo, *others: AdapterInfo) -> None:
        """Both workers have it."""
        for worker in (PREFILL, DECODE):
            self.join(having(worker, *others, adapter))
            self.answer(worker, adapter)

    def answer(self, worker: NodeId, adapter: AdapterInfo) -> None:
        self.hear(
            worker,
            AdapterAnswer(
                name="a", path=adapter.path, generation=adapter.generation, adapter=adapter
            ),
        )

    def said(self, kind: type) -> list[tuple[NodeId, object]]:
        return [(to, message) for to, message in self.sent if isinstance(message, kind)]

    def result(self) -> Problem | None:
        ((to, changed),) = self.said(AdapterChanged)
        assert to == FRONTEND and isinstance(changed, AdapterChanged)
        return changed.problem

    def listed(self) -> list[str]:
        return [adapter.adapter_id for adapter in self.machine.adapters.of("fake")]


def test_all_workers_have_it_before_it_is_listed() -> None:
    desk = Desk()
    desk.ask()
    want = WantAdapter(name="a", path="/a", generation=1)
    assert desk.said(WantAdapter) == [(DECODE, want), (PREFILL, want)]
    desk.join(having(PREFILL, info()))
    desk.answer(PREFILL, info())
    assert not desk.said(AdapterChanged) and desk.listed() == []
    desk.join(having(DECODE, info()))
    desk.answer(DECODE, info())
    assert desk.result() is None and desk.listed() == ["a@1"]
    peers = [message for to, message in desk.said(Peers) if to == FRONTEND]
    assert isinstance(peers[0], Peers) and peers[0].models[0].adapters == [info()]


def test_one_that_cannot_load_it_ends_the_change_and_the_others_let_go() -> None:
    desk = Desk()
    desk.ask()
    desk.join(having(PREFILL, info()))
    desk.answer(PREFILL, info())
    problem = Problem(code=ErrorCode.INVALID_VALUE, message="rank 99")
    desk.hear(DECODE, AdapterAnswer(name="a", path="/a", generation=1, problem=problem))
    assert desk.result() == problem and desk.listed() == []
    told = []
    while desk.now_s < 20.0 + 2 * RETIRE_S:
        desk.pass_time(0.25)
        told += desk.said(UnwantAdapter)
    retired = PREFILL, UnwantAdapter(adapter_id="a@1")
    gone = PREFILL, UnwantAdapter(adapter_id="a@1", at_once=True)
    assert told[0] == retired and gone in told


def test_different_files_are_no_adapter() -> None:
    desk = Desk()
    desk.ask()
    desk.answer(PREFILL, info("1"))
    desk.answer(DECODE, info("2"))
    problem = desk.result()
    assert problem is not None and "different files in /a" in problem.message


def test_what_is_refused() -> None:
    desk = Desk()
    desk.ask("")
    problem = desk.result()
    assert problem is not None and problem.code is ErrorCode.MODEL_NOT_FOUND
    desk.ask(model="none")
    problem = desk.result()
    assert problem is not None and problem.code is ErrorCode.NO_WORKER
    desk.ask()
    desk.pass_time(1.0)
    desk.ask(replace=True)
    problem = desk.result()
    assert problem is not None and "is being loaded" in problem.message
    desk.load(info())
    desk.ask()
    problem = desk.result()
    assert problem is not None and "loaded already" in problem.message


def test_nobody_waits_for_ever() -> None:
    desk = Desk()
    desk.ask()
    while not desk.said(AdapterChanged):
        desk.pass_time(0.25)
    problem = desk.result()
    assert problem is not None and f"no word of {DECODE}, {PREFILL}" in problem.message
    assert 20.0 + LOAD_S <= desk.now_s <= 21.0 + LOAD_S


def test_a_worker_that_comes_later_is_told() -> None:
    desk = Desk()
    desk.ask()
    desk.load(info())
    desk.join(node("decode-1"))
    told: list[tuple[NodeId, object]] = []
    while desk.now_s < 20.0 + 2.5 * AGAIN_S:
        desk.pass_time(0.25)
        told += desk.said(WantAdapter)
    assert told == [("decode-1", WantAdapter(name="a", path="/a", generation=1))] * 3


def test_what_was_replaced_stays_for_those_who_have_it() -> None:
    desk = Desk()
    desk.ask()
    desk.load(info())
    desk.hear("tokenizer-0", msgspec.structs.replace(submit("old"), adapter="a@1"))
    assert {m.adapter for _, m in desk.sent if isinstance(m, Prefill | Decode)} == {"a@1"}
    desk.ask("/b", replace=True)
    new = info("2", 2, "/b")
    desk.load(new, info(retired=True))
    assert desk.listed() == ["a@2"]
    told: list[tuple[NodeId, object]] = []
    for _ in range(int(8 * RETIRE_S)):
        desk.pass_time(0.25)
        told += desk.said(UnwantAdapter)
    assert not told, "a request has it"
    desk.hear("tokenizer-0", StreamEnded(request_id="old"))
    for _ in range(int(8 * RETIRE_S)):
        desk.pass_time(0.25)
        told += desk.said(UnwantAdapter)
    gone = UnwantAdapter(adapter_id="a@1", at_once=True)
    assert {(DECODE, gone), (PREFILL, gone)} <= set(told)  # type: ignore[arg-type]


def test_a_request_waits_for_its_adapter_and_holds_up_nobody() -> None:
    desk = Desk()
    desk.hear("tokenizer-0", msgspec.structs.replace(submit("rare"), adapter="a@9"))
    assert desk.state("rare") == "queued"
    desk.submit("other")
    assert desk.state("other") == "prefilling"
    failures: list[tuple[NodeId, object]] = []
    while not failures and desk.now_s < 100.0:
        desk.pass_time(0.25)
        failures = desk.said(Failed)
    ((_, failed),) = failures
    assert (
        isinstance(failed, Failed)
        and "no worker with the LoRA adapter 'a'" in failed.problem.message
    )


def test_a_young_scheduler_takes_what_workers_have() -> None:
    desk = Rig(young=True)
    desk.join(having(DECODE, info("1", 4, retired=True), info("2", 5)))
    desk.join(having(PREFILL, info("3", 3)))
    assert [a.adapter_id for a in desk.machine.adapters.of("fake")] == ["a@2"]


def test_what_a_worker_is_started_with_is_wanted_until_it_is_taken_away() -> None:
    desk = Desk()
    desk.join(having(DECODE, info("1", 0)))
    assert desk.listed() == ["a@1"]
    desk.ask("")
    assert not desk.said(AdapterChanged), "one worker still offers it"
    desk.join(having(DECODE, info("1", 0, retired=True)))
    assert desk.result() is None and desk.listed() == []
    desk.join(having(PREFILL, info("1", 0)))
    assert desk.listed() == [], "it was started with it, too, but that was long ago"


def test_a_name_is_a_models_or_one_adapters() -> None:
    desk = Desk()
    taken = msgspec.structs.replace(info(generation=0), name="fake", adapter_id="fake@1")
    other = node("decode-1", model="other", kv_layout_id="other/float32/l1")
    assert other.worker is not None
    for adapter in (taken, info(generation=0)):
        worker = msgspec.structs.replace(other.worker, adapters=(adapter,))
        desk.join(msgspec.structs.replace(other, worker=worker))
    assert [a.adapter_id for a in desk.machine.adapters.of("other")] == ["a@1"]
    assert "'fake' is the name of a model" in desk.notes[0]
    desk.ask()
    problem = desk.result()
    assert problem is not None and "'a' is an adapter of 'other'" in problem.message
    desk.join(having(DECODE, info("2", 0)))
    assert desk.listed() == [] and "'a' is an adapter of 'other'" in desk.notes[-1]


def test_a_model_that_is_gone_for_good_keeps_no_names() -> None:
    desk = Desk()
    desk.ask()
    desk.load(info())
    for gone in (PREFILL, DECODE, "tokenizer-0"):
        desk.handle(PeerDown(gone))
    desk.pass_time(AWAY_S - 10.0)
    assert desk.listed() == ["a@1"], "it may come back"
    desk.pass_time(20.0)
    assert desk.listed() == []
