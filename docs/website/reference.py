"""The reference pages, from the code: Python names, keys of studies, spaces and rule packs, the command line.

A key's meaning is the comment at its field, which also names where its default comes from, or the words after `key:` in the
docstring of its class.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ForwardRef, Literal, Union, get_args, get_origin, get_type_hints

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import tune_ssim.integrations
from tune_ssim.base.yaml_source import dump_yaml
from tune_ssim.cli.app import cli
from tune_ssim.guards import Guard, Threshold
from tune_ssim.guards.rule_pack import RulePack, _Condition, _Rule, bundled_packs_folder
from tune_ssim.study.fields import GUARD_OPTIONS, THRESHOLD_OPTIONS
from tune_ssim.study.space import Space, Stage
from tune_ssim.study.study import Study, bundled_studies_folder, load_study

MODULES = ("tune_ssim", *(f"tune_ssim.{room}" for room in ("losses", "guards", "records", "probes", "orchestration", "testing")))
WORDS = {int: "integer", float: "number", str: "text", bool: "true or false", NoneType: "null", Any: "anything", dict: "mapping"}
PAGES = {"Space": "space.md", "RulePack": "rules.md"}  # models with a page of their own
LIMITS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def reference_pages() -> dict[str, tuple[str, str]]:
    """Place in the site → (title in the navigation, text)."""
    return {
        "reference/study.md": ("Every key of a study", study_page()),
        "reference/space.md": ("Every key of a space", space_page()),
        "reference/rules.md": ("Every key of a rule pack", rules_page()),
        "reference/command_line.md": ("Every command", command_line_page()),
        "reference/python.md": ("Python names", python_page()),
    }


# ---- keys of files ----


@lru_cache
def comments_of(cls: type) -> dict[str, str]:
    """Field → the comment above and beside it."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    found = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and not token.string.startswith(("# noqa", "# type:"))
    }
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    described = {}
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in found and lines[first - 2].strip().startswith("#"):
                first -= 1
            words = [found[line] for line in range(first, (node.end_lineno or node.lineno) + 1) if line in found]
            described[node.target.id] = " ".join(words)
    return described


def docstring_parts(cls: type, names: list[str]) -> tuple[str, dict[str, str]]:
    """The docstring without its passages `key: meaning`, and these passages."""
    text = inspect.cleandoc(cls.__doc__ or "")
    starts = [match for match in re.finditer(r"(?:(?<=[.);] )|(?<=[.);]\n)|^)(\w+): ", text, re.M) if match.group(1) in names]
    ends = [*(match.start() for match in starts[1:]), len(text)][: len(starts)]
    passages = {match.group(1): text[match.end() : end].strip() for match, end in zip(starts, ends, strict=True)}
    return text[: starts[0].start()].strip() if starts else text, passages


def meanings(cls: type) -> dict[str, str]:
    """Field → what it means, for each field of `cls`; empty where nothing says so."""
    names = [name for base in reversed(cls.__mro__) for name in inspect.get_annotations(base) if not name.startswith("_")]
    found = dict.fromkeys(names, "")
    for base in reversed(cls.__mro__):
        if inspect.get_annotations(base) and base.__module__.startswith("tune_ssim"):
            _, passages = docstring_parts(base, names)
            for name in names:
                words = [passages.get(name, ""), comments_of(base).get(name, "")]
                found[name] = " ".join(word for word in words if word) or found[name]
    return found


def type_text(annotation: Any, metadata: Any = ()) -> str:
    """`integer >= 1 or null`"""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(arguments[0], arguments[1:])
    if origin is Literal:
        text = ", ".join(f"`{value}`" for value in arguments)
    elif origin in (Union, UnionType):
        text = " or ".join(dict.fromkeys(type_text(one) for one in arguments))
    elif origin in (list, tuple):
        text = f"list of {type_text(arguments[0])}"
    elif origin in (dict, Mapping):
        text = f"mapping from name to {type_text(arguments[1])}" if arguments and arguments[1] is not Any else "mapping"
    elif isinstance(annotation, type) and issubclass(annotation, Enum):
        text = ", ".join(f"`{one.value}`" for one in annotation)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        name = annotation.__name__.lstrip("_")
        text = f"[{name}]({PAGES.get(name, '')}#{name.lower()})"
    else:
        text = WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))
    bounds = [f"{sign} {getattr(one, key):g}" for one in flat(metadata) for key, sign in LIMITS.items() if hasattr(one, key)]
    return " ".join([text, ", ".join(bounds)]).strip()


def flat(metadata: Any) -> Iterator[Any]:
    for one in metadata:
        yield from one.metadata if isinstance(one, FieldInfo) else [one]


def value_text(value: Any) -> str:
    """A default as one writes it in a file."""
    if isinstance(value, BaseModel):
        return value_text(value.model_dump())
    if isinstance(value, Enum):
        return value_text(value.value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {value_text(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(value_text, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) or '""'


def default_text(field: Any) -> str:
    if isinstance(field, FieldInfo):
        if field.is_required():
            return "*required*"
        if field.default_factory_takes_validated_data:
            return "depends on the task"
        value = field.get_default(call_default_factory=True)
        if isinstance(value, (BaseModel, Guard)):
            return "its defaults"
        if isinstance(value, dict) and any(isinstance(one, Guard) for one in value.values()):
            return f"`{', '.join(value)}`"
    else:
        value = field.default if field.default is not MISSING else PydanticUndefined
    return "*required*" if value is PydanticUndefined else f"`{value_text(value)}`"


def keys_of(cls: Any, names: tuple[str, ...] | None = None) -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, meaning) for each field; of a guard those of `names`."""
    said = meanings(cls)
    if is_dataclass(cls):
        hints = get_type_hints(cls, include_extras=True)
        found = {field.name: (hints[field.name], (), field) for field in fields(cls)}
    else:
        found = {name: (field.annotation, field.metadata, field) for name, field in cls.model_fields.items()}
    for name in names or tuple(found):
        annotation, metadata, field = found[name]
        if isinstance(annotation, ForwardRef):
            annotation = eval(annotation.__forward_arg__, vars(sys.modules[cls.__module__]))
        key = getattr(field, "alias", None) or name
        default = default_text(field)
        is_told = default == "*required*" and "default" in said[name]
        yield key, type_text(annotation, metadata), "see right" if is_told else default, said[name]


def cell(text: str) -> str:
    """Text in a table. Citations lead to the page that explains them."""
    text = re.sub(r"\bNone\b", "`null`", " ".join(text.split()).replace("|", "\\|"))
    return re.sub(r"\b([A-Z]{5} (?:§\d+|[A-Z]\d+)|DESIGN\b|note 00\d(?: §[\d.]+)?)", r"[\1](../facts.md)", text)


def section(title: str, cls: Any, names: tuple[str, ...] | None = None, example: str = "") -> str:
    """A heading, what the section is, a table of its keys, and an example."""
    rows = list(keys_of(cls, names))
    intro, _ = docstring_parts(cls, [row[0] for row in rows])
    intro = "" if cls is Study else intro  # it is about the class in Python
    table = [f"| `{key}` | {cell(kind)} | {cell(default)} | {cell(meaning)} |" for key, kind, default, meaning in rows]
    shown = ["```yaml", example.rstrip(), "```", ""] if example else []
    return "\n".join([f"## {title}", "", intro, "", "| key | type | default | meaning |", "|---|---|---|---|", *table, "", *shown])


def parts_of(cls: type[BaseModel], known: list[type[BaseModel]]) -> list[type[BaseModel]]:
    """The models that the fields of `cls` hold, and theirs, each once."""

    def models(annotation: Any) -> Iterator[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield annotation
        for argument in get_args(annotation):
            yield from models(argument)

    for field in cls.model_fields.values():
        for model in models(field.annotation):
            if model not in (*known, Space, RulePack):
                known.append(model)
                parts_of(model, known)
    return known


def study_page() -> str:
    resolved = load_study("fundus_ssim")
    given = resolved.to_dict()
    examples = {type(getattr(resolved, key)).__name__: {key: value} for key, value in given.items() if isinstance(value, dict)}
    intro = "A study is a YAML file. A key that is left out has its default; `tune-ssim run --dry-run` prints all keys of a study."
    whole = (bundled_studies_folder() / "fundus_ssim.yaml").read_text(encoding="utf-8")
    text = ["# Every key of a study", "", intro, "", section("Study", Study, example=whole)]
    for model in parts_of(Study, []):
        example = dump_yaml(examples[model.__name__]) if model.__name__ in examples else ""
        text.append(section(model.__name__, model, example=example))
    for name, (guard, names) in guard_keys().items():
        text.append(section(f"guards: {name}", guard, names))
    return "\n".join(text)


def guard_keys() -> dict[str, tuple[type, tuple[str, ...]]]:
    """Name of a guard in a study → (its class, its keys)."""
    return {**GUARD_OPTIONS, "threshold": (Threshold, THRESHOLD_OPTIONS)}


def space_page() -> str:
    intro = "[Spaces](../spaces.md) says what they do. A space without `stages` has the keys of its only stage at the top."
    example = (Path(tune_ssim.__file__).parents[1] / "search_spaces" / "wide.yaml").read_text(encoding="utf-8")
    return "\n".join(["# Every key of a space", "", intro, "", section("Space", Space, example=example), section("Stage", Stage)])


def rules_page() -> str:
    intro = "[Rule packs](../rules.md) says what they do."
    example = (bundled_packs_folder() / "vae_kl.yaml").read_text(encoding="utf-8")
    parts = [section(model.__name__.lstrip("_"), model) for model in parts_of(RulePack, [_Rule, _Condition])]
    return "\n".join(["# Every key of a rule pack", "", intro, "", section("RulePack", RulePack, example=example), *parts])


# ---- commands ----


def command_line_page() -> str:
    text = ["# Every command", "", "`tune-ssim VERB --help` prints the same.", "", "```text", help_of(cli, "tune-ssim"), "```", ""]
    for name, command in commands(cli, "tune-ssim"):
        text += [f"## {name}", "", "```text", help_of(command, name), "```", ""]
    return "\n".join(text)


def commands(group: click.Group, prefix: str) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        yield f"{prefix} {name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix} {name}")


def help_of(command: click.Command, name: str) -> str:
    return command.get_help(click.Context(command, info_name=name, max_content_width=110, terminal_width=110)).rstrip()


# ---- Python ----


def python_page() -> str:
    intro = "These names are stable; others may move. They load on first use."
    text = ["# Python names", "", intro, ""]
    for name in MODULES:
        module = importlib.import_module(name)
        text += [f"## {name}", "", inspect.cleandoc(module.__doc__ or ""), ""]
        values = {public: getattr(module, public) for public in module.__all__ if not public.startswith("__")}
        constants = {public: value for public, value in values.items() if isinstance(value, str)}
        text += [f"- `{public}` = `{value!r}`" for public, value in constants.items()] + [""]
        for public, value in values.items():
            if inspect.isclass(value) and value.__name__ != public and value.__name__ in values:
                text += [f"### {public}", "", f"Another name of `{value.__name__}`.", ""]
            elif public not in constants:
                text += described(f"{name}.{public}", value)
    text += ["## tune_ssim.integrations", "", inspect.cleandoc(tune_ssim.integrations.__doc__ or ""), ""]
    for file in sorted(Path(tune_ssim.integrations.__path__[0]).glob("[a-z]*.py")):
        documented = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        text += [f"### tune_ssim.integrations.{file.stem}", "", documented, ""]
    return "\n".join(text)


def described(name: str, value: Any) -> list[str]:
    """Heading, signature and docstring; of a class also its public methods."""
    short = name.rpartition(".")[2]
    text = entry("###", short, value)
    for method, function in vars(value).items() if inspect.isclass(value) else ():
        function = getattr(function, "__func__", function)  # of a class method
        if inspect.isfunction(function) and doc(function) and not method.startswith("_"):
            text += entry("####", f"{short}.{method}", function)
    return text


def entry(level: str, name: str, value: Any) -> list[str]:
    return [f"{level} {name}", "", "```python", signature(name, value), "```", "", doc(value), ""]


def doc(value: Any) -> str:
    return inspect.cleandoc(value.__doc__ or "")


def signature(name: str, value: Any) -> str:
    try:
        text = f"{name}{inspect.signature(value)}"
    except (TypeError, ValueError):  # a type alias, or a class without a signature
        return name
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)  # annotations are texts
    return text if len(text) <= 100 else re.sub(r", (?=\w+[:=]|\*)", ",\n    ", text.replace("(", "(\n    ", 1))
