"""Workers keep to prompts as far as prompts fill them, without a drain and without haste."""

import msgspec
import pytest

from scheduler.rig import DECODE, PREFILL, TOKENIZER, Rig, node
from scheduler.test_policy import view
from slipstream.messages import Decode, ShiftRole
from slipstream.scheduler.ledger import WorkerView
from slipstream.scheduler.roles import DWELL_S, MEMORY_S, Demand, Roles, Shift, fullness

P0, P1, D0, D1 = "prefill-0", "prefill-1", "decode-0", "decode-1"


def shifted(made: WorkerView) -> WorkerView:
    accept = not made.worker.accept_decode
    made.worker = msgspec.structs.replace(made.worker, accept_decode=accept, shifted=True)
    return made


def roles(wanted: float, at_s: float = 0.0) -> Roles:
    """Prompts of late would fill so many workers."""
    made = Roles()
    made.demand.add(wanted * MEMORY_S, at_s)
    return made


@pytest.mark.parametrize(
    ("views", "wanted", "shift"),
    [
        # Prompts that fill half a worker or more keep one to themselves; else it takes streams.
        ([view(P0), view(D0)], 0.7, None),
        ([view(P0), view(D0)], 0.0, Shift(P0, True)),
        ([shifted(view(P0)), view(D0)], 0.3, None),
        ([shifted(view(P0)), view(D0)], 0.5, Shift(P0, False)),
        # More prompts, more workers; who was started for streams comes last.
        ([view(P0), view(D0, streams=1), view(D1)], 1.8, Shift(D1, False)),
        ([shifted(view(P0)), view(D0), view(P1)], 1.8, Shift(P0, False)),
        ([view(P0), shifted(view(D1)), view(D0)], 0.9, Shift(D1, True)),
        ([view(P0), view(P1, queued=3000), view(D0)], 0.5, Shift(P0, True)),
        # Who computes no prompts at all takes streams all the same.
        ([view(P0), view(D0, prefill_budget_tokens=0)], 0.7, None),
        ([shifted(view(P0)), view(D0, prefill_budget_tokens=0)], 0.7, Shift(P0, False)),
        # It would spare nobody on its own device, however many prompts there are.
        ([view(P0, device="0"), view(D0, device="0")], 0.7, Shift(P0, True)),
        ([view(P0, device="0"), view(D0, device="0"), view(D1)], 9.0, Shift(P0, True)),
        ([shifted(view(P0, device="0")), view(D0, device="0")], 9.0, None),
        ([shifted(view(P0, device="0")), view(D0, device="0"), view(D1)], 0.9, Shift(D1, False)),
        # Somebody has to take streams, and has to have room for them.
        ([view(P0), view(D0)], 9.0, None),
        ([view(P0), view(P1)], 9.0, Shift(P0, True)),
        ([view(P0), view(D0, held=4)], 0.9, Shift(P0, True)),
        ([view(P0), view(D0, held=4), view(D1, held=4)], 9.0, Shift(P0, True)),
    ],
)
def test_who_is_shifted(views: list[WorkerView], wanted: float, shift: Shift | None) -> None:
    assert roles(wanted).shift(views, 0, 0.0) == shift


def test_what_waits_for_room_needs_workers_that_take_streams() -> None:
    assert roles(0.7).shift([view(P0), view(D0)], 1, 0.0) == Shift(P0, True)


def test_a_worker_that_was_shifted_stays_for_a_while() -> None:
    made = roles(0.0)
    assert made.shift([view(P0), view(D0)], 0, 100.0) == Shift(P0, True)
    made.demand.add(10 * MEMORY_S, 100.5)
    for now_s in (101.0, 100.0 + DWELL_S - 0.1):
        assert made.shift([shifted(view(P0)), view(D0)], 0, now_s) is None
    assert made.shift([shifted(view(P0)), view(D0)], 0, 100.0 + DWELL_S) == Shift(P0, False)
    assert made.shift([view(P0)], 0, 112.0) == Shift(P0, True), "nobody else takes streams"
    assert made.shifts == 3


def test_who_drains_is_not_counted() -> None:
    drains = view(D0)
    drains.taking = False
    assert roles(9.0).shift([view(P0), drains], 0, 0.0) == Shift(P0, True)


def test_demand_is_work_in_a_time_and_is_forgotten() -> None:
    demand = Demand()
    for second in range(200):
        demand.add(0.5, float(second))
    assert demand.workers(199.0) == pytest.approx(0.5, rel=0.05)
    assert demand.workers(199.0 + 3 * MEMORY_S) < 0.03


@pytest.mark.parametrize(
    ("views", "wanted", "line"),
    [
        (
            [view(P0), view(D0, streams=1), view(D1)],
            1.8,
            "decode-1 shifts from prompts and streams to prompts alone: "
            "prompts would fill 1.8 workers, 1 keep to them",
        ),
        (
            [view(P0), view(D0, held=4)],
            0.9,
            "prefill-0 shifts from prompts alone to prompts and streams: "
            "workers that take streams are 100% full",
        ),
    ],
)
def test_a_shift_says_why(views: list[WorkerView], wanted: float, line: str) -> None:
    shift = roles(wanted).shift(views, 0, 0.0)
    assert shift is not None and shift.line == line


def test_fullness() -> None:
    assert fullness([]) == 1.0
    assert fullness([view(D0, held=1, blocks=8), view(D1)]) == pytest.approx(0.25)


# --- In the scheduler -----------------------------------------------------------------------------


def test_with_all_decode_workers_dead_a_prefill_worker_takes_the_streams() -> None:
    rig = Rig(TOKENIZER, PREFILL, DECODE, disaggregation="auto")
    rig.lose(DECODE)
    rig.submit()
    assert rig.state() == "queued"
    rig.pass_time(1.5)
    to, message = rig.one(ShiftRole)
    assert (to, message.accept_decode) == (PREFILL, True)
    (note,) = rig.notes
    words = "shifts from prompts alone to prompts and streams: nobody takes streams"
    assert note == f"{PREFILL} {words}"
    rig.join(node(PREFILL, accept_decode=True, shifted=True))
    assert rig.one(Decode)[0] == PREFILL
    assert rig.count("role_shifts_total") == 1


@pytest.mark.parametrize(
    ("mode", "policy"),
    [("always", "cost"), ("never", "cost"), ("auto", "load"), ("auto", "prefix")],
)
def test_fixed_roles_stay(mode: str, policy: str) -> None:
    rig = Rig(TOKENIZER, PREFILL, DECODE, disaggregation=mode, policy=policy)
    rig.lose(DECODE)
    rig.submit()
    rig.pass_time(5.0)
    assert not rig.all(ShiftRole)
