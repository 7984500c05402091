"""A pattern for printed lines that no built-in pattern reads, made from the lines themselves."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from tune_ssim.records import LOSS
from tune_ssim.records.metric_names import is_loss_like

MAX_LINE = 300  # characters of a line that are looked at
MAX_METRICS = 6  # numbers of a line that the pattern names
# A number, or a number with a unit. The lookbehind leaves out dates, versions and names such as `conv2`.
A_NUMBER = re.compile(
    r"(?<![\w.:/-])[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+|\d+(?:[eE][-+]?\d+)?|nan|NaN|inf|Inf)(?!\w|[:-]\d|/\d*-)"
)
NAME_BEFORE = re.compile(r"([A-Za-z_][\w/-]*)(?: (?:is|was|of))?\W{0,4}$")


class Number(NamedTuple):
    text: str
    before: str  # the text since the number before it
    is_whole: bool


def propose_pattern(lines: Sequence[str]) -> str:
    """`--pattern '…'` for a shell, with which some of the lines are read; empty if no line has a counter and a number.

    The most frequent kind of line counts. Its step is the first number that grows."""
    kinds: dict[tuple[str, ...], list[list[Number]]] = defaultdict(list)
    for line in lines:
        numbers = _numbers(line[:MAX_LINE])
        if len(numbers) > 1 and not line.lstrip().startswith(("{", "[{")):
            kinds[tuple(re.sub(r"\d+", "0", number.before) for number in numbers)].append(numbers)
    for rows in sorted(kinds.values(), key=len, reverse=True):
        step = _step_of(rows)
        metrics = [] if step is None else [at for at in range(step + 1, len(rows[0])) if not all(row[at].is_whole for row in rows)]
        if step is not None and metrics:
            return f"--pattern {shlex.quote(_pattern(rows[0], step, metrics[:MAX_METRICS]))}"
    return ""


def _numbers(line: str) -> list[Number]:
    found, at = [], 0
    for number in A_NUMBER.finditer(line):
        found.append(Number(number[0], line[at : number.start()], number[0].isdigit()))
        at = number.end()
    return found


def _step_of(rows: Sequence[Sequence[Number]]) -> int | None:
    """The first column of whole numbers that grow."""
    for at in range(len(rows[0])):
        column = [row[at] for row in rows]
        if all(number.is_whole for number in column) and all(int(a.text) < int(b.text) for a, b in pairwise(column)):
            return at
    return None


def _pattern(numbers: Sequence[Number], step: int, metrics: Sequence[int]) -> str:
    names = [_name(numbers[at]) or f"value_{k}" for k, at in enumerate(metrics, 1)]
    if not any(map(is_loss_like, names)):
        names[0] = LOSS
    pattern = f"{_words(numbers[step].before.lstrip())}(?P<step>\\d+)"
    for k, (before, at) in enumerate(pairwise([step, *metrics])):
        name = names[k] if names[k] not in names[:k] else f"{names[k]}_{k + 1}"
        between = _words(numbers[at].before) if at == before + 1 else f".*?{_words(_last_words(numbers[at].before))}"
        pattern += f"{between}(?P<{name}>[-+.\\w]+)"
    return pattern


def _name(number: Number) -> str:
    found = NAME_BEFORE.search(number.before)
    return re.sub(r"\W", "_", found[1]).lower() if found else ""


def _last_words(text: str) -> str:
    found = NAME_BEFORE.search(text)
    return text[found.start() :] if found else text[-1:]


def _words(text: str) -> str:
    """The text as a regular expression, in which any white space and any digits match."""
    words = [re.sub(r"\d+", r"\\d+", re.escape(word)) for word in re.split(r"\s+", text)]
    return r"\s+".join(words)
