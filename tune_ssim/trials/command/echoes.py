"""Finds the settings that a training prints, as opposed to its metrics."""

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

MAX_LINE = 2**20  # longest line, in bytes, that is searched
ECHO_BYTES = 2**24  # bytes of output searched for settings; the first record comes long before
QUOTED_CHARACTERS = 160  # characters of a line quoted in a message
MIN_DIGITS = 2  # significant digits a printed number needs to count as rounded: 0.1 is not 0.13
QUOTED = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'")
BARE = re.compile(r"[^\s,;)}\]]+")
NUMBER = re.compile(r"[-+]?(\d*)\.?(\d*)(?:[eE][-+]?\d+)?")


class Echoes:
    """Finds `name=value`, `name: value` and `"name": value` for settings, in chunks of bytes of any size.

    If any mention of a name agrees with the requested value, that value is in force. Otherwise the first other value is. Output
    also mentions defaults, schedules and other runs, but a script that uses another value and prints its settings never prints the
    requested one. A script may print its own command line, so `--name=value` counts only if nothing else mentions the name. Lines
    that are records hold metrics, not settings."""

    def __init__(self, config: Mapping[str, Any], spec: CommandSpec) -> None:
        templates = [template for _, template, _ in spec.templates()]
        self.config = {name: value for name, value in config.items() if isinstance(value, (bool, int, float, str))}
        self._accepted = {name: [value, *as_formatted(name, value, templates)] for name, value in self.config.items()}
        named = "|".join(re.escape(name) for name in sorted(self.config, key=len, reverse=True)) or "(?!)"
        self._mention = re.compile(rf"(?<![\w.-])(--?)?({named})[\"']?\s{{0,8}}[=:]\s{{0,8}}")
        records = spec.records
        printed = records is None or (records.file is None and records.mlflow is None)
        if records is None:
            self._records = RecordLines(None, {}, printed)
        else:
            self._records = RecordLines(records.pattern if printed else None, records.names, printed)
        self._rest = b""
        self._seen = 0
        self._rank: dict[str, int] = {}  # rank of the mention that counts so far
        self.lines: dict[str, str] = {}  # where each value was found

    def feed(self, data: bytes) -> dict[str, Any]:
        """Settings found in the lines that `data` completes."""
        if self._seen >= ECHO_BYTES:
            return {}
        self._seen += len(data)
        complete, end, rest = (self._rest + data).rpartition(b"\n")
        self._rest = rest[-MAX_LINE:]
        return self.read(complete) if end else {}

    def finish(self) -> dict[str, Any]:
        """Settings found in a last line without a newline."""
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
        agrees, value = compare(line[mention.end() :], self._accepted[name])
        if agrees is None:
            return {}
        rank = (2 if agrees else 1) + (0 if mention[1] else 2)
        if rank <= self._rank.get(name, 0):
            return {}
        self._rank[name] = rank
        begin = max(0, mention.start() - QUOTED_CHARACTERS // 2) if len(line) > QUOTED_CHARACTERS else 0
        printed = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line[begin : begin + QUOTED_CHARACTERS])
        self.lines[name] = printed.strip()
        return {name: self.config[name] if agrees else value}


def as_formatted(name: str, value: Any, templates: Sequence[str]) -> list[Any]:
    """The value as each format in the templates renders it, e.g. `{weight:.2e}`."""
    found: list[Any] = []
    for template in templates:
        if name in placeholders(template):
            for form in re.findall(r"(?<!\{)\{" + re.escape(name) + r":([^{}]+)\}", template):
                with contextlib.suppress(ValueError, TypeError):
                    text = format(as_word(value), form)
                    found.append(text if isinstance(value, str) else float(text))
    return found


def compare(text: str, asked: Sequence[Any]) -> tuple[bool | None, Any]:
    """(whether the value at the start of `text` is a requested one, that value); (None, None) if undecided."""
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
    for one in asked:  # without quotes, only a requested value has a known end
        if text.startswith(one) and re.match(r"\.?(?:[\s,;)}\]\"']|$)", text[len(one) :]):
            return True, one
    bare = BARE.match(text)
    word = bare[0] if bare else ""
    if any(one.startswith(word) for one in asked):  # truncated, or quoted in another way
        return None, None
    return False, word.rstrip(".") if word.rstrip(".") else word


def agrees(word: str, asked: float) -> bool | None:
    """Whether a printed number equals the requested one, to the digits printed; None: too few digits to decide.

    A whole number does not match a fraction, and a single digit does not match a number with more: 0.1 is a default if 0.13 was
    requested. A zero printed with several decimal places may be any number that small."""
    try:
        return _agrees(word, asked, Decimal(word), Decimal(repr(float(asked))))
    except (ArithmeticError, ValueError):  # not a number for Decimal, or an exponent of millions
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
        return None if places >= MIN_DIGITS and abs(wanted) <= Decimal(5).scaleb(-places - 1) else False
    return len(printed.as_tuple().digits) >= MIN_DIGITS and _rounds_to(wanted, printed) and not _is_whole(word)


def _rounds_to(wanted: Decimal, printed: Decimal) -> bool:
    """Whether they agree to half a unit of the last printed digit, with a small tolerance for float32 rounding."""
    unit = Decimal(1).scaleb(int(printed.as_tuple().exponent))
    return abs(printed - wanted) <= unit * Decimal("0.5") + abs(wanted) * Decimal("1e-7")


def _is_whole(word: str) -> bool:
    return re.fullmatch(r"[-+]?\d+", word) is not None
