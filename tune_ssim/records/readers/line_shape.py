"""Printed lines that differ in their numbers alone, read many at once: a training prints millions of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# Built so that no text needs more than a number of steps proportional to its length. In lower case.
NUMBER = r"[-+]?(?:\d{1,40}(?:\.\d{0,40})?(?:e[-+]?\d{1,9})?|\.\d{1,40}(?:e[-+]?\d{1,9})?|nan|inf(?:inity)?)"
# What a number is made of: quicker to find, and float() then knows whether it is one.
OF_A_NUMBER = r"[-+.0-9a-z]{1,40}"
DIGITS = re.compile(r"\d+")

Span = tuple[int, int]


class Places(NamedTuple):
    """Where a line has its step, and of each metric what it is called, where its name stands and where its number."""

    step: Span
    metrics: Sequence[tuple[str, Span, Span]]


class LineShape:
    """A line as a regular expression: its words as they are, any number where one of its metrics is, any digits for other digits
    (a time of day). A reader that looks at nothing but words and the neighbours of numbers reads all such lines alike."""

    def __init__(self, line: str, places: Places) -> None:
        """Raises ValueError for places that overlap, or that are no numbers, and for a line without metrics."""
        if not places.metrics:
            raise ValueError("no metrics")
        words: dict[Span, str] = {places.step: r"(\d{1,19})"}
        columns = {places.step: ""}
        for metric, name, number in places.metrics:
            words[name] = re.escape(line[slice(*name)])
            if number in words or not re.fullmatch(NUMBER, line[slice(*number)]):
                raise ValueError("two metrics in one place, or no number")
            words[number] = f"({OF_A_NUMBER})"
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
        """The texts of each line's numbers; None for one of another shape."""
        found: list[tuple[str, ...]] = self._shape.findall("\n".join(lines))
        if len(found) == len(lines):
            return found
        return [match.groups() if (match := self._shape.fullmatch(line)) else None for line in lines]

    def columns(self, texts: Iterable[tuple[str, ...]]) -> tuple[list[int], dict[str, Sequence[float]]]:
        """Of lines of this shape the steps, and metric → its numbers. Of metrics of one name the last counts. Raises ValueError
        where a text is no number."""
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
