"""Records in columnar form, so that a log with millions of records is processed one column at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from itertools import chain, compress, islice
from operator import lt
from typing import TYPE_CHECKING, Any, overload

from tune_ssim.records import Record

if TYPE_CHECKING:  # guards import this module; NumPy is loaded only when a table needs it
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


MIN_NUMPY = 16  # number of values from which NumPy is faster than a loop; a live trial has one


@cache
def numpy_or_none() -> Any:
    """None where NumPy is not installed: it comes with the extras."""
    try:
        import numpy as np
    except ImportError:
        return None
    return np


class Column:
    """The `values` of a metric, and the `steps` and table `rows` of the records that have it."""

    def __init__(self, rows: Sequence[int], steps: Sequence[int], values: Sequence[float] | Array) -> None:
        self.rows, self.steps = rows, steps
        self._given = values

    def __len__(self) -> int:
        return len(self.steps)

    @cached_property
    def values(self) -> Sequence[float]:
        return self._given if isinstance(self._given, (list, tuple)) else self.array.tolist()

    @cached_property
    def array(self) -> Array:
        import numpy as np

        return np.asarray(self._given, dtype=float)

    @cached_property
    def all_finite(self) -> bool:
        if len(self) < MIN_NUMPY or (np := numpy_or_none()) is None:
            return all(map(math.isfinite, self.values))
        return bool(np.isfinite(self.array).all())

    def outside(self, lower: float, upper: float, begin: int = 0) -> list[int]:
        """Indices >= `begin` of values outside [`lower`, `upper`]. NaN counts as outside."""
        if len(self) < MIN_NUMPY or (np := numpy_or_none()) is None:
            return [k for k in range(begin, len(self)) if not lower <= self.values[k] <= upper]
        with np.errstate(invalid="ignore"):
            inside = (lower <= self.array) & (self.array <= upper)
        found: list[int] = (np.flatnonzero(~inside[begin:]) + begin).tolist()
        return found


class Table(Sequence[Record]):
    """A sequence of records from a log, stored compactly. `Record` objects are created on access.

    steps: n steps. Either rows: the values of each record, or columns: metric → its n values. Raises ValueError if the
    lengths differ."""

    def __init__(
        self,
        steps: Sequence[int],
        *,
        rows: Sequence[Mapping[str, float]] | None = None,
        columns: Mapping[str, Sequence[float] | Array] | None = None,
    ) -> None:
        if (rows is None) == (columns is None):
            raise ValueError("a table has either rows or columns")
        lengths = {len(steps), *([len(rows)] if rows is not None else map(len, (columns or {}).values()))}
        if len(lengths) > 1:
            raise ValueError(f"a table's columns must be equally long, got {sorted(lengths)}")
        self.steps = steps
        self._rows, self._columns = rows, columns
        self._found: dict[str, Column | None] = {}

    @classmethod
    def of(cls, records: Sequence[Record]) -> Table:
        """The records as a table; a table is returned unchanged."""
        if isinstance(records, Table):
            return records
        return cls([record.step for record in records], rows=[record.values for record in records])

    def __len__(self) -> int:
        return len(self.steps)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Table: ...
    def __getitem__(self, index: int | slice) -> Record | Table:
        if not isinstance(index, slice):
            return Record(self.steps[index], self._values(index))
        if self._rows is not None:
            return Table(self.steps[index], rows=self._rows[index])
        return Table(self.steps[index], columns={name: values[index] for name, values in (self._columns or {}).items()})

    def renamed(self, names: Mapping[str, str]) -> Table:
        """A table with renamed metrics. `names`: old name → new name."""
        if not names:
            return self
        if self._rows is not None:
            return Table(self.steps, rows=[{names.get(name, name): value for name, value in row.items()} for row in self._rows])
        return Table(self.steps, columns={names.get(name, name): values for name, values in (self._columns or {}).items()})

    def prepended(self, first: Record) -> Table:
        """This table with one more record at the start, which must have the same metrics."""
        if self._rows is not None:
            return Table([first.step, *self.steps], rows=[first.values, *self._rows])
        before = Table([first.step], columns={name: [first.values[name]] for name in self._columns or {}})
        return Table.joined([before, self])

    @classmethod
    def joined(cls, tables: Sequence[Table]) -> Table:
        """The concatenation of column tables that have the same metrics."""
        steps = list(chain.from_iterable(table.steps for table in tables))
        columns = [table._columns or {} for table in tables]
        return cls(steps, columns={name: _end_to_end([part[name] for part in columns]) for name in columns[0]})

    @property
    def by_columns(self) -> tuple[str, ...] | None:
        """The column names if the table is stored by columns, else None."""
        return None if self._columns is None else tuple(self._columns)

    def __iter__(self) -> Iterator[Record]:
        return map(Record, self.steps, map(self._values, range(len(self.steps))))

    def _values(self, row: int) -> Mapping[str, float]:
        if self._rows is not None:
            return self._rows[row]
        return {name: float(values[row]) for name, values in (self._columns or {}).items()}

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """The names of all metrics in the table."""
        if self._rows is not None:
            return tuple(dict.fromkeys(chain.from_iterable(self._rows)))
        return tuple(self._columns or ())

    @cached_property
    def grows(self) -> bool:
        """Whether the steps strictly increase."""
        return all(map(lt, self.steps, islice(self.steps, 1, None)))

    def column(self, metric: str) -> Column | None:
        """The column of a metric; None if no record has it."""
        if metric not in self._found:
            self._found[metric] = self._column(metric)
        return self._found[metric]

    def _column(self, metric: str) -> Column | None:
        everywhere = range(len(self.steps))
        if self._rows is None:
            values = (self._columns or {}).get(metric)
            return None if values is None or not everywhere else Column(everywhere, self.steps, values)
        try:
            return Column(everywhere, self.steps, [row[metric] for row in self._rows]) if everywhere else None
        except KeyError:
            present = [metric in row for row in self._rows]
            rows = list(compress(everywhere, present))
            values = [row[metric] for row in compress(self._rows, present)]
            return Column(rows, list(compress(self.steps, present)), values) if rows else None

    def quotient(self, numerator: str, denominator: str) -> Column | None:
        """The ratio of two metrics over the records that have both; None if no record has both.

        x / 0 is infinite with the sign of x, and 0 / 0 is 0."""
        a, b = self.column(numerator), self.column(denominator)
        if a is None or b is None:
            return None
        rows, steps, over, under = a.rows, a.steps, a.values, b.values
        if len(a) != len(self) or len(b) != len(self):
            of_a, of_b = dict(zip(a.rows, over, strict=True)), dict(zip(b.rows, under, strict=True))
            rows = [row for row in a.rows if row in of_b]
            steps, over, under = [self.steps[row] for row in rows], [of_a[row] for row in rows], [of_b[row] for row in rows]
        if not rows:
            return None
        return Column(rows, steps, [x / y if y else _by_zero(x) for x, y in zip(over, under, strict=True)])


def _by_zero(value: float) -> float:
    return value if value == 0 or math.isnan(value) else math.copysign(math.inf, value)


def _end_to_end(parts: Sequence[Sequence[float] | Array]) -> Sequence[float] | Array:
    if all(isinstance(part, (list, tuple)) for part in parts):
        return list(chain.from_iterable(parts))
    joined: Array = numpy_or_none().concatenate(parts)
    return joined
