"""What a worker has of adapters: wanted, retired, given back."""

from slipstream.core.machine import AdapterRead, DropAdapter, LoadAdapter, Send
from slipstream.core.worker_adapters import WorkerAdapters
from slipstream.errors import ErrorCode, Problem
from slipstream.messages import AdapterAnswer, AdapterInfo, UnwantAdapter, WantAdapter


def info(version: int = 1, **more: object) -> AdapterInfo:
    fields = {"adapter_id": f"a@{version}", "name": "a", "path": "/a", **more}
    return AdapterInfo(**fields)  # type: ignore[arg-type]


def want(adapters: WorkerAdapters, generation: int = 1, version: int = 1) -> AdapterAnswer:
    """Wanted, and read from its file."""
    message = WantAdapter(name="a", path="/a", generation=generation)
    assert adapters.want(message) == [LoadAdapter("a", "/a")]
    (told,) = adapters.read(AdapterRead("a", "/a", info(version)))
    assert isinstance(told, Send) and isinstance(told.message, AdapterAnswer)
    return told.message


def test_it_is_offered_once_it_is_read() -> None:
    adapters = WorkerAdapters(())
    assert adapters.has("") and not adapters.has("a@1")
    assert want(adapters, 7).adapter == info(generation=7)
    assert adapters.offered == (info(generation=7),) and adapters.has("a@1")


def test_what_is_wanted_meanwhile_is_read_afterwards_for_the_file_may_be_another() -> None:
    adapters = WorkerAdapters(())
    message = WantAdapter(name="a", path="/a", generation=1)
    assert len(adapters.want(message)) == 1
    for generation in (2, 3):
        later = WantAdapter(name="a", path="/a", generation=generation)
        assert adapters.want(later) == []
    first, again = adapters.read(AdapterRead("a", "/a", info()))
    assert isinstance(first, Send) and isinstance(first.message, AdapterAnswer)
    assert (first.message.generation, again) == (1, LoadAdapter("a", "/a"))
    adapters.read(AdapterRead("a", "/a", info(2)))
    assert adapters.offered == (info(generation=1), info(2, generation=3))


def test_what_cannot_be_read_changes_nothing() -> None:
    adapters = WorkerAdapters((info(3),))
    adapters.want(WantAdapter(name="a", path="/a", generation=1))
    problem = Problem(code=ErrorCode.INVALID_VALUE, message="no such folder")
    (told,) = adapters.read(AdapterRead("a", "/a", problem=problem))
    assert isinstance(told, Send) and isinstance(told.message, AdapterAnswer)
    assert told.message.problem == problem and adapters.offered == (info(3),)


def test_retired_it_serves_and_goes_when_nobody_has_it() -> None:
    adapters = WorkerAdapters(())
    want(adapters)
    adapters.unwant(UnwantAdapter(adapter_id="a@1"))
    assert [each.retired for each in adapters.offered] == [True] and adapters.has("a@1")
    assert adapters.settle(()) == [], "its memory stays"
    adapters.unwant(UnwantAdapter(adapter_id="a@1", at_once=True))
    assert adapters.offered == () and adapters.settle({"a@1"}) == [] and adapters.has("a@1")
    assert adapters.settle({""}) == [DropAdapter("a@1")] and not adapters.has("a@1")
    adapters.unwant(UnwantAdapter(adapter_id="a@1", at_once=True))
    assert adapters.settle(()) == []


def test_wanted_again_it_stays() -> None:
    adapters = WorkerAdapters(())
    want(adapters)
    adapters.unwant(UnwantAdapter(adapter_id="a@1", at_once=True))
    want(adapters, 2)
    assert adapters.settle(()) == [] and adapters.offered == (info(generation=2),)
