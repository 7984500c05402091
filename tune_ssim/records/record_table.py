"""Records in columnar form, so that a log with millions of records is processed one column at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, compress, islice
from operator import lt
from typing import overload

from tune_ssim.records import Record


@dataclass
class Column:
    """The `values` of a metric, and the `steps` and table `rows` of the records that have it."""

    rows: Sequence[int]
    steps: Sequence[int]
    values: Sequence[float]

    @cached_property
    def all_finite(self) -> bool:
        return all(map(math.isfinite, self.values))


class Table(Sequence[Record]):
    """A sequence of records from a log, stored compactly. `Record` objects are created on access.

    steps: n steps. Either rows: the values of each record, or columns: metric → its n values. Raises ValueError if the
    lengths differ."""

    def __init__(
        self,
        steps: Sequence[int],
        *,
        rows: Sequence[Mapping[str, float]] | None = None,
        columns: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        if (rows is None) == (columns is None):
            raise ValueError("a table has either rows or columns")
        lengths = {len(steps), *([len(rows)] if rows is not None else map(len, (columns or {}).values()))}
        if len(lengths) > 1:
            raise ValueError(f"a table's columns must be equally long, got {sorted(lengths)}")
        self.steps = steps
        self._rows, self._values = rows, columns or {}
        self._columns: dict[str, Column | None] = {}

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
        if isinstance(index, slice):
            if self._rows is not None:
                return Table(self.steps[index], rows=self._rows[index])
            return Table(self.steps[index], columns={name: values[index] for name, values in self._values.items()})
        if self._rows is not None:
            return Record(self.steps[index], self._rows[index])
        return Record(self.steps[index], {name: values[index] for name, values in self._values.items()})

    def __iter__(self) -> Iterator[Record]:
        if self._rows is not None:
            return map(Record, self.steps, self._rows)
        rows = zip(*self._values.values(), strict=True) if self._values else [()] * len(self)
        return (Record(step, dict(zip(self._values, row, strict=True))) for step, row in zip(self.steps, rows, strict=True))

    def renamed(self, names: Mapping[str, str]) -> Table:
        """A table with renamed metrics. `names`: old name → new name."""
        if not names:
            return self
        if self._rows is not None:
            return Table(self.steps, rows=[{names.get(name, name): value for name, value in row.items()} for row in self._rows])
        return Table(self.steps, columns={names.get(name, name): values for name, values in self._values.items()})

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """The names of all metrics in the table."""
        return tuple(self._values if self._rows is None else dict.fromkeys(chain.from_iterable(self._rows)))

    @cached_property
    def grows(self) -> bool:
        """Whether the steps strictly increase."""
        return all(map(lt, self.steps, islice(self.steps, 1, None)))

    def column(self, metric: str) -> Column | None:
        """The column of a metric; None if no record has it."""
        if metric not in self._columns:
            self._columns[metric] = self._column(metric)
        return self._columns[metric]

    def _column(self, metric: str) -> Column | None:
        everywhere = range(len(self))
        if self._rows is None:
            return Column(everywhere, self.steps, self._values[metric]) if everywhere and metric in self._values else None
        present = [metric in row for row in self._rows]
        if not any(present):
            return None
        values = [row[metric] for row in compress(self._rows, present)]
        if len(values) == len(self):
            return Column(everywhere, self.steps, values)
        return Column(list(compress(everywhere, present)), list(compress(self.steps, present)), values)

    def quotient(self, numerator: str, denominator: str) -> Column | None:
        """The ratio of two metrics over the records that have both; None if no record has both.

        x / 0 is infinite with the sign of x, and 0 / 0 is 0."""
        a, b = self.column(numerator), self.column(denominator)
        if a is None or b is None:
            return None
        rows, steps, over, under = a.rows, a.steps, a.values, b.values
        if len(over) != len(self) or len(under) != len(self):
            of_a, of_b = dict(zip(a.rows, over, strict=True)), dict(zip(b.rows, under, strict=True))
            rows = [row for row in a.rows if row in of_b]
            steps, over, under = [self.steps[row] for row in rows], [of_a[row] for row in rows], [of_b[row] for row in rows]
        if not rows:
            return None
        return Column(rows, steps, [x / y if y else _by_zero(x) for x, y in zip(over, under, strict=True)])


def _by_zero(value: float) -> float:
    return value if value == 0 or math.isnan(value) else math.copysign(math.inf, value)
