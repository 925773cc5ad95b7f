"""A file of results: its schema, its check, and a run that goes on where it was cut short."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any, TypeAlias

from examples.files import Fields, check_fields, read_json, write_text

SCHEMA = "ssync-loss benchmarks 1"

SUITES = ("gate", "linear_vs_quadratic", "training_step", "kernels", "add_ons")
# a row without a number says why
STATUSES = ("measured", "memory", "time", "failed", "wrong")
# what a measured row has to hold; it may hold more
MEASURES: dict[str, tuple[str, ...]] = {
    "gate": (),
    "time": ("step",),
    "time, default allocator": ("step",),
    "memory": ("allocated",),
    "counts": ("launches", "host_reads"),
    "share": ("with", "without", "alone", "share", "difference"),
}
ENVIRONMENT: Fields = {
    "device": str,
    "cpu": str,
    "cores": int,
    "memory_gb": int,
    "gpu": (str, type(None)),
    "cuda": (str, type(None)),
    "system": str,
    "python": str,
    "torch": str,
    "triton": (str, type(None)),
    "commit": str,
    "dirty": bool,
    "sources": str,
    "date": str,
}
SETTINGS: Fields = {
    "quick": bool,
    "threads": int,
    "time_cap": (int, float),
    "memory_cap": int,
    "allocator": dict,
    "backends": list,
}


@dataclass(frozen=True)
class Spread:
    """A median, the quartiles around it, and the number of samples behind them."""

    median: float
    q1: float
    q3: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarize samples.

        >>> Spread.of([4.0, 1.0, 2.0, 3.0, 5.0])
        Spread(median=3.0, q1=2.0, q3=4.0, samples=5)
        """
        if len(values) < 2:
            return cls(values[0], values[0], values[0], len(values))
        low, _, high = quantiles(values, n=4, method="inclusive")
        return cls(_rounded(median(values)), _rounded(low), _rounded(high), len(values))

    def scaled(self, factor: float) -> "Spread":
        """Multiply all by a number."""
        return Spread(
            _rounded(factor * self.median), _rounded(factor * self.q1), _rounded(factor * self.q3), self.samples
        )

    @property
    def noise(self) -> float:
        """The interquartile range as a share of the median."""
        return (self.q3 - self.q1) / self.median if self.median else 0.0


Value: TypeAlias = float | int | Spread


@dataclass(frozen=True)
class RowId:
    """What a row is about: no two rows of a file share one.

    Attributes:
        suite: one of `SUITES`.
        case: the sweep, the workload or the operation.
        contender: what is measured, such as ``"SSync torch"``.
        measure: one of `MEASURES`.
        shape: sizes by axis, in order.
        dtype: of the inputs, such as ``"float32"``.
    """

    suite: str
    case: str
    contender: str
    measure: str
    shape: tuple[tuple[str, int], ...]
    dtype: str

    @classmethod
    def of(
        cls, suite: str, case: str, contender: str, measure: str, shape: Mapping[str, int], dtype: str = "float32"
    ) -> "RowId":
        """Name a row."""
        return cls(suite, case, contender, measure, tuple(shape.items()), dtype)

    @property
    def sizes(self) -> dict[str, int]:
        """The shape by axis."""
        return dict(self.shape)

    def __str__(self) -> str:
        """Say it in a line."""
        sizes = " ".join(f"{axis}={size}" for axis, size in self.shape)
        return f"{self.suite}: {self.case}, {self.contender}, {self.measure}, {sizes} {self.dtype}"


@dataclass(frozen=True)
class Row:
    """A measurement, or why there is none."""

    id: RowId
    status: str
    note: str = ""
    values: Mapping[str, Value] = field(default_factory=dict)

    def spread(self, name: str) -> Spread:
        """Return a value that was sampled."""
        value = self.values[name]
        if not isinstance(value, Spread):
            raise TypeError(f"`{name}` of {self.id} is a number, not a spread.")
        return value

    def number(self, name: str) -> float:
        """Return a value that was counted, or the median of one that was sampled."""
        value = self.values[name]
        return value.median if isinstance(value, Spread) else value


@dataclass
class Results:
    """Rows, and what makes them credible: machine, versions, commit, date, settings."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    rows: dict[RowId, Row] = field(default_factory=dict)
    path: Path | None = None

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read a file.

        Raises:
            ValueError: if it is none of ours, or of another version; it names the file and what was found.
        """
        content = read_json(path)
        check_schema(content, str(path))
        results = cls(content["environment"], content["settings"], path=path)
        for one in content["rows"]:
            results.rows.update(_row_from_json(one))
        return results

    @classmethod
    def resume(
        cls, path: Path, environment: dict[str, Any], settings: dict[str, Any], *, restart: bool = False
    ) -> "Results":
        """Go on with a file where there is one, or start it.

        Rows that failed are forgotten, so that they are tried again.

        Raises:
            ValueError: if the file was measured elsewhere or otherwise, unless told to restart; always if it has
                another schema. It is left as it is.
        """
        if not path.exists():
            return cls(environment, settings, path=path)
        earlier = cls.load(path)
        if restart:
            return cls(environment, settings, path=path)
        for found, wanted in ((earlier.environment, environment), (earlier.settings, settings)):
            for name in wanted.keys() - {"date"}:
                if found[name] != wanted[name]:
                    raise ValueError(
                        f"{path} was measured with `{name}` = {found[name]!r}, and now it is {wanted[name]!r}. "
                        "Choose another --out, or --restart to measure anew."
                    )
        earlier.rows = {key: row for key, row in earlier.rows.items() if row.status != "failed"}
        return earlier

    def add(self, rows: Iterable[Row]) -> None:
        """Take rows in, and write them where there is a file: whole, or not at all."""
        self.rows.update({row.id: row for row in rows})
        if self.path is None:
            return
        write_text(self.path, self.text())

    def text(self) -> str:
        """Lay the file out, a line for every row."""
        head = {"schema": SCHEMA, "environment": self.environment, "settings": self.settings}
        rows = ",\n".join("  " + json.dumps(_row_to_json(row), allow_nan=False) for row in self.rows.values())
        opened = json.dumps(head, indent=1)[:-2]
        return f'{opened},\n "rows": [\n{rows}\n ]\n}}\n'

    def select(self, **wanted: str) -> list[Row]:
        """Return the rows whose id has these values."""
        return [row for row in self.rows.values() if all(getattr(row.id, key) == one for key, one in wanted.items())]


def check_schema(content: Any, name: str) -> None:
    """Check what a file holds.

    Raises:
        ValueError: at the first thing that is wrong; it names the file, the place, the wanted and the found.
    """
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema", "no schema") if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(f"{name} must have the schema {SCHEMA!r}; found {found!r}. It is left as it is.")
    for part, fields in (("environment", ENVIRONMENT), ("settings", SETTINGS)):
        check_fields(content.get(part), fields, f"{name}: `{part}`")
    rows = content.get("rows")
    if not isinstance(rows, list):
        raise ValueError(f"{name}: `rows` must be a list; found {type(rows).__name__}.")
    seen = set()
    for number, row in enumerate(rows):
        where = f"{name}: `rows[{number}]`"
        _check_row(row, where)
        identity = next(iter(_row_from_json(row)))
        if identity in seen:
            raise ValueError(f"{where} must be about something else than the rows before it; found {identity}.")
        seen.add(identity)


def _check_row(row: Any, where: str) -> None:
    texts = ("suite", "case", "contender", "measure", "dtype", "status", "note")
    check_fields(row, dict.fromkeys(texts, str) | {"shape": dict, "values": dict}, where)
    for key, allowed in (("suite", SUITES), ("measure", tuple(MEASURES)), ("status", STATUSES)):
        if row[key] not in allowed:
            raise ValueError(f"{where}: `{key}` must be one of {', '.join(allowed)}; found {row[key]!r}.")
    for axis, size in row["shape"].items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{where}: `shape.{axis}` must be a positive integer; found {size!r}.")
    if row["status"] != "measured":
        if row["values"] or not row["note"]:
            raise ValueError(f"{where}: a row with the status {row['status']!r} must have a note and no values.")
        return
    for key in MEASURES[row["measure"]]:
        if key not in row["values"]:
            raise ValueError(f"{where}: `values` must hold {key!r}; found {', '.join(row['values']) or 'nothing'}.")
    for key, value in row["values"].items():
        _check_value(value, f"{where}: `values.{key}`")


def _check_value(value: Any, where: str) -> None:
    if isinstance(value, dict):
        check_fields(value, dict.fromkeys(("median", "q1", "q3"), (int, float)) | {"samples": int}, where)
        if not value["q1"] <= value["median"] <= value["q3"]:
            raise ValueError(f"{where} must have its median between its quartiles; found {value}.")
    elif isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e100:
        raise ValueError(f"{where} must be a finite number or a spread; found {value!r}.")


def _row_to_json(row: Row) -> dict[str, Any]:
    values = {key: asdict(one) if isinstance(one, Spread) else one for key, one in row.values.items()}
    fields = asdict(row.id) | {"shape": row.id.sizes}
    return fields | {"status": row.status, "note": row.note, "values": values}


def _row_from_json(content: dict[str, Any]) -> dict[RowId, Row]:
    names = ("suite", "case", "contender", "measure", "shape", "dtype")
    key = RowId.of(**{name: content[name] for name in names})
    return {key: Row(key, content["status"], content["note"], values_from_json(content["values"]))}


def values_from_json(values: Mapping[str, Any]) -> dict[str, Value]:
    """Turn objects back into spreads."""
    return {key: Spread(**one) if isinstance(one, dict) else one for key, one in values.items()}


def values_to_json(values: Mapping[str, Value]) -> dict[str, Any]:
    """Turn spreads into objects."""
    return {key: asdict(one) if isinstance(one, Spread) else one for key, one in values.items()}


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
