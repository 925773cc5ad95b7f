"""The gate in front of the other suites: a row for every contender that agrees with the reference, or does not."""

from collections.abc import Iterable
from typing import Any

from benchmarks.add_ons import AddOn
from benchmarks.contenders import Contender
from benchmarks.gate import ADD_ON_SHAPE, SSYNC_SHAPES
from benchmarks.results import Row, RowId
from benchmarks.session import Options, Session, Task

CASE = "agrees with the reference"


def plan(options: Options, contenders: Iterable[tuple[Contender, str]], add_ons: Iterable[AddOn]) -> list[Task]:
    """Plan a gate for contenders, each in a dtype that it is measured in, and for add-ons."""
    tasks = []
    for contender, dtype in contenders:
        key = RowId.of("gate", CASE, contender.name, "gate", SSYNC_SHAPES[0], dtype)
        tasks.append(_task(key, "benchmarks.gate:gate", dtype=dtype, device=options.device))
    for one in add_ons:
        key = RowId.of("gate", CASE, one.name, "gate", ADD_ON_SHAPE | one.gate_shape)
        tasks.append(_task(key, "benchmarks.gate:gate_add_on", device=options.device))
    return tasks


def _task(key: RowId, function: str, **arguments: Any) -> Task:
    def run(session: Session) -> None:
        outcome = session.call(function, contender=key.contender, **arguments)
        if outcome.status == "measured":
            wrong: str = outcome.value
            session.add(Row(key, "wrong" if wrong else "measured", wrong))
        else:
            session.add(Row(key, outcome.status, outcome.note))

    return Task([key], run)
