"""What is kept of whom, under which names it is found, and what goes to a collector when."""

import pytest

from slipstream.scheduler import trace_store
from slipstream.scheduler.trace_store import EXPORT_AFTER_S, TraceStore
from slipstream.spans import RequestSpans, Span, Trace, TraceContext
from slipstream.types import Role

CONTEXT = TraceContext(trace_id="a" * 32)


def span(number: int, end_ns: int = 5, name: str = "x") -> Span:
    return Span(number=number, name=name, begin_ns=1, end_ns=end_ns)


def tell(
    store: TraceStore,
    *spans: Span,
    request_id: str = "r",
    node_id: str = "frontend-0",
    over: bool = True,
    context: TraceContext | None = CONTEXT,
    now_s: float = 0.0,
) -> list[Trace]:
    role = Role(node_id.partition("-")[0])
    said = context if role is Role.FRONTEND else None
    told = RequestSpans(request_id=request_id, spans=list(spans), over=over, context=said)
    exported = store.add(node_id, role, 1, told, now_s)
    store.check()
    return exported


def numbers(traces: list[Trace]) -> list[int]:
    return [span.number for trace in traces for p in trace.processes for span in p.spans]


DRAWN = "0123abcd" * 4


@pytest.mark.parametrize(
    ("request_id", "names", "others"),
    [
        (
            "chatcmpl-0123abcdef-0",
            ("chatcmpl-0123abcdef-0", "chatcmpl-0123abcdef", "0123abcdef"),
            ("0123", "chatcmpl", "abcdef-0", "0123abcdef-1", ".*", "chatcmpl-0123abcde."),
        ),
        (
            f"cmpl-my.id-{DRAWN}-12",
            (f"cmpl-my.id-{DRAWN}-12", f"cmpl-my.id-{DRAWN}", "my.id", f"my.id-{DRAWN}"),
            ("my-id", "id", "my"),
        ),
    ],
)
def test_names(request_id: str, names: tuple[str, ...], others: tuple[str, ...]) -> None:
    store = TraceStore(exports=False)
    tell(store, span(1), request_id=request_id)
    for name in names:
        assert [trace.request_id for trace in store.find(name)] == [request_id], name
    for name in others:
        assert not store.find(name), name


def test_all_choices_are_found() -> None:
    store = TraceStore(exports=False)
    for choice in range(3):
        tell(store, span(1), request_id=f"cmpl-abc-{choice}")
    found = [trace.request_id for trace in store.find("cmpl-abc")]
    assert found == ["cmpl-abc-0", "cmpl-abc-1", "cmpl-abc-2"]


def test_a_span_that_is_told_again_replaces_the_first() -> None:
    store = TraceStore(exports=False)
    tell(store, span(1, end_ns=0), over=False)
    tell(store, span(1), node_id="decode-0")
    tell(store, span(1, end_ns=9))
    (trace,) = store.find("r")
    assert trace.context == CONTEXT
    ends = {p.node_id: [s.end_ns for s in p.spans] for p in trace.processes}
    assert ends == {"frontend-0": [9], "decode-0": [5]}


def test_export_once_when_the_frontend_is_done() -> None:
    store = TraceStore(exports=True)
    tell(store, span(1), span(2, end_ns=0), node_id="decode-0", over=False)
    assert not store.any_due, "nobody knows the trace yet"
    tell(store, span(1))
    assert not store.due(EXPORT_AFTER_S - 0.1)
    assert numbers(store.due(EXPORT_AFTER_S)) == [1, 1], "what goes on does not go out"
    assert not store.any_due
    tell(store, span(2), node_id="decode-0", now_s=9.0)
    assert store.next_due_s() == 9.0 + EXPORT_AFTER_S
    assert numbers(store.due(20.0)) == [2], "late, and only that"
    tell(store, span(1, end_ns=6))
    assert not store.any_due, "told again, it does not go out again"


def test_who_does_not_sample_is_not_exported() -> None:
    store = TraceStore(exports=True)
    tell(store, span(1), context=TraceContext(trace_id="a" * 32, sampled=False))
    assert not store.due(100.0) and store.find("r")


def test_bounds_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_store, "REQUESTS_KEPT", 2)
    monkeypatch.setattr(trace_store, "SPANS_KEPT", 6)
    monkeypatch.setattr(trace_store, "REQUEST_SPANS_MAX", 4)
    store = TraceStore(exports=True)
    tell(store, span(1), request_id="a")
    tell(store, span(1), request_id="b")
    assert [t.request_id for t in tell(store, span(1), request_id="c")] == ["a"]
    assert len(store) == 2 and not store.find("a")
    many = [span(number) for number in range(10)]
    assert [t.request_id for t in tell(store, *many, request_id="d")] == ["b"]
    assert numbers(store.find("d")) == [0, 1, 2, 3]
    tell(store, *many, request_id="e")
    assert [len(store.find(name)) for name in "abcde"] == [0, 0, 0, 0, 1]
    assert {trace.request_id for trace in store.due(100.0)} == {"e"}, "the others went before"
