"""What a training prints of its settings, told apart from what it prints of its steps."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from tune_ssim.records.readers import RecordLines
from tune_ssim.study.command_spec import CommandSpec, as_word, placeholders
from tune_ssim.trials.channel import TAG

MAX_LINE = 2**20  # bytes of a line that is looked at
ECHO_BYTES = 2**24  # of output in which settings are looked for; then the first record has long been there
SHOWN = 160  # characters of a line in a message
AT_LEAST_DIGITS = 2  # significant ones, for a number that stands for one that was rounded to it: 0.1 is not 0.13
QUOTED = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'")
BARE = re.compile(r"[^\s,;)}\]]+")
NUMBER = re.compile(r"[-+]?(\d*)\.?(\d*)(?:[eE][-+]?\d+)?")


class Echoes:
    """`name=value`, `name: value`, `"name": value` of settings, in bytes of any size.

    What a name is in force with is the value asked for if any mention of it agrees, else the value of the first one that does not:
    output also speaks of defaults, schedules and other runs, while a script that uses another value and prints its settings never
    prints the one that was asked for. It may do so in the words of its own command line, so `--name=value` counts only where
    nothing else speaks of the name. Lines that are records say how a step was, not what was set."""

    def __init__(self, config: Mapping[str, Any], spec: CommandSpec) -> None:
        templates = [template for _, template, _ in spec.templates()]
        self.config = {name: value for name, value in config.items() if isinstance(value, (bool, int, float, str))}
        self._told = {name: [value, *told_as(name, value, templates)] for name, value in self.config.items()}
        named = "|".join(re.escape(name) for name in sorted(self.config, key=len, reverse=True)) or "(?!)"
        self._mention = re.compile(rf"(?<![\w.-])(--?)?({named})[\"']?\s{{0,8}}[=:]\s{{0,8}}")
        records = spec.records
        printed = records is not None and records.file is None and records.mlflow is None
        if records is None:
            self._records = RecordLines(None, {}, printed)
        else:
            self._records = RecordLines(records.pattern if printed else None, records.names, printed)
        self._rest = b""
        self._seen = 0
        self._rank: dict[str, int] = {}  # of the mention that counts so far
        self.lines: dict[str, str] = {}  # where each value was found

    def feed(self, data: bytes) -> dict[str, Any]:
        """Values of settings that the lines which are complete now say."""
        if self._seen >= ECHO_BYTES:
            return {}
        self._seen += len(data)
        complete, end, rest = (self._rest + data).rpartition(b"\n")
        self._rest = rest[-MAX_LINE:]
        return self.read(complete) if end else {}

    def finish(self) -> dict[str, Any]:
        """Of a last line without an end."""
        rest, self._rest = self._rest, b""
        return self.read(rest)

    def read(self, text: bytes) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for raw in text.split(b"\n"):
            if TAG in raw:
                continue
            for line in re.split(r"\r", raw[-MAX_LINE:].decode(errors="replace")):
                mentions = list(self._mention.finditer(line))
                if mentions and not self._records.takes(line):
                    for mention in mentions:
                        found |= self._weigh(mention, line)
        return found

    def _weigh(self, mention: re.Match[str], line: str) -> dict[str, Any]:
        name = mention[2]
        agrees, value = compare(line[mention.end() :], self._told[name])
        if agrees is None:
            return {}
        rank = (2 if agrees else 1) + (0 if mention[1] else 2)
        if rank <= self._rank.get(name, 0):
            return {}
        self._rank[name] = rank
        begin = max(0, mention.start() - SHOWN // 2) if len(line) > SHOWN else 0
        shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line[begin : begin + SHOWN])
        self.lines[name] = shown.strip()
        return {name: self.config[name] if agrees else value}


def told_as(name: str, value: Any, templates: Sequence[str]) -> list[Any]:
    """The value as the formats in the braces make it: what `{weight:.2e}` told is what is in force."""
    found: list[Any] = []
    for template in templates:
        if name in placeholders(template):
            for form in re.findall(r"(?<!\{)\{" + re.escape(name) + r":([^{}]+)\}", template):
                with contextlib.suppress(ValueError, TypeError):
                    text = format(as_word(value), form)
                    found.append(text if isinstance(value, str) else float(text))
    return found


def compare(text: str, asked: Sequence[Any]) -> tuple[bool | None, Any]:
    """(whether the value at the beginning of `text` is one of those asked for, that value); None: it says neither."""
    quoted, bare = QUOTED.match(text), BARE.match(text)
    if quoted is None and bare is None:
        return None, None
    first = asked[0]
    if isinstance(first, str):
        return _compare_text(text, quoted, asked)
    word = quoted[0][1:-1] if quoted else bare[0].strip("\"'") if bare else ""
    if isinstance(first, bool):
        value = {"true": True, "false": False}.get(word.rstrip(".").lower())
        return (None, None) if value is None else (value == first, value)
    with contextlib.suppress(ValueError):
        float(word.rstrip("."))
        word = word if NUMBER.fullmatch(word) and not word.endswith(".") else word.rstrip(".")
        agreements = [agrees(word, one) for one in asked]
        verdict = True if True in agreements else None if None in agreements else False
        return verdict, float(word)
    return None, None


def _compare_text(text: str, quoted: re.Match[str] | None, asked: Sequence[Any]) -> tuple[bool | None, Any]:
    if quoted is not None:
        inner = quoted[0][1:-1]
        forms = {inner, re.sub(r"\\(.)", r"\1", inner)}
        with contextlib.suppress(ValueError):
            forms.add(str(json.loads(quoted[0])))
        return bool(forms & {one for whole in asked for one in (whole, repr(whole)[1:-1])}), inner
    for one in asked:  # without quotes nobody knows where it ends, unless it is what was asked for
        if text.startswith(one) and re.match(r"\.?(?:[\s,;)}\]\"']|$)", text[len(one) :]):
            return True, one
    bare = BARE.match(text)
    word = bare[0] if bare else ""
    if any(one.startswith(word) for one in asked):  # cut short, or quoted in some other way
        return None, None
    return False, word.rstrip(".") if word.rstrip(".") else word


def agrees(word: str, asked: float) -> bool | None:
    """Whether a printed number is the one asked for, to as many digits as were printed; None: too few of them to tell.

    A whole number for a fraction, or a single digit for more of them, is another number: 0.1 is a default where 0.13 was asked
    for. A zero that was printed with several places may be anything that small."""
    try:
        return _agrees(word, asked, Decimal(word), Decimal(repr(float(asked))))
    except (ArithmeticError, ValueError):  # no number that Decimal knows, or one with an exponent of millions
        return float(word) == asked


def _agrees(word: str, asked: float, printed: Decimal, wanted: Decimal) -> bool | None:
    if not printed.is_finite() or not wanted.is_finite():
        return float(word) == asked
    if isinstance(asked, int):
        return printed == asked or (abs(asked) >= 10**6 and "e" in word.lower() and _rounds_to(wanted, printed))
    if abs(printed - wanted) <= abs(wanted) * Decimal("1e-9"):
        return True
    places = -int(printed.as_tuple().exponent)
    if printed == 0:
        return None if places >= AT_LEAST_DIGITS and abs(wanted) <= Decimal(5).scaleb(-places - 1) else False
    return len(printed.as_tuple().digits) >= AT_LEAST_DIGITS and _rounds_to(wanted, printed) and not _is_whole(word)


def _rounds_to(wanted: Decimal, printed: Decimal) -> bool:
    """Half a unit of the last digit printed; a little more, for numbers that float32 cannot hold."""
    unit = Decimal(1).scaleb(int(printed.as_tuple().exponent))
    return abs(printed - wanted) <= unit * Decimal("0.5") + abs(wanted) * Decimal("1e-7")


def _is_whole(word: str) -> bool:
    return re.fullmatch(r"[-+]?\d+", word) is not None
