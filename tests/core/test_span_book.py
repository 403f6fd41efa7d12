"""Spans of requests until they are told: in order, once, and never too many."""

from slipstream.core import span_book
from slipstream.core.span_book import LONG_S, SpanBook
from slipstream.spans import RequestSpans, Span, TraceContext

OFFSET_NS = 10**18


def told(book: SpanBook, now_s: float = 0.0, young: bool = False) -> list[RequestSpans]:
    found = book.take(now_s, OFFSET_NS, young=young)
    book.check()
    return found


def named(requests: list[RequestSpans]) -> dict[str, Span]:
    return {span.name: span for request in requests for span in request.spans}


def test_a_request_is_told_of_when_it_is_over() -> None:
    book, context = SpanBook(), TraceContext(trace_id="a" * 32)
    book.open("r", 1.0, context)
    book.begin("r", "whole", 1.0, said={"attempt": 1})
    book.begin("r", "part", 2.0, "whole")
    book.add("r", "known", 2.0, 2.25, "part", {"tokens": 3})
    assert not told(book, 3.0)
    book.end("r", "part", 3.0, {"outcome": "fine"})
    book.close("r", 4.0)
    (request,) = told(book, 4.0)
    assert request.over and request.context == context
    whole, part, known = request.spans
    assert (whole.name, whole.parent, whole.attributes) == ("whole", 0, {"attempt": 1})
    assert (whole.begin_ns, whole.end_ns) == (OFFSET_NS + 10**9, OFFSET_NS + 4 * 10**9)
    assert part.parent == whole.number and part.attributes == {"outcome": "fine"}
    assert part.end_ns == OFFSET_NS + 3 * 10**9
    assert known.parent == part.number and known.end_ns - known.begin_ns == 250_000_000
    assert not told(book, 5.0) and not book.any_over and "r" not in book


def test_numbers_do_not_come_again() -> None:
    """A later attempt, of which is told in another message, has others."""
    book = SpanBook()
    numbers = []
    for _ in range(2):
        book.open("r", 0.0)
        book.begin("r", "whole", 0.0)
        book.close("r", 1.0)
        numbers += [span.number for request in told(book) for span in request.spans]
    assert len(set(numbers)) == 2


def test_what_lasts_is_told_of_meanwhile_and_only_what_is_new() -> None:
    book = SpanBook()
    book.open("r", 0.0)
    book.begin("r", "whole", 0.0)
    book.begin("r", "part", 0.0, "whole")
    assert not told(book, LONG_S - 0.1)
    first = named(told(book, LONG_S))
    assert first.keys() == {"whole", "part"} and not first["whole"].end_ns
    book.end("r", "part", 6.0)
    assert not told(book, LONG_S + 1.0)
    again = named(told(book, 2 * LONG_S))
    assert again.keys() == {"part"} and again["part"].end_ns
    assert again["part"].number == first["part"].number
    assert not told(book, 3 * LONG_S), "nothing is new"
    book.end("r", "whole", 17.0)
    (whole,) = book.take(99.0, OFFSET_NS + 5000, young=True)[0].spans
    assert whole.begin_ns == first["whole"].begin_ns, "though the wall clock was set meanwhile"
    assert not named(told(book, young=True))


def test_words_about_strangers_are_passed_over() -> None:
    book = SpanBook()
    book.begin("r", "whole", 0.0)
    book.end("r", "whole", 0.0)
    book.add("r", "part", 0.0, 1.0)
    book.say("r", "whole", {"a": 1})
    book.close("r", 0.0)
    book.open("r", 0.0)
    book.begin("r", "whole", 0.0)
    book.begin("r", "whole", 5.0)
    book.end("r", "part", 1.0)
    book.open("r", 9.0)
    assert book.said("r", "whole", "a") is None and book.said("r", "part", "a") is None
    (span,) = told(book, young=True)[0].spans
    assert span.begin_ns == OFFSET_NS


def test_bounds_hold(monkeypatch) -> None:
    monkeypatch.setattr(span_book, "SPANS_MAX", 3)
    monkeypatch.setattr(span_book, "LIVE_MAX", 2)
    book = SpanBook()
    for name in ("a", "b", "c"):
        book.open(name, 0.0)
        book.begin(name, "whole", 0.0)
        for _ in range(5):
            book.add(name, "part", 0.0, 1.0, "whole")
        book.check()
    assert list(book.live) == ["b", "c"], "the oldest makes room"
    (oldest,) = told(book)
    assert oldest.request_id == "a" and len(oldest.spans) == 3
    assert oldest.spans[0].attributes == {"spans_left_out": 3}


def test_what_nobody_fetches_does_not_pile_up() -> None:
    book = SpanBook()
    for number in range(span_book.OVER_MAX + 5):
        book.open(f"r{number}", 0.0)
        book.begin(f"r{number}", "whole", 0.0)
        book.close(f"r{number}", 0.0)
    requests = told(book)
    assert len(requests) == span_book.OVER_MAX and requests[0].request_id == "r5"
