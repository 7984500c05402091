"""Reads YAML 1.2 as plain Python values and keeps the line number of each value for error messages.

Follows the YAML 1.2 core schema: `1e-4` is a number and `no` is a string. PyYAML (YAML 1.1) reads a string and a bool.
"""

from __future__ import annotations

import difflib
import itertools
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from tune_ssim.base.errors import UserError
from tune_ssim.base.files import read_whole

Loc = tuple[str | int, ...]
"""The path to a value as keys and list indices, like pydantic's `loc`."""

# Far larger than any study (the largest bundled one has 2 KB). Quickly rejects a checkpoint that was passed by mistake.
MAX_BYTES = 256 * 1024
KIND = "a study or a search space"
MAX_VALUES = 20_000  # after alias expansion: nine lines of nested aliases can expand to 10**9 values
MAX_DEPTH = 30

# https://yaml.org/spec/1.2.2/#103-core-schema
_INT = re.compile(r"[-+]?[0-9]+")
_OCT, _HEX = re.compile(r"0o[0-7]+"), re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF = re.compile(r"[-+]?\.(inf|Inf|INF)")
_WORDS: dict[str, bool | None] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip

_PREFIX = "tag:yaml.org,2002:"
_SCALAR_TAGS = {"str", "int", "float", "bool", "null", "timestamp", "value", "merge"}  # tags that a plain scalar can resolve to


@dataclass(frozen=True)
class Source:
    """A value and its origin. `lines[loc]`: line number from 1. `options[loc]`: the command-line option that set the value."""

    label: str
    value: Any
    lines: Mapping[Loc, int] = field(default_factory=dict, repr=False)
    options: Mapping[Loc, str] = field(default_factory=dict)

    def option_at(self, loc: Loc) -> str | None:
        """The command-line option that set the value at `loc`, or None."""
        return next((self.options[key] for key in _upwards(loc) if key in self.options), None)

    def line_at(self, loc: Loc) -> int | None:
        """The line of the value, or of its nearest ancestor with a known line."""
        return next((self.lines[key] for key in _upwards(loc) if key in self.lines), None)

    def at(self, loc: Loc = ()) -> str:
        """`file:line` of the value."""
        line = self.line_at(loc)
        return self.label if line is None else f"{self.label}:{line}"

    def overridden(self, loc: Loc, value: Any, option: str) -> Source:
        """A copy of the document with the value at `loc` set by a command-line option."""
        return Source(self.label, _replaced(self.value, loc, value), self.lines, {**self.options, loc: option})


def read_yaml(path: str | Path) -> Source:
    """Reads a YAML file whose top level is a mapping. Raises UserError for anything else."""
    label = str(path)
    try:
        text = read_whole(Path(path), MAX_BYTES, KIND)
    except FileNotFoundError:
        raise UserError(f"{label}: no such file") from None
    return parse_yaml(text, label)


def find_document(what: str, text: str, folder: Path, bundled: Path) -> Path:
    """Resolves a bundled name or a path to a file. Relative paths start from `folder`.

    Raises UserError with the valid names for an unknown name."""
    names = sorted(path.stem for path in bundled.glob("*.yaml"))
    if text in names:
        return bundled / f"{text}.yaml"
    if text.endswith((".yaml", ".yml")) or "/" in text or is_file(folder / text):
        return folder / Path(text).expanduser()
    raise UserError(f"unknown {what} {short_repr(text)}{did_you_mean(text, names)} (a path ends in .yaml)")


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # the name is too long or has a NUL character
        return False


def parse_yaml(text: bytes | str, label: str, max_bytes: int = MAX_BYTES, max_values: int = MAX_VALUES) -> Source:
    """Parses YAML text whose top level is a mapping. `label`: name of the document in messages. Raises UserError."""
    if len(text) > max_bytes:
        raise UserError(f"{label}: is larger than {max_bytes // 1024} KiB, too large for {KIND}")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise UserError(f"{label}: is not a text file (not UTF-8), expected YAML") from None
    if "\0" in text:
        raise UserError(f"{label}: is a binary file, expected YAML")
    if _bracket_depth(text) > 1000:  # the parser needs seconds to fail on 64 KiB of "["
        raise UserError(f"{label}: is nested too deeply")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ruamel.yaml warns about an anchor that is defined twice
            root = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{label}:{mark.line + 1}" if mark else label
        raise UserError(f"{where}: not valid YAML: {_one_line(error.problem or error.context or 'syntax error')}") from None
    except RecursionError:
        raise UserError(f"{label}: is nested too deeply") from None
    except Exception as error:  # ruamel.yaml raises IndexError and AssertionError for some malformed texts
        raise UserError(f"{label}: not valid YAML: {_one_line(str(error)) or type(error).__name__}") from None
    if root is None:
        raise UserError(f"{label}: is empty")
    if not isinstance(root, MappingNode):
        kind = "a list" if isinstance(root, SequenceNode) else f"the text {short_repr(root.value)}"
        raise UserError(f"{label}:{root.start_mark.line + 1}: must be a mapping (`key: value` lines), got {kind}")
    reader = _Reader(label, max_values)
    value = reader.value(root, ())
    return Source(label, value, reader.lines)


class _Reader:
    """Converts nodes to dicts, lists and scalars, and records the line of each key and list item."""

    def __init__(self, label: str, max_values: int) -> None:
        self.label, self.max_values = label, max_values
        self.lines: dict[Loc, int] = {}
        self.count = 0

    def fail(self, node: Node, message: str) -> UserError:
        return UserError(f"{self.label}:{node.start_mark.line + 1}: {message}")

    def value(self, node: Node, loc: Loc) -> Any:
        self.count += 1
        if self.count > self.max_values:
            raise self.fail(node, f"more than {self.max_values} values once aliases are written out")
        if len(loc) > MAX_DEPTH:
            raise self.fail(node, f"nested more than {MAX_DEPTH} levels deep (or an alias to itself)")
        tag = str(node.tag).removeprefix(_PREFIX)
        if isinstance(node, ScalarNode) and tag in _SCALAR_TAGS:
            return self.scalar(node, tag)
        if isinstance(node, MappingNode) and tag == "map":
            return self.mapping(node, loc)
        if isinstance(node, SequenceNode) and tag == "seq":
            places: list[Loc] = [(*loc, index) for index in range(len(node.value))]
            for here, item in zip(places, node.value, strict=True):
                self.lines[here] = item.start_mark.line + 1
            return [self.value(item, here) for here, item in zip(places, node.value, strict=True)]
        raise self.fail(node, f"the tag {short_repr(str(node.tag))} is not used here: plain values only")

    def mapping(self, node: MappingNode, loc: Loc) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.value(key_node, loc) if isinstance(key_node, ScalarNode) else None
            if not isinstance(key, str):
                got = short_repr(key_node.value) if isinstance(key_node, ScalarNode) else "a list or mapping"
                raise self.fail(key_node, f"a key must be a name, got {got}")
            if str(key_node.tag) == _PREFIX + "merge":
                raise self.fail(key_node, "merge keys (<<) are not YAML 1.2; write the keys out")
            here = (*loc, key)
            if key in found:
                raise self.fail(key_node, f"key {short_repr(key)} appears twice (first in line {self.lines[here]})")
            self.lines[here] = key_node.start_mark.line + 1
            found[key] = self.value(value_node, here)
        return found

    def scalar(self, node: ScalarNode, tag: str) -> Any:
        text: str = node.value
        if re.search("[\ud800-\udfff]", text):
            raise self.fail(node, "half of a surrogate pair is not a character")
        if tag == "str":
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _INT.fullmatch(text):
            if len(text) > 100:  # Python rejects more than 4300 digits; no valid setting has more than 20
                raise self.fail(node, f"a number of {len(text)} digits")
            return int(text)
        if _OCT.fullmatch(text) or _HEX.fullmatch(text):
            return int(text, 0)
        if _FLOAT.fullmatch(text):
            return float(text)
        if _INF.fullmatch(text):
            return float(text.replace(".", ""))
        if text in (".nan", ".NaN", ".NAN"):
            raise self.fail(node, "NaN is not a setting")
        return text


def dump_yaml(value: Mapping[str, Any], *, for_any_reader: bool = False) -> str:
    """The value as YAML text: block style, with short mappings and lists on one line. `parse_yaml` reads the same value back.

    for_any_reader: block style only, and also correct for YAML 1.1 readers (PyYAML), which read `1e-05` as text, `off` as
    false and `1:30` as 90."""
    from io import StringIO

    from ruamel.yaml.representer import RoundTripRepresenter

    class Representer(RoundTripRepresenter):
        """A class local to this call, because representers are registered per class."""

    yaml = YAML()  # round-trip mode: only there can each collection have its own flow style
    yaml.Representer = Representer
    yaml.width = 4096 if for_any_reader else 120
    yaml.representer.ignore_aliases = lambda _: True
    yaml.representer.add_representer(type(None), lambda to, _: to.represent_scalar(_PREFIX + "null", "null"))
    yaml.indent(mapping=2, sequence=4, offset=2)
    if for_any_reader:
        yaml.representer.add_representer(float, lambda to, number: to.represent_scalar(_PREFIX + "float", _float_text(number)))
    quotes = _quotes if for_any_reader else _quotes_of_breaks
    yaml.representer.add_representer(str, lambda to, text: to.represent_scalar(_PREFIX + "str", text, style=quotes(text)))
    stream = StringIO()
    yaml.dump(dict(value) if for_any_reader else _styled(value, top=True), stream)
    return stream.getvalue()


def _quotes_of_breaks(text: str) -> str | None:
    """Double quotes for text with Unicode line breaks, which ruamel.yaml would otherwise fold and read back as a space."""
    return '"' if re.search("[\x85\u2028\u2029]", text) else None


def _quotes(text: str) -> str | None:
    is_plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_ .,/()-]*", text) and not text.endswith(" ")
    return None if is_plain and not re.fullmatch(r"(?i)y|n|yes|no|on|off|true|false|null", text) else '"'


def _float_text(number: float) -> str:
    """The number with a decimal point and a signed exponent, as YAML 1.1 requires."""
    text = repr(number).replace("inf", ".inf").replace("nan", ".nan")
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}{'' if '.' in mantissa else '.0'}e{exponent}" if e else text


def _styled(value: Any, top: bool = False) -> Any:
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    if isinstance(value, Mapping):
        styled: Any = CommentedMap({key: _styled(item) for key, item in value.items()})
        nested = any(isinstance(item, (Mapping, list, tuple)) for item in value.values())
        one_domain = len(value) == 1 and isinstance(next(iter(value.values())), (list, tuple))
        if not top and (not nested or one_domain):
            styled.fa.set_flow_style()
        return styled
    if isinstance(value, (list, tuple)):
        styled = CommentedSeq([_styled(item) for item in value])
        if not any(isinstance(item, (Mapping, list, tuple)) for item in value):
            styled.fa.set_flow_style()
        return styled
    return value


def short_repr(value: Any) -> str:
    """The `repr` of a value, truncated to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…" + text[:1] * (text[:1] in "'\"")


def describe(value: Any) -> str:
    """A value and its type for error messages: `'0.1' (text)`, `[1, 2] (a list)`. Numbers have no type suffix."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    names = ((str, " (text)"), (Mapping, " (a mapping)"), (list, " (a list)"), (tuple, " (a list)"))
    return short_repr(value) + next((name for kind, name in names if isinstance(value, kind)), "")


def did_you_mean(word: Any, valid: Iterable[str]) -> str:
    """A suggestion, e.g. `; did you mean 'max_t'?`, or the list of valid words if none is close."""
    valid = list(map(str, valid))
    lowered = {name.lower(): name for name in valid}
    close = difflib.get_close_matches(str(word).lower(), list(lowered), n=1, cutoff=0.6)
    return f"; did you mean {lowered[close[0]]!r}?" if close else f"; valid: {', '.join(valid)}"


def _bracket_depth(text: str) -> int:
    """An upper estimate of the nesting depth. Brackets inside quotes count too, so only large values are meaningful."""
    changes = (1 if bracket in "[{" else -1 for bracket in re.findall(r"[\[\]{}]", text))
    return max(itertools.accumulate(changes), default=0)


def _upwards(loc: Loc) -> Iterable[Loc]:
    return (loc[:length] for length in range(len(loc), -1, -1))


def _replaced(value: Any, loc: Loc, new: Any) -> Any:
    if not loc:
        return new
    value = dict(value) if isinstance(value, Mapping) else {}
    return {**value, loc[0]: _replaced(value.get(loc[0]), loc[1:], new)}


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
