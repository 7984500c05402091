"""Extracts rows from human-readable lines, with the user's regular expressions or built-in patterns."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import regex

from tune_ssim.base.errors import UserError
from tune_ssim.records import EPOCH
from tune_ssim.records.metric_names import is_loss_like
from tune_ssim.records.readers.line_shape import LineShape
from tune_ssim.records.readers.parse_issues import excerpt
from tune_ssim.records.readers.printed import PRINTED, Row
from tune_ssim.records.readers.proposal import propose_pattern
from tune_ssim.records.readers.reader import LineFormat
from tune_ssim.records.readers.rows import Rows
from tune_ssim.records.readers.values import Names, text_number

BLOCK_LINES = 512  # lines searched at once: faster than one by one, and a block fits in the cache
KEY_VALUES = "key_values"
MIN_ASIDES = 20  # lines with a loss and no step, after which they are rows: a summary may be printed before the first step
MIN_ALIKE = 8  # fewer lines are not tested for a common shape
MAX_MISFITS = 10  # consecutive blocks without a common shape after which shapes are no longer tried

# A pattern sees only this many characters of a line: the time of a bad pattern can be polynomial in the length.
MAX_PATTERN_TEXT = 10_000
# Time limit per line, against patterns with exponential time. A typical search takes a millionth of that.
LINE_LIMIT_S = 2.0
SLOW_LINES = 3  # a pattern is disabled after this many timeouts

HOW_A_PATTERN_LOOKS = r"a regular expression with named groups, one of them `step`, e.g. 'step (?P<step>\d+) .*loss (?P<loss>\S+)'"


# Lines that look like a row of a training to a reader.
LIKE_A_ROW = re.compile(r"(?:loss|step|iter|epoch).{0,200}\d", re.IGNORECASE)


class TextFormat(LineFormat):
    """Lines that are rows if they match a pattern. While none has matched, it keeps a typical line, to quote it to a user whose
    pattern is wrong."""

    format = "text"

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows)
        self._has_matched = False
        self._seen = 0  # lines that did not match
        self._shown = ""
        self._like_a_row = False

    @property
    def pattern(self) -> str:
        """The pattern as it is called in a message."""
        raise NotImplementedError

    def why_no_rows(self) -> str:
        if self._has_matched or not self._seen:
            return ""
        lines = "the only line" if self._seen == 1 else f"any of {self._seen} lines"
        return f"{self.pattern} did not match {lines}, {'for one ' if self._seen > 1 else ''}{excerpt(self._shown)}"

    def _note_unmatched(self, lines: Iterable[str]) -> None:
        for line in lines if not self._has_matched else ():
            if not line.strip():
                continue
            self._seen += 1
            if not self._like_a_row:
                self._like_a_row = LIKE_A_ROW.search(line[:MAX_PATTERN_TEXT]) is not None
                if self._like_a_row or not self._shown:
                    self._shown = line[:1000]


class UserPattern:
    """A user's regular expression with a time limit that works in any thread, because a bad pattern may take years for one
    line. `re` has no timeout, so this uses the package `regex`, which accepts the same patterns. Raises UserError, see
    `compiled`."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._compiled = compiled(text)
        self.slow_lines = 0  # lines whose search timed out

    @property
    def groups(self) -> Mapping[str, int]:
        """Name → number of each named group."""
        return self._compiled.groupindex

    @property
    def given_up(self) -> bool:
        return self.slow_lines >= SLOW_LINES

    def search(self, line: str) -> Any:
        """The match, or None; always None once the pattern is disabled. Raises TimeoutError."""
        if self.given_up:
            return None
        try:
            return self._compiled.search(line, timeout=LINE_LIMIT_S)
        except TimeoutError:
            self.slow_lines += 1
            raise

    def matches(self, line: str) -> bool:
        """Whether the pattern matches; False if the search timed out."""
        try:
            return self.search(line) is not None
        except TimeoutError:
            return False


class PatternLines(TextFormat):
    """Rows extracted by the user's patterns. A line may match several patterns; a line that matches none is not an error."""

    def __init__(self, rows: Rows, patterns: Iterable[str]) -> None:
        super().__init__(rows)
        self._patterns = [UserPattern(pattern) for pattern in patterns]

    @property
    def pattern(self) -> str:
        shown = ", ".join(excerpt(pattern.text) for pattern in self._patterns)
        return f"pattern{'s' if len(self._patterns) > 1 else ''} {shown}"

    def take(self, lines: list[str], number: int) -> None:
        for begin in range(0, len(lines), BLOCK_LINES):
            block = shortened(lines[begin : begin + BLOCK_LINES])
            found = [self._search(pattern, block, number + begin) for pattern in self._patterns]
            self._has_matched = self._has_matched or any(map(any, found))
            self._note_unmatched(block)
            if len(found) == 1 and self._add_together([match for match in found[0] if match is not None]):
                continue
            for at, matches in enumerate(zip(*found, strict=True), number + begin):
                for match in matches:
                    if match is not None:
                        self._add(match, at)

    def _search(self, pattern: UserPattern, lines: list[str], number: int) -> list[Any]:
        """A match or None for each line."""
        found = []
        for at, line in enumerate(lines, number):
            try:
                found.append(pattern.search(line))
            except TimeoutError:
                found.append(None)
                self._rows.issues.skip(at, line, f"the pattern took more than {LINE_LIMIT_S:g} s")
                if pattern.given_up:
                    self._rows.issues.note(f"pattern {pattern.text!r} was given up after {SLOW_LINES} lines that took too long")
        return found

    def _add_together(self, matches: list[Any]) -> bool:
        """Adds rows of one pattern in which every group is a number. False: nothing was added."""
        if len(matches) < MIN_ALIKE:
            return False
        places = self._patterns[0].groups
        texts = dict(zip(places, zip(*(match.group(*places.values()) for match in matches), strict=True), strict=True))
        steps = texts.pop("step")
        if not all(step is not None and len(step) < 19 and step.isascii() and step.isdigit() for step in steps):
            return False
        try:
            columns: dict[str, Sequence[float]] = {name: tuple(map(float, column)) for name, column in texts.items()}
        except (TypeError, ValueError):  # a group that did not match, or that is not a number
            return False
        return self._rows.add_columns(list(map(int, steps)), columns)

    def _add(self, found: Any, number: int) -> None:
        texts = found.groupdict()
        step = texts.pop("step")
        if step is None:
            return
        values = {}
        for name, text in texts.items():
            if text is None:
                continue
            value = text_number(text.strip(" ,;|%()[]{}'\""))
            if value is None:
                self._rows.issues.skip(number, found.string, f"group '{name}' found {text!r}, which is not a number")
            else:
                values[name] = value
        self._rows.add(step, values, number, found.string)


class PrintedLines(TextFormat):
    """Rows extracted by a built-in pattern: `name`, or the first that recognises a line.

    If chosen automatically, a surer pattern can still replace it later. without: patterns that are not tried."""

    def __init__(self, rows: Rows, name: str | None = None, without: Collection[str] = ()) -> None:
        super().__init__(rows)
        given = rows.names.given
        self._names = Names({**{theirs.lower(): ours for theirs, ours in given.items()}, **given})  # key_values lowers names
        self._names.used = rows.names.used
        self._printed = {known: printed(self._names) for known, printed in PRINTED.items() if known not in without}
        self._may_change = name is None
        self.name = name
        self._shape: LineShape | None = None  # shape of the latest rows
        self._misfits = 0  # consecutive blocks in which most lines had another shape
        # Lines with a loss and no step before the first with one, and their values; None: they are rows.
        self._asides: list[tuple[str, dict[str, float]]] | None = []

    @property
    def pattern(self) -> str:
        return f"the built-in pattern {self.name or ' or '.join(self._printed)}"

    def recognises(self, line: str) -> bool:
        """Whether a built-in pattern recognises this line; the first that does is kept."""
        line = line[:MAX_PATTERN_TEXT]
        if self.name is None:
            rows = {name: row for name, printed in self._printed.items() if (row := printed.read(line)) and row.values}
            self.name = next((name for name, row in rows.items() if not row.is_aside), None)
            if rows and self.name is None and self._asides is not None and len(self._asides) < MIN_ASIDES:
                self._asides.append((line, next(iter(rows.values())).values))
                if len(self._asides) == MIN_ASIDES:
                    self._number_asides()
                    return False  # this line is taken
        return self.name is not None

    def _number_asides(self) -> None:
        """Takes lines that have a loss and no step for rows, unless they have a counter that a pattern finds."""
        asides = self._asides or []
        if propose_pattern([line for line, _ in asides]):
            return
        self._asides, self.name = None, KEY_VALUES
        for _, values in asides:
            self._rows.add(None, values, 0, "", self._names)

    def finish(self) -> None:
        if self.name is None and 1 < len(self._asides or ()) < MIN_ASIDES:
            self._number_asides()

    def take(self, lines: list[str], number: int) -> None:
        for begin in range(0, len(lines), BLOCK_LINES):
            block = shortened(lines[begin : begin + BLOCK_LINES])
            if self._shape is None:
                self._take_each(block, number + begin)
            else:
                self._take_alike(self._shape, block, number + begin)

    def _take_alike(self, shape: LineShape, lines: list[str], number: int) -> None:
        """Takes lines, most of which should have the shape of earlier rows."""
        texts = shape.read(list(map(self._printed[self.name or ""].look, lines)))
        fit = texts.count(None) <= len(lines) // 2
        self._misfits = 0 if fit else self._misfits + 1
        begin = 0
        for fits, of_run in groupby(texts, key=lambda text: text is not None):
            run = list(of_run)
            # The pattern may have changed in between; its rows have another shape.
            alike = fits and len(run) >= MIN_ALIKE and self._shape is shape
            if not (alike and self._add_run(shape, run)):
                self._take_each(lines[begin : begin + len(run)], number + begin)
            begin += len(run)
        if not fit and self._shape is shape:
            self._shape = None

    def _add_run(self, shape: LineShape, texts: list[Any]) -> bool:
        try:
            return self._rows.add_columns(*shape.columns(texts), self._names)
        except ValueError:  # a text that only looks like a number
            return False

    def _take_each(self, lines: list[str], number: int) -> None:
        wants_shape = self._shape is None and len(lines) >= MIN_ALIKE and self._misfits < MAX_MISFITS
        for at, line in enumerate(lines, number):
            row = self._read(line) if self.name or self.recognises(line) else None
            if row is None:
                self._note_unmatched([line])
                continue
            self._has_matched = True
            if row.is_aside and self._asides is not None:
                self._rows.add_aside(row.values, at, self._names)
                continue
            if wants_shape and row.values:
                self._shape = self._shape_of(line, row)
                wants_shape = self._shape is None
            self._rows.add(row.step, row.values, at, line, self._names)

    def _read(self, line: str) -> Row | None:
        """The row in a line. A surer pattern that finds one replaces that of the earlier rows."""
        surer = list(self._printed)[: list(self._printed).index(self.name or "")] if self._may_change else []
        for name in surer:
            row = self._printed[name].read(line)
            if row is not None and (row.step is not None or EPOCH in row.values) and any(map(is_loss_like, row.values)):
                self.name, self._shape = name, None
                self._rows.discard()
                return row
        return self._printed[self.name or ""].read(line)

    def _shape_of(self, line: str, row: Row) -> LineShape | None:
        """The shape of a row; None unless reading by the shape gives the same result."""
        printed = self._printed[self.name or ""]
        seen = printed.look(line)
        places = printed.places(seen) if printed.has_shape else None
        if places is None or places.step is None:
            return None
        try:
            shape = LineShape(seen, places)
        except ValueError:
            return None
        (texts,) = shape.read([seen])
        if texts is None:
            return None
        (step,), columns = shape.columns([texts])
        by_shape = step, {name: values[0] for name, values in columns.items()}
        return shape if repr(by_shape) == repr((int(row.step or 0), row.values)) else None  # repr: NaN equals NaN


def shortened(lines: list[str]) -> list[str]:
    if max(map(len, lines), default=0) <= MAX_PATTERN_TEXT:
        return lines
    return [line[:MAX_PATTERN_TEXT] for line in lines]


def compiled(pattern: str) -> Any:
    """The compiled pattern. Raises UserError for an invalid regular expression, or one without `step` and another group."""
    if not isinstance(pattern, str) or not pattern:
        raise UserError(f"pattern: must be {HOW_A_PATTERN_LOOKS}; got {pattern!r}")
    try:
        found = regex.compile(pattern)
    except (regex.error, OverflowError, RecursionError) as error:
        raise UserError(f"pattern {pattern!r}: {error}; valid is {HOW_A_PATTERN_LOOKS}") from None
    if "step" not in found.groupindex or len(found.groupindex) < 2:
        got = ", ".join(found.groupindex) or "none"
        raise UserError(f"pattern {pattern!r}: named groups: {got}; valid is {HOW_A_PATTERN_LOOKS}")
    return found


def text_format(rows: Rows, pattern: str | Sequence[str] | None) -> PatternLines | PrintedLines:
    """The reader for a text log: `pattern` is None, a built-in name, or regular expressions. Raises UserError."""
    if pattern is None:
        return PrintedLines(rows)
    if isinstance(pattern, str):
        if pattern in PRINTED:
            return PrintedLines(rows, pattern)
        return PatternLines(rows, [pattern])
    patterns = list(pattern)
    if not patterns or set(patterns) & set(PRINTED):
        raise UserError(
            f"pattern: must be one of {', '.join(PRINTED)}, or {HOW_A_PATTERN_LOOKS}, or a list of such; got {patterns}"
        )
    return PatternLines(rows, patterns)
