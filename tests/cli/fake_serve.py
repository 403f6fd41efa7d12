"""`slipstream serve` with fake children instead of services; Redis and everything else are real."""

import os
import sys
from pathlib import Path

import msgspec

import slipstream.cli.serve as under_test
from slipstream.cli.main import main
from slipstream.cli.plan import ChildSpec, Layout, plan

CHILD = Path(__file__).with_name("fake_child.py")


def fake_plan(layout: Layout) -> list[ChildSpec]:
    journal = os.environ["FAKE_JOURNAL"]
    specs = []
    for spec in plan(layout):
        if spec.role == "redis":
            specs.append(spec)
            continue
        port = layout.config.port if spec.role == "frontend" else 0
        argv = (sys.executable, str(CHILD), journal, spec.role, spec.node_id, str(port))
        specs.append(msgspec.structs.replace(spec, argv=argv))
    return specs


under_test.plan = fake_plan  # type: ignore[assignment]

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
