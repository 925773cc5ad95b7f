"""A file of results: one schema for every suite, read with care, and written as each job ends."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from examples.files import Fields, check_fields, read_json, write_text

SCHEMA = "ssync-loss benchmarks 2"
SUITES = ("gate", "linear_vs_quadratic", "training_step", "kernels", "add_ons")
# a row without a number says why
STATUSES = ("measured", "memory", "time", "failed", "wrong")
# beside what every example says of its machine
MACHINE: Fields = {
    **dict.fromkeys(("cpu", "system", "python", "torch", "commit", "date", "device", "sources"), str),
    **dict.fromkeys(("cores", "threads", "memory_gb"), int),
    **dict.fromkeys(("gpu", "cuda", "triton"), (str, type(None))),
}
ROW: Fields = {
    **dict.fromkeys(("suite", "case", "contender", "dtype", "status", "note"), str),
    **dict.fromkeys(("shape", "values"), dict),
}
SETTINGS: Fields = {"quick": bool, "time_cap": (int, float), "memory_cap": int, "malloc": dict, "backends": list}


class Spread(NamedTuple):
    """A median, the quartiles around it, and the number of samples behind them."""

    median: float
    q1: float
    q3: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Summarize samples.

        >>> Spread.of([4.0, 1.0, 2.0, 3.0, 5.0])
        Spread(median=3.0, q1=2.0, q3=4.0, samples=5)
        """
        low, middle, high = (float(f"{one:.6g}") for one in np.percentile(samples, (25, 50, 75)))
        return cls(middle, low, high, len(samples))


Values: TypeAlias = Mapping[str, float | Spread]


class Key(NamedTuple):
    """What a row is about; no two share one. The case is what grows, the model or the operation."""

    suite: str
    case: str
    contender: str
    shape: tuple[tuple[str, int], ...]
    dtype: str = "float32"

    @property
    def sizes(self) -> dict[str, int]:
        """The shape by axis."""
        return dict(self.shape)


@dataclass(frozen=True)
class Row:
    """All measurements of one thing, or why they stop."""

    key: Key
    status: str = "measured"
    note: str = ""
    values: Values = field(default_factory=dict)

    def number(self, name: str) -> float:
        """Return a value that was counted, or the median of one that was sampled."""
        value = self.values[name]
        return value.median if isinstance(value, Spread) else value


@dataclass
class Results:
    """Rows, and what makes them credible: machine, versions, commit, date, settings."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: dict[Key, Row] = field(default_factory=dict)
    path: Path | None = None

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read a file; a ValueError names the first thing that is wrong: the place, the wanted and the found."""
        content = read_json(path)
        found = content.get("schema", "no schema") if isinstance(content, dict) else f"a {type(content).__name__}"
        if found != SCHEMA:
            raise ValueError(f"{path} must have the schema {SCHEMA!r}; found {found!r}. It is left as it is.")
        check_fields(content, {"schema": str, "machine": dict, "settings": dict, "rows": list}, f"{path}")
        for part, fields in (("machine", MACHINE), ("settings", SETTINGS)):
            check_fields(content[part], fields, f"{path}: `{part}`")
        results = cls(content["machine"], content["settings"], path=path)
        for number, one in enumerate(content["rows"]):
            row = _row_from_json(one, f"{path}: `rows[{number}]`")
            if row.key in results.rows:
                raise ValueError(f"{path}: `rows[{number}]` must be about something else than the rows before it.")
            results.rows[row.key] = row
        return results

    @classmethod
    def resume(
        cls, path: Path, machine: dict[str, Any], settings: dict[str, Any], *, restart: bool = False
    ) -> "Results":
        """Go on with a file where there is one, or start it; rows that failed are forgotten, and so tried again.

        A file that was measured elsewhere or otherwise is a ValueError unless told to restart, and left as it is.
        """
        earlier = cls.load(path) if path.exists() else None
        if earlier is None or restart:
            return cls(machine, settings, path=path)
        found, wanted = earlier.machine | earlier.settings, machine | settings
        # the digest of the sources says more than the commit
        for name in wanted.keys() - {"date", "commit"}:
            if found[name] != wanted[name]:
                raise ValueError(
                    f"{path} was measured with `{name}` = {found[name]!r}, and now it is {wanted[name]!r}. "
                    "Choose another --out, or --restart to measure anew."
                )
        earlier.rows = {key: row for key, row in earlier.rows.items() if row.status != "failed"}
        return earlier

    def add(self, rows: Iterable[Row]) -> None:
        """Take rows in beside what is known of the same, and write the file, whole or not at all."""
        for row in rows:
            before = self.rows.get(row.key, row)
            self.rows[row.key] = Row(row.key, row.status, row.note or before.note, {**before.values, **row.values})
        if self.path is not None:
            write_text(self.path, self.text())

    def text(self) -> str:
        """Lay the file out, a line for every row."""
        head = json.dumps({"schema": SCHEMA, "machine": self.machine, "settings": self.settings}, indent=1)[:-2]
        lines = [json.dumps(_row_to_json(row), allow_nan=False) for row in self.rows.values()]
        return f'{head},\n "rows": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"

    def select(self, suite: str, **wanted: str) -> list[Row]:
        """Return the rows of a suite whose key has these values."""
        wanted["suite"] = suite
        return [row for row in self.rows.values() if all(getattr(row.key, name) == one for name, one in wanted.items())]


def _row_to_json(row: Row) -> dict[str, Any]:
    return row.key._asdict() | {"shape": row.key.sizes, "status": row.status, "note": row.note, "values": row.values}


def _row_from_json(content: Any, where: str) -> Row:
    check_fields(content, ROW, where)
    for name, allowed in (("suite", SUITES), ("status", STATUSES)):
        if content[name] not in allowed:
            raise ValueError(f"{where}: `{name}` must be one of {', '.join(allowed)}; found {content[name]!r}.")
    for axis, size in content["shape"].items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{where}: `shape.{axis}` must be a positive integer; found {size!r}.")
    if content["status"] != "measured" and not content["note"]:
        raise ValueError(f"{where}: a row with the status {content['status']!r} must have a note.")
    values = {name: _value(one, f"{where}: `values.{name}`") for name, one in content["values"].items()}
    shape = tuple(content["shape"].items())
    key = Key(content["suite"], content["case"], content["contender"], shape, content["dtype"])
    return Row(key, content["status"], content["note"], values)


def _value(value: Any, where: str) -> float | Spread:
    numbers = value if isinstance(value, list) and len(value) == len(Spread._fields) else [value]
    if any(isinstance(one, bool) or not isinstance(one, int | float) or not abs(one) <= 1e100 for one in numbers):
        raise ValueError(f"{where} must be a finite number, or [median, q1, q3, samples]; found {value!r:.99}.")
    if len(numbers) == 1:
        return value  # type: ignore[no-any-return]
    spread = Spread(*numbers)
    if not spread.q1 <= spread.median <= spread.q3:
        raise ValueError(f"{where} must have its median between its quartiles; found {value}.")
    return spread
