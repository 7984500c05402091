"""Merges the records of a command's log with what the observer saw in its processes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from tune_ssim.probes.observer import EventReader, Observation
from tune_ssim.records import LOSS, TOTAL_NORM
from tune_ssim.records.readers.values import Names

Row = tuple[int, dict[str, float]]

MIN_WAIT_S = 2.0  # for the observed step of a row; on a GPU it is written one step late
WAIT_STEPS = 3  # the same, in steps
ALONE_S = 0.5  # an observed step waits for a printed row of it, which arrives through a pipe
SILENT_S = 150.0  # observed steps wait for their rows: TensorBoard writes every 120 s
COMPARED_ROWS = 5  # with a printed total_norm, to find the offset
OF_UPDATES = ("grad_coverage", "step_skipped")  # each observed update has one of them
OFFSETS = (0, -1, 1)  # program's step minus the number of updates: one that counts from 0 is one behind
MIN_UPDATES = 4  # before the numbers of steps are compared: rows may be two steps ahead of what is written


@dataclass(frozen=True)
class _Waiting:
    """A row of the log, with the time and the number of updates at which it arrived."""

    arrived: float
    updates: int
    step: int
    values: dict[str, float]


class ObservedRecords:
    """Completes the rows of a log with the metrics that it lacks, and adds the observed steps between them.

    An observed step is numbered by the optimiser's updates, a row by the program's counter. Where both have a total_norm, the
    numbers that agree show the offset; otherwise a counter whose first row is step 0 is taken to be one behind. A counter of
    micro-batches is recognised by the number of its steps per update."""

    def __init__(self, reader: EventReader, names: Mapping[str, str]) -> None:
        self._reader, self._names = reader, Names(names)
        self._rows: list[_Waiting] = []
        self._observed: dict[int, tuple[float, dict[str, float]]] = {}  # by update, with their time of arrival
        self._kept: dict[int, float] = {}  # observed total_norm of the newest updates, for comparison
        self._newest, self._arrived, self._interval_s = 0, 0.0, 0.0
        self._offset: int | None = None
        self._per_update = 1
        self._digits = Digits()
        self._last_row = -1  # newest step of a row that was returned
        self.differing = 0  # rows whose total_norm is another than the observed one
        self.notes: list[str] = []

    @property
    def observation(self) -> Observation:
        return self._reader.observation

    def merge(self, rows: list[Row], *, is_alone: bool, final: bool = False) -> list[Row]:
        """The rows that are complete, in order. is_alone: the log has no records, so observed steps need not wait. final:
        no more will come."""
        now = time.monotonic()
        self._read(now)
        for step, values in rows:
            self._rows.append(_Waiting(now, self._newest, step, values))
            self._digits.add(values.get(TOTAL_NORM, math.nan))
        found: list[Row] = []
        while self._rows and (self._is_complete(now, final) or final):
            row = self._rows.pop(0)
            found += self._take_before(row.step)
            found.append((row.step, self._completed(row.step, row.values)))
            self._last_row = max(self._last_row, row.step)
        if not self._rows:
            oldest = math.inf if final else now - (ALONE_S if is_alone else SILENT_S)
            found += self._take_before(math.inf, oldest)
        return found

    def held(self) -> int | None:
        """The newest step that has not been returned."""
        waiting = [row.step for row in self._rows] + [self._step_of(update) for update in self._observed]
        return max(waiting, default=None)

    def _read(self, now: float) -> None:
        for record in self._reader.read():
            if record.step > self._newest and self._is_observing:
                self._interval_s = now - self._arrived if self._newest else 0.0
                self._newest, self._arrived = record.step, now
            values = self._names.rename(dict(record.values))
            if self._step_of(record.step) <= self._last_row and not any(name.startswith(OF_UPDATES) for name in values):
                continue  # logged by the program, and read from its log before
            self._observed.setdefault(record.step, (now, {}))[1].update(values)
            if TOTAL_NORM in values:
                self._kept[record.step] = values[TOTAL_NORM]

    def _is_complete(self, now: float, final: bool) -> bool:
        """Whether everything that was observed at the first row's step is there."""
        row = self._rows[0]
        if not _is_of_updates(row.values) or not self._is_observing:
            return True
        is_late = final or now - max(row.arrived, self._arrived) > max(MIN_WAIT_S, WAIT_STEPS * self._interval_s)
        if self._offset is None and self._newest and (is_late or self._newest >= MIN_UPDATES):
            self._compare_counters()
        return is_late or (self._offset is not None and self._newest >= self._update_of(row.step))

    @property
    def _is_observing(self) -> bool:
        seen = self.observation
        return seen.is_observed or bool(seen.optimizers) or "torch.optim" in seen.hooked

    # -- numbers of steps

    def _step_of(self, update: int) -> int:
        return max(0, self._per_update * update + (self._offset or 0))

    def _update_of(self, step: int) -> int:
        return max(0, step - (self._offset or 0)) // self._per_update

    def _compare_counters(self) -> None:
        """Finds the offset, and the steps per update of a counter that is ahead of the updates from the beginning."""
        first = next(row.step for row in self._rows if _is_of_updates(row.values))
        usual = -1 if first == 0 else 0
        with_norm = [row for row in self._rows if TOTAL_NORM in row.values][:COMPARED_ROWS]
        printed = {row.step: row.values[TOTAL_NORM] for row in with_norm}
        self._offset = next((offset for offset in (usual, *OFFSETS) if self._agree(printed, offset)), usual)
        ahead = self._rows[-1].step - self._offset
        factor = round(ahead / self._newest)
        keeps_pace = all(row.updates >= (row.step - self._offset) / factor - 2 for row in self._rows) if factor else False
        if ahead >= 2 * self._newest and self._newest > 1 and keeps_pace:
            self._per_update = factor
            self.notes.append(f"the program's counter is taken to count {factor} steps for each update")
        elif self._offset:
            self.notes.append(f"the program's step {first} is taken to be its update {first - self._offset}")

    def _agree(self, printed: Mapping[int, float], offset: int) -> bool:
        pairs = [(value, self._kept[step - offset]) for step, value in printed.items() if step - offset in self._kept]
        return bool(pairs) and all(self._digits.agree(*pair) for pair in pairs)

    # -- values

    def _take_before(self, step: float, oldest: float = math.inf) -> list[Row]:
        """Observed steps before `step` that arrived until `oldest`."""
        found = []
        for update in sorted(self._observed):
            arrived, values = self._observed[update]
            if self._step_of(update) >= step or arrived > oldest:
                break
            del self._observed[update]
            self._kept.pop(update, None)
            found.append((self._step_of(update), values))
        return found

    def _completed(self, step: int, values: dict[str, float]) -> dict[str, float]:
        update = self._update_of(step)
        if self._step_of(update) != step or not _is_of_updates(values):
            return values
        _, observed = self._observed.pop(update, (0.0, {}))
        norm = self._kept.pop(update, None)
        if norm is not None and TOTAL_NORM in values and not self._digits.agree(values[TOTAL_NORM], norm):
            if not self.differing:
                self._first_difference = f"{values[TOTAL_NORM]:g} at step {step}, where {norm:.6g} was observed"
            self.differing += 1
        return {**observed, **values}

    def remarks(self) -> list[str]:
        """What the user should know at the end, a sentence each."""
        found = list(self.notes)
        if self.differing:
            found.append(
                f"its log has another {TOTAL_NORM} than was observed before clipping, in {self.differing} rows (the first has "
                f"{self._first_difference}); the log's is judged"
            )
        return found


def _is_of_updates(values: Mapping[str, float]) -> bool:
    """Whether a row is about optimiser steps, rather than samples or a validation."""
    return any(name.startswith((LOSS, TOTAL_NORM)) for name in values)


class Digits:
    """The precision of printed numbers, learnt from all of them: 1.0 may have been printed as 1, as 1.0000 or as 1.00."""

    def __init__(self) -> None:
        self.decimals = self.significant = 0

    def add(self, printed: float) -> None:
        if math.isfinite(printed):
            number = Decimal(repr(printed)).normalize()
            self.decimals = max(self.decimals, -int(number.as_tuple().exponent))
            self.significant = max(self.significant, len(number.as_tuple().digits))

    def agree(self, printed: float, observed: float) -> bool:
        """Whether both are one number, to the digits printed and the precision of float32."""
        if not math.isfinite(printed) or not math.isfinite(observed):
            return math.isfinite(printed) == math.isfinite(observed)
        place = math.floor(math.log10(abs(printed))) if printed else 0
        half_digit = max(0.5 * 10.0**-self.decimals, 0.5 * 10.0 ** (place - self.significant + 1))
        return abs(printed - observed) <= half_digit + 1e-5 * abs(observed)
