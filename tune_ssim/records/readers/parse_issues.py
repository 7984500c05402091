"""A short summary of the lines in a log that could not be read."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_EXAMPLES = 3  # unread lines quoted in a message
EXCERPT = 80  # characters quoted per line
MIN_EMPTY = 10  # rows without a number at the end that are worth a remark


@dataclass
class EmptyRows:
    """Rows with a step and no number (`"loss": null`) since the latest row with one. longest: the most in a row before."""

    count: int = 0
    first_step: int | None = None
    longest: int = 0

    def add(self, step: int) -> None:
        self.count += 1
        self.first_step = step if self.first_step is None else self.first_step

    @property
    def is_unusual(self) -> bool:
        """Whether so many at the end are more than the gaps of a producer that logs every n-th step."""
        return self.count >= max(MIN_EMPTY, 2 * self.longest)

    def end(self) -> None:
        """A row with a number follows."""
        self.longest, self.count, self.first_step = max(self.longest, self.count), 0, None


@dataclass
class ParseIssues:
    """Counts and examples of parse problems.

    lines: lines (or TensorBoard events) read so far. unread: how many of them could not be read. first: examples of these
    with location, text and reason. notes: other remarks for the user. restarted: where the step counter began again."""

    lines: int = 0
    unread: int = 0
    first: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unit: str = "line"
    repeated: int = 0  # skipped rows of steps that were already logged
    first_repeated: str = ""
    restarted: str = ""
    empty: EmptyRows = field(default_factory=EmptyRows)
    kept: list[str] = field(default_factory=list)  # non-finite values in skipped rows

    def skip(self, line: int, text: str, reason: str) -> None:
        """Counts a line that should have been a row and could not be read."""
        self.unread += 1
        if len(self.first) < MAX_EXAMPLES:
            self.first.append(f"{self.unit} {line}: {excerpt(text) + ': ' if text else ''}{reason}")

    def repeat(self, line: int, step: int, last: int) -> None:
        if not self.repeated:
            self.first_repeated = f"{self.unit} {line}: step {step} after step {last}"
        self.repeated += 1

    def keep(self, line: int, name: str, value: float) -> None:
        """Reports a non-finite value in a skipped row."""
        if len(self.kept) < MAX_EXAMPLES:
            self.kept.append(f"{name} is {value} in {self.unit} {line}")

    def discard(self) -> None:
        """Drops the unread lines so far, which turned out not to be rows."""
        self.unread, self.first = 0, []

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def sentence(self) -> str:
        """Everything in one line; empty if there is nothing to report."""
        parts = []
        if self.unread:
            parts.append(f"{self.unread} of {self.lines} {self.unit}s could not be read ({'; '.join(self.first)})")
        if self.repeated:
            rows = "row was" if self.repeated == 1 else "rows were"
            parts.append(
                f"{self.repeated} {rows} skipped, of steps that had been logged before ({self.first_repeated}; a restart, lines"
                " logged twice, or a validation that counts epochs): the first value of a step wins"
            )
        if self.kept:
            parts.append(f"skipped rows hold values that are not finite, which count at the step before ({', '.join(self.kept)})")
        if self.empty.is_unusual:
            parts.append(f"the last {self.empty.count} rows, from step {self.empty.first_step} on, hold no number")
        return "; ".join([*parts, *self.notes])


def excerpt(text: str) -> str:
    """The start of a line in quotes, with control characters replaced by spaces."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text[: EXCERPT + 1].strip())
    return f"'{shown[:EXCERPT]}…'" if len(shown) > EXCERPT else f"'{shown}'"
