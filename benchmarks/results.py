"""A file of results: one schema for all suites, checked when it is read, and written after each job."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from examples.files import Fields, check_fields, read_json, write_text

SCHEMA = "ssync-loss benchmarks 3"
SUITES = ("gate", "linear_vs_quadratic", "training_step", "kernels", "add_ons")
STATUSES = ("measured", "memory", "time", "failed", "wrong")
ORIGIN: Fields = {
    **dict.fromkeys(("cpu", "system", "python", "torch", "commit", "date", "device", "sources"), str),
    **dict.fromkeys(("cores", "threads", "memory_gb", "memory_cap"), int),
    **dict.fromkeys(("gpu", "cuda", "triton"), (str, type(None))),
    "quick": bool,
    "time_cap": (int, float),
    "malloc": dict,
    "backends": list,
}
ROW: Fields = {
    **dict.fromkeys(("suite", "case", "contender", "dtype", "status", "note"), str),
    **dict.fromkeys(("shape", "values"), dict),
}


class Spread(NamedTuple):
    """A median, its quartiles, and the number of samples."""

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
    """The subject of a row, unique in a file. A case is an axis, a model or an operation."""

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
    """The measurements of one subject. Without any, `status` and `note` say why."""

    key: Key
    status: str = "measured"
    note: str = ""
    values: Values = field(default_factory=dict)

    def number(self, name: str) -> float:
        """Return a counted value, or the median of a sampled one."""
        value = self.values[name]
        return value.median if isinstance(value, Spread) else value


@dataclass
class Results:
    """Rows, and their origin: the machine, the versions and the options of the run."""

    origin: dict[str, Any]
    rows: dict[Key, Row] = field(default_factory=dict)
    path: Path | None = None

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read a file; a ValueError names the first place that is wrong, what was wanted and what was found."""
        content = read_json(path)
        found = content.get("schema", "no schema") if isinstance(content, dict) else f"a {type(content).__name__}"
        if found != SCHEMA:
            raise ValueError(f"{path} must have the schema {SCHEMA!r}; found {found!r}. It is left as it is.")
        check_fields(content, {"schema": str, "origin": dict, "rows": list}, f"{path}")
        check_fields(content["origin"], ORIGIN, f"{path}: `origin`")
        rows: dict[Key, Row] = {}
        for number, one in enumerate(content["rows"]):
            where = f"{path}: `rows[{number}]`"
            row = _row(one, where)
            if rows.setdefault(row.key, row) is not row:
                raise ValueError(f"{where} must have another subject than the rows before it.")
        return cls(content["origin"], rows, path)

    @classmethod
    def resume(cls, path: Path, origin: dict[str, Any], *, restart: bool = False) -> "Results":
        """Continue a file, or start it. Failed rows are dropped, so a run tries them again.

        A file with other code, options or machine is a ValueError, unless the run restarts it.
        """
        if restart or not path.exists():
            return cls(origin, path=path)
        earlier = cls.load(path)
        # the commit may differ, `sources` must not
        for name, value in origin.items():
            if name not in ("date", "commit") and earlier.origin[name] != value:
                raise ValueError(
                    f"{path} was measured with `{name}` = {earlier.origin[name]!r}, and now it is {value!r}. "
                    "Choose another --out, or --restart to measure anew."
                )
        earlier.rows = {key: row for key, row in earlier.rows.items() if row.status != "failed"}
        return earlier

    def add(self, rows: Iterable[Row]) -> None:
        """Add or replace rows, and write the whole file."""
        self.rows |= {row.key: row for row in rows}
        if self.path is not None:
            write_text(self.path, self.text())

    def text(self) -> str:
        """Write the JSON with one row a line."""
        head = json.dumps({"schema": SCHEMA, "origin": self.origin}, indent=1)[:-2]
        rows = [row.key._asdict() | {"shape": row.key.sizes} | vars(row) for row in self.rows.values()]
        lines = [json.dumps({name: one[name] for name in ROW}, allow_nan=False) for one in rows]
        return f'{head},\n "rows": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"

    def select(self, suite: str, **wanted: str) -> list[Row]:
        """Return the rows of a suite whose keys have these values."""
        wanted["suite"] = suite
        return [row for row in self.rows.values() if all(getattr(row.key, name) == one for name, one in wanted.items())]


def _row(content: Any, where: str) -> Row:
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
    spread = Spread(*numbers) if len(numbers) > 1 else None
    if spread is not None and not spread.q1 <= spread.median <= spread.q3:
        raise ValueError(f"{where} must have its median between its quartiles; found {value}.")
    return numbers[0] if spread is None else spread
