"""Fast reading of many printed lines that differ only in their numbers. A training may print millions of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# Matches in time linear in the length of the text. For lower-case text.
NUMBER = r"[-+]?(?:\d{1,40}(?:\.\d{0,40})?(?:e[-+]?\d{1,9})?|\.\d{1,40}(?:e[-+]?\d{1,9})?|nan|inf(?:inity)?)"
# Characters of a number: faster to match, and float() then validates the text.
NUMBER_CHARACTERS = r"[-+.0-9a-z]{1,40}"
DIGITS = re.compile(r"\d+")

Span = tuple[int, int]


class Places(NamedTuple):
    """Positions in a line: the span of the step, if there is one, and per metric its name, the span of the name and the span of the
    number."""

    step: Span | None
    metrics: Sequence[tuple[str, Span, Span]]


class LineShape:
    """A regular expression made from one line: the same words, any number for each metric, any digits for other digits (a time of
    day). It finds the same step and metrics as the slow reader in every line that matches."""

    def __init__(self, line: str, places: Places) -> None:
        """Raises ValueError if there is no step or no metric, or if places overlap or are not numbers."""
        if not places.metrics or places.step is None:
            raise ValueError("no step or no metrics")
        words: dict[Span, str] = {places.step: r"(\d{1,19})"}
        columns = {places.step: ""}
        for metric, name, number in places.metrics:
            words[name] = re.escape(line[slice(*name)])
            if number in words or not re.fullmatch(NUMBER, line[slice(*number)]):
                raise ValueError("two metrics in one place, or no number")
            words[number] = f"({NUMBER_CHARACTERS})"
            columns[number] = metric
        pattern, at = "", 0
        for begin, end in sorted(words):
            if begin < at:
                raise ValueError("places overlap")
            pattern += _any_digits(line[at:begin]) + words[begin, end]
            at = end
        self._shape = re.compile("^" + pattern + _any_digits(line[at:]) + "$", re.MULTILINE)
        self._names = [columns[place] for place in sorted(columns)]

    def read(self, lines: Sequence[str]) -> Sequence[tuple[str, ...] | None]:
        """The numbers of each line as text; None for a line of another shape."""
        found: list[tuple[str, ...]] = self._shape.findall("\n".join(lines))
        if len(found) == len(lines):
            return found
        return [match.groups() if (match := self._shape.fullmatch(line)) else None for line in lines]

    def columns(self, texts: Iterable[tuple[str, ...]]) -> tuple[list[int], dict[str, Sequence[float]]]:
        """Steps and metric → numbers of lines with this shape. If a metric name occurs twice, the last number wins.

        Raises ValueError if a text is not a number."""
        steps: list[int] = []
        columns: dict[str, Sequence[float]] = {}
        for name, column in zip(self._names, zip(*texts, strict=True), strict=True):
            if name:
                columns[name] = tuple(map(float, column))
            else:
                steps = list(map(int, column))
        return steps, columns


def _any_digits(words: str) -> str:
    return r"\d{1,40}".join(map(re.escape, DIGITS.split(words)))
