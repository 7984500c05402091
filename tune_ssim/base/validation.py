"""Pydantic models of documents that users write. Errors are reported as lines `file:line: place: message`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tune_ssim.base.errors import FieldError, UserError
from tune_ssim.base.yaml_source import Loc, Source, describe, did_you_mean, short_repr

MAX_PROBLEMS = 20  # lines in one message

_COMPARISONS = {"greater_than_equal": (">=", "ge"), "greater_than": (">", "gt"), "less_than": ("<", "lt")}
_MESSAGES = {
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "too_short": "must not be empty",
    "dict_type": "must be a mapping",
}
T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Problem:
    """One error in a document, at `loc`.

    subject: text before the message; None: the dotted path to `loc`, or to the enclosing mapping if the error is about a key.
    about: "value"; "key" for an invalid key; "line" if `message` is a complete line, e.g. an error in another file."""

    loc: Loc
    message: str
    subject: str | None = None
    about: Literal["value", "key", "line"] = "value"

    def under(self, *loc: str | int) -> Problem:
        """The same problem with `loc` as a prefix, for the enclosing document."""
        return replace(self, loc=(*loc, *self.loc))

    def text(self) -> str:
        path = self.loc[:-1] if self.about == "key" else self.loc
        subject = ".".join(map(str, path)) if self.subject is None else self.subject
        return f"{subject}: {self.message}" if subject and self.about != "line" else self.message


class Problems(ValueError):
    """All problems of a value and its parts. A validator collects problems, then raises them together with `check`; pydantic
    adds the location of the value."""

    def __init__(self, found: Iterable[Problem] = ()) -> None:
        super().__init__()
        self.found = list(found)

    def __str__(self) -> str:
        return "\n".join(one.text() for one in self.found)

    def add(self, loc: Loc, message: str, subject: str | None = None) -> None:
        self.found.append(Problem(loc, message, subject))

    @contextmanager
    def at(self, *loc: str | int) -> Iterator[None]:
        """Context manager that collects the errors raised inside it as problems at `loc`."""
        try:
            yield
        except (ValidationError, Problems) as error:
            self.found += [one.under(*loc) for one in problems_of(error)]

    def check(self) -> None:
        if self.found:
            raise self


def problem(message: str, subject: str | None = None) -> Problems:
    """An error about the value that a validator received."""
    return Problems([Problem((), message, subject)])


def problems_of(error: ValidationError | Problems) -> list[Problem]:
    """The problems, with this project's messages instead of pydantic's."""
    if isinstance(error, Problems):
        return error.found
    return [one for detail in error.errors(include_url=False) for one in _problems_in(detail)]


def user_error(source: Source, problems: Iterable[Problem]) -> UserError:
    """A UserError with one line per problem, in document order, without duplicates."""
    lines: list[tuple[int, str]] = []
    for one in problems:
        option = source.option_at(one.loc)
        if one.about == "line":
            text = one.message
        else:
            text = f"{source.at(one.loc)}: {one.text()}" if option is None else f"{option}: {one.message}"
        line = source.line_at(one.loc) or 0, text
        if line not in lines:
            lines.append(line)
    texts = [text for _, text in sorted(lines, key=lambda line: line[0])]
    more = len(texts) - MAX_PROBLEMS
    return UserError("\n".join(texts[:MAX_PROBLEMS] + ([f"… and {more} more"] if more > 0 else [])))


def validate(model: type[Model], source: Source, given: Any, context: Any = None) -> Model:
    """`given`, which was read from `source`, as a validated model. Raises UserError with one line per problem."""
    try:
        return model.model_validate(given, context=context)
    except ValidationError as error:
        raise user_error(source, problems_of(error)) from None


def unknown_keys(given: Iterable[Any], valid: Iterable[str]) -> list[Problem]:
    """One problem for each key of `given` that is not in `valid`."""
    valid = list(valid)
    unknown = [key for key in given if key not in valid]
    return [Problem((key,), f"unknown key {short_repr(key)}{did_you_mean(key, valid)}", about="key") for key in unknown]


def checked(given: Any, valid: Iterable[str], build: Callable[[dict[str, Any]], T]) -> T:
    """Calls `build` with the known keys of a mapping. Raises Problems for unknown keys and bad values together."""
    if not isinstance(given, Mapping):
        raise problem(f"must be a mapping, got {describe(given)}")
    valid = list(valid)
    known = {key: given[key] for key in given if key in valid}
    problems = Problems(unknown_keys(given, valid))
    try:
        built = build(known)
    except (ValidationError, Problems) as error:
        problems.found += problems_of(error)
    problems.check()
    return built


def read_as(kind: type[T], value: Mapping[str, Any]) -> T:
    """A JSON object that this package wrote, as a dataclass: null stands for the default, and other keys are dropped. Raises
    Problems."""
    own = [one for one in fields(kind) if one.name in value]  # type: ignore[arg-type]
    has_default = {one.name for one in own if one.default is not MISSING or one.default_factory is not MISSING}
    known = {one.name: value[one.name] for one in own if value[one.name] is not None or one.name not in has_default}
    return build_dataclass(kind, known, known)


def json_number(value: Any) -> float:
    """Also "NaN" and "Infinity", which `jsonable` writes."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise problem(f"must be a number, got {describe(value)}") from None


JsonNumber = Annotated[float, BeforeValidator(json_number)]


def build_dataclass(kind: type[T], given: Any, valid: Iterable[str]) -> T:
    """A dataclass of type `kind`, built from a mapping with some of its fields. Raises Problems."""
    # Via JSON: only there does pydantic's strict mode accept lists as tuples and mappings as dataclasses.
    adapter: TypeAdapter[T] = _adapter(kind)  # type: ignore[arg-type]
    return checked(given, valid, lambda known: adapter.validate_json(json.dumps(known), strict=True))


def plain_mapping(value: Any) -> dict[str, Any]:
    """A mapping as it would be read from a file: tuples become lists, keys and paths become text, None becomes empty."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise problem(f"must be a mapping, got {describe(value)}")
    try:
        return json.loads(json.dumps(dict(value), default=os.fspath))
    except (TypeError, ValueError) as error:
        raise problem(f"must hold plain values: {error}") from None


def or_empty(kind: Callable[[], Any]) -> BeforeValidator:
    """A validator that reads an empty `key:` in YAML (None) as an empty list, mapping or text."""
    return BeforeValidator(lambda given: kind() if given is None else given)


Text = Annotated[str, or_empty(str), AfterValidator(lambda text: " ".join(text.split()))]
"""Text on a single line; line breaks become spaces."""


class Section(BaseModel):
    """A frozen model with strict types: the text "12" is not a number, and 1 is not true."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, given: Any, handler: Callable[[Any], Any]) -> Any:
        return given if isinstance(given, cls) else checked(given, cls.valid_keys(), handler)

    @classmethod
    def valid_keys(cls) -> list[str]:
        """The keys of its mapping in a file."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    def replace(self: Model, **changes: Any) -> Model:
        """A copy with some fields changed, validated again."""
        return type(self)(**{**dict(self), **changes})


class Document(Section):
    """A section with checks across its fields. `problems` runs even if some fields are invalid, so that a user sees all
    errors at once; it sees an invalid field as None."""

    def problems(self, context: Any) -> Iterable[Problem]:
        """Problems between the fields. context: the validation context."""
        return ()

    @field_validator("*", mode="wrap")
    @classmethod
    def _keep_problems(cls, value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            return _InvalidField(problems_of(error))

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, given: Any, handler: Callable[[Any], Any], info: ValidationInfo) -> Any:
        if isinstance(given, cls):
            return given
        return checked(given, cls.model_fields, lambda known: handler(known)._cross_checked(info.context))

    def _cross_checked(self: Model, context: Any) -> Model:
        invalid = {name: value for name, value in self if isinstance(value, _InvalidField)}
        problems = Problems(one.under(name) for name, value in invalid.items() for one in value.problems)
        problems.found += self.model_copy(update=dict.fromkeys(invalid)).problems(context)  # type: ignore[attr-defined]
        problems.check()
        return self


@dataclass(frozen=True)
class _InvalidField:
    """Placeholder for the value of an invalid field."""

    problems: list[Problem]


def _problems_in(detail: Mapping[str, Any]) -> list[Problem]:
    loc, kind, context = tuple(detail["loc"]), detail["type"], detail.get("ctx", {})
    got = f", got {describe(detail['input'])}"
    message = _MESSAGES.get(kind, detail["msg"][:1].lower() + detail["msg"][1:]) + got
    if kind == "value_error":
        error = context["error"]
        if isinstance(error, Problems):
            return [one.under(*loc) for one in error.found]
        loc, message = ((*loc, error.field), error.message) if isinstance(error, FieldError) else (loc, str(error))
    elif loc and loc[-1] == "[key]":
        loc, message = loc[:-2], f"a key must be a name{got}"
    elif kind in ("missing", "missing_argument"):
        loc, message = loc[:-1], f"{loc[-1]} is missing"
    elif kind in _COMPARISONS:
        sign, key = _COMPARISONS[kind]
        message = f"must be {sign} {context[key]:g}{got}"
    elif kind in ("literal_error", "enum"):
        guess = did_you_mean(detail["input"], re.findall("'([^']*)'", context["expected"]))
        close = guess if guess.startswith("; did") else ""
        message = f"must be one of {context['expected'].replace(' or ', ', ')}{got}{close}"
    return [Problem(loc, message)]


@lru_cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
