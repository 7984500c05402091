"""The files that a command's result depends on, found without running it: scripts, what they import, settings, data, weights."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tune_ssim.base.errors import UserError
from tune_ssim.study.command_spec import CommandSpec, fill

OWN_FUNCTION = "tune_ssim.trials.command.call_function"  # runs "module:function", which follows it
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".npz")
SETTING_SUFFIXES = (".yaml", ".yml", ".json", ".toml", ".ini", ".cfg", ".txt")
SCRIPT_SUFFIXES = (".py", ".sh", ".bash")
WITHOUT_RUNNING = "files that the program opens by itself, and modules that it imports by a name made at run time"
WHEN_OBSERVED = "data and weights that the program opens by itself, and what it opens or imports after its first update"
NO_CODE = "the program"
MAX_NAMED = 5  # names in a sentence
BLOCK_BYTES = 2**20


class Dependencies:
    """files: name → path. Names begin with `code/`, `settings/`, `weights/` or `data/`, and are relative to the working folder.

    config: the baseline's settings, some of which may be paths. home: the working folder if there is no `cwd`. Raises UserError for
    a path of `task.data` or `task.weights` that does not exist."""

    def __init__(self, spec: CommandSpec, config: Mapping[str, Any], home: str | None) -> None:
        self._spec, self._fields = spec, {**config, "python": sys.executable}
        self._folder = working_folder(spec, self._fields, home)
        self.files: dict[str, Path] = {}
        self._packages: set[str] = set()
        self._folders: list[str] = []
        self._roots = self._import_roots()
        for command in (spec.command, spec.smoke and spec.smoke.command, spec.evaluate and spec.evaluate.command):
            self._add_command(command or ())
        self._add_declared()

    @property
    def not_covered(self) -> list[str]:
        """What may change without being noticed, a phrase each."""
        found = [WITHOUT_RUNNING]
        if not any(name.startswith("code/") for name in self.files):
            found.append(f"{NO_CODE} {self._spec.command[0]!r}, of which no file is among its arguments")
        if self._packages:
            found.append(f"installed packages: {_listed(sorted(self._packages))}")
        if self._folders:
            found.append(f"folders among its arguments: {_listed(self._folders)} (`task: {{data: [FOLDER]}}` covers one)")
        missing = [name for name in ("data", "weights") if not any(file.startswith(name) for file in self.files)]
        if missing:
            found.append(f"its {' and '.join(missing)}, since the study does not name them (`task: {{{missing[0]}: [FILE]}}`)")
        return found

    def hashes(self) -> dict[str, str]:
        """Name → SHA-256 of the file, or of all files of a folder. Raises UserError for one that cannot be read."""
        try:
            return {name: _hash_of(path) for name, path in sorted(self.files.items())}
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}: it is among the files that a proof covers") from None

    # -- what the study names

    def _filled(self, template: str) -> str | None:
        """None if it has a placeholder whose value only a trial knows, such as `{exp_dir}`."""
        return _filled(template, self._fields)

    def _import_roots(self) -> list[Path]:
        own = self._filled(str(self._spec.environment.get("PYTHONPATH", ""))) or ""
        paths = [*own.split(os.pathsep), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        roots = [Path(self._folder, path) for path in paths if path]
        return [root for root in roots if "site-packages" not in root.parts]

    def _add_command(self, words: Sequence[str]) -> None:
        texts = [self._filled(word) for word in words]
        for at, text in enumerate(texts):
            before = texts[at - 1] if at else None
            if text is None:
                continue
            if before in ("-m", OWN_FUNCTION):
                self._add_module(text.partition(":")[0], self._folder, self._folder)
            elif at:
                self._add_path(text.partition("=")[2] if text.startswith("-") else text)
            elif "/" in text and (self._folder / text).is_relative_to(self._folder):  # else an interpreter or an installed program
                self._add_path(text)

    def _add_path(self, text: str) -> None:
        path = self._folder / text
        if text and path.is_file():
            self._add_file(path)
        elif text not in ("", ".") and path.is_dir() and text not in self._folders:
            self._folders.append(text)

    def _add_declared(self) -> None:
        spec, smoke = self._spec, self._spec.smoke
        texts = [value for name, value in self._fields.items() if isinstance(value, str) and name != "python"]
        texts += [str(value) for name, value in spec.environment.items() if name != "PYTHONPATH"]
        if spec.config_file is not None:
            texts += [spec.config_file.base or "", *map(str, spec.config_file.set.values())]
        for template in texts:
            if (text := self._filled(template)) and os.pathsep not in text:
                self._add_path(text)
        declared = {"data": [*spec.data], "weights": [*spec.weights]}
        if smoke is not None:
            declared["data"] += filter(None, (smoke.references, smoke.reconstructions, smoke.inputs, smoke.examples))
            declared["weights"] += filter(None, [smoke.at_start])
        for kind, templates in declared.items():
            for template in templates:
                if (text := self._filled(template)) is None:
                    continue
                if not (self._folder / text).exists():
                    raise UserError(f"task: {kind}: {self._folder / text}: no such file or folder")
                self._add(kind, self._folder / text)
                self._folders = [folder for folder in self._folders if folder != text]

    # -- files

    def _add(self, kind: str, path: Path) -> bool:
        """False if it is known already."""
        name = name_of(kind, path, self._folder)
        is_new = name not in self.files
        self.files[name] = path
        return is_new

    def _add_file(self, path: Path) -> None:
        suffix = path.suffix.lower()
        if suffix in SCRIPT_SUFFIXES or _is_script(path):
            self._add_code(path)
        elif suffix in WEIGHT_SUFFIXES:
            self._add("weights", path)
        else:
            self._add("settings" if suffix in SETTING_SUFFIXES else "data", path)

    def _add_code(self, path: Path) -> None:
        """A script, and what it imports or starts."""
        if not self._add("code", path):
            return
        if path.suffix == ".py":
            self._add_imports(path, path.parent)
            return
        for word in re.findall(r"[\w./-]+", path.read_text(errors="replace")):  # of a shell script
            for place in (self._folder / word, path.parent / word):
                if place.suffix.lower() in SCRIPT_SUFFIXES and place.is_file():
                    self._add_code(place)

    def _add_module(self, name: str, start: Path, folder: Path) -> None:
        """start: where the name begins. folder: where the absolute imports of the program begin."""
        found = list(self._paths_of(name, start))
        for path in found:
            if self._add("code", path):
                self._add_imports(path, folder)
        if not found and (top := name.partition(".")[0]) not in (*sys.stdlib_module_names, "tune_ssim"):
            self._packages.add(top)

    def _paths_of(self, name: str, start: Path) -> Iterator[Path]:
        """The files of a module and of the packages around it, if they are local."""
        parts = name.split(".")
        if parts[0] == "tune_ssim":  # hashed as this package
            return
        for root in (start, *self._roots):
            whole = root.joinpath(*parts)
            packages = [root.joinpath(*parts[:depth], "__init__.py") for depth in range(1, len(parts) + 1)]
            if whole.with_suffix(".py").is_file() or whole.is_dir():
                yield from filter(Path.is_file, (*packages, whole.with_suffix(".py"), whole / "__main__.py"))
                return

    def _add_imports(self, path: Path, folder: Path) -> None:
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            return
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self._add_module(alias.name, folder, folder)
            elif isinstance(node, ast.ImportFrom):
                start = path.parents[node.level - 1] if node.level else folder
                if node.module:
                    self._add_module(node.module, start, folder)
                for alias in node.names:  # each may be a module of the package
                    inner = f"{node.module}.{alias.name}" if node.module else alias.name
                    if any(self._paths_of(inner, start)):
                        self._add_module(inner, start, folder)


def working_folder(spec: CommandSpec, fields: Mapping[str, Any], home: str | None) -> Path:
    return Path(home or ".", _filled(spec.cwd or "", fields) or "").absolute()


def hashes_of(names: Iterable[str], folder: Path) -> dict[str, str]:
    """Of files by their names, such as those that a program was seen to import. One that is gone is left out."""
    files = {name: folder / name.partition("/")[2] for name in names}
    return {name: _hash_of(path) for name, path in files.items() if path.is_file()}


def _filled(template: str, fields: Mapping[str, Any]) -> str | None:
    try:
        return fill(template, fields)
    except UserError:
        return None


def name_of(kind: str, path: Path, folder: Path) -> str:
    return f"{kind}/{os.path.relpath(path, folder)}"


def _is_script(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"#!"


def _hash_of(path: Path) -> str:
    """Of a folder: of the names and contents of its files."""
    if not path.is_dir():
        return _digest_of(path)
    whole = hashlib.sha256()
    for file in sorted(one for one in path.rglob("*") if one.is_file()):
        whole.update(f"{file.relative_to(path)}\0{_digest_of(file)}\n".encode())
    return whole.hexdigest()


def _digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
