"""The gate in front of the other suites: a row for every contender that agrees with the reference, or does not."""

from collections.abc import Iterable

from benchmarks.contenders import Contender
from benchmarks.gate import SSYNC_SHAPES
from benchmarks.results import Row, RowId
from benchmarks.session import Options, Session, Task

CASE = "agrees with the reference"


def plan(options: Options, contenders: Iterable[tuple[Contender, str]]) -> list[Task]:
    """Plan a gate for contenders, each in a dtype that it is measured in."""
    return [_task(contender, dtype, options.device) for contender, dtype in contenders]


def _task(contender: Contender, dtype: str, device: str) -> Task:
    key = RowId.of("gate", CASE, contender.name, "gate", SSYNC_SHAPES[0], dtype)

    def run(session: Session) -> None:
        outcome = session.call("benchmarks.gate:gate", contender=contender.name, dtype=dtype, device=device)
        if outcome.status == "measured":
            wrong: str = outcome.value
            session.add(Row(key, "wrong" if wrong else "measured", wrong))
        else:
            session.add(Row(key, outcome.status, outcome.note))

    return Task([key], run)
