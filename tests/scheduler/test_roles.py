"""Workers go where they are needed, and home again, without a drain and without haste."""

import msgspec
import pytest

from scheduler.rig import DECODE, PREFILL, TOKENIZER, Rig, node
from scheduler.test_policy import view
from slipstream.messages import Decode, ShiftRole
from slipstream.scheduler.ledger import WorkerView
from slipstream.scheduler.roles import DWELL_S, Roles, Shift, prompt_pressure, stream_pressure

P0, P1, D0, D1 = "prefill-0", "prefill-1", "decode-0", "decode-1"
LONG = 100_000
"""Tokens that take seconds."""


def shifted(made: WorkerView) -> WorkerView:
    accept = not made.worker.accept_decode
    made.worker = msgspec.structs.replace(made.worker, accept_decode=accept, shifted=True)
    return made


@pytest.mark.parametrize(
    ("views", "shift"),
    [
        ([view(P0), view(D0)], None),
        # Streams without room: a prefill worker with nothing to do takes some.
        ([view(P0), view(P1, queued=3000), view(D0, held=4)], Shift(P0, True)),
        ([view(P0, queued=LONG), view(D0, held=4)], None),
        # Prompts in a queue: a decode worker with little to do stops taking streams.
        ([view(P0, queued=LONG), view(D0, streams=1), view(D1)], Shift(D1, False)),
        ([view(P0, queued=LONG), view(D0)], None),
        ([view(P0, queued=LONG), view(D0, held=3), view(D1, held=3)], None),
        # Nobody is left who takes streams.
        ([view(P0, queued=LONG), view(P1)], None),
        ([view(P0, queued=300), view(P1)], Shift(P1, True)),
        # Home again, when nobody needs it where it is.
        ([shifted(view(P0)), view(D0)], Shift(P0, False)),
        ([shifted(view(P0)), view(D0, held=3)], None),
        ([shifted(view(P0))], None),
        ([view(P0), shifted(view(D1)), view(D0)], Shift(D1, True)),
        ([view(P0, queued=20_000), shifted(view(D1)), view(D0)], None),
    ],
)
def test_who_is_shifted(views: list[WorkerView], shift: Shift | None) -> None:
    assert Roles().shift(views, 0, 0.0) == shift


def test_a_worker_that_was_shifted_stays_for_a_while() -> None:
    roles = Roles()
    assert roles.shift([view(P0), view(D0, held=4)], 0, 100.0) == Shift(P0, True)
    for now_s in (101.0, 100.0 + DWELL_S - 0.1):
        assert roles.shift([shifted(view(P0)), view(D0)], 0, now_s) is None
    assert roles.shift([shifted(view(P0)), view(D0)], 0, 100.0 + DWELL_S) == Shift(P0, False)
    assert roles.shift([view(P0)], 0, 112.0) == Shift(P0, True), "nobody else takes streams"
    assert roles.shifts == 3


def test_who_drains_is_not_counted() -> None:
    drains = view(D0)
    drains.taking = False
    assert Roles().shift([view(P0), drains], 0, 0.0) == Shift(P0, True)


def test_what_waits_for_room_presses() -> None:
    assert stream_pressure([view(D0)], 0) < 0.5 <= 1.0 <= stream_pressure([view(D0)], 1)
    assert prompt_pressure([], 0.0) == 0.0


# --- In the scheduler -----------------------------------------------------------------------------


def test_with_all_decode_workers_dead_a_prefill_worker_takes_the_streams() -> None:
    rig = Rig(TOKENIZER, PREFILL, DECODE, disaggregation="auto")
    rig.lose(DECODE)
    rig.submit()
    assert rig.state() == "queued"
    rig.pass_time(1.5)
    to, message = rig.one(ShiftRole)
    assert (to, message.accept_decode) == (PREFILL, True)
    rig.join(node(PREFILL, accept_decode=True, shifted=True))
    assert rig.one(Decode)[0] == PREFILL
    assert rig.count("role_shifts_total") == 1


@pytest.mark.parametrize("mode", ["always", "never"])
def test_fixed_roles_stay(mode: str) -> None:
    rig = Rig(TOKENIZER, PREFILL, DECODE, disaggregation=mode)
    rig.lose(DECODE)
    rig.submit()
    rig.pass_time(5.0)
    assert not rig.all(ShiftRole)
