"""Who may import whom: the floors of the package, and which heavy libraries each module may load.

Two kinds of proof. Reading the source (AST) sees every `import` statement, also those inside functions.
Importing in a fresh interpreter sees what really loads, also through third parties.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tune_ssim
import tune_ssim.orchestration
from tune_ssim.base.extras import EXTRA_OF

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tune_ssim"

# From the bottom, in the order of docs/architecture.md. A room imports only from rooms that come before it.
ROOMS = [
    "base",
    "losses",
    "records",
    "probes",
    "guards",
    "study",
    "trials",
    "tasks",
    "before_launch",
    "results",
    "search",
    "tracking",
    "report",
    "orchestration",
    "integrations",
    "testing",
    "cli",
]
LOADED_BY_PATH = {"inside", "site"}  # folders of probes/observer
LOOSE = {"__init__", "__main__", "version"}  # files that stand in no room
MAX_ARROWS = 80  # between rooms: a reader can still hold them in mind
INTEGRATIONS = {"lightning": "lightning", "huggingface": "transformers", "accelerate": "accelerate"}  # module → extra library
ORDER = {room: index for index, room in enumerate(ROOMS)}

# (modules under these names, libraries that importing them must not load)
NO_TORCH = (
    "base",
    "records",
    "guards",
    "study",
    "results",
    "trials.processes",
    "trials.channel",
    "trials.push",
    "trials.quarantine",
)
# In the order in which one interpreter imports them.
MUST_NOT_LOAD: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (NO_TORCH, ("torch", "ray", "mlflow", "optuna")),
    (("losses", "probes", "trials", "tasks", "before_launch"), ("ray", "mlflow", "optuna")),
    (tuple(room for room in ROOMS if room not in ("orchestration", "tracking")), ("ray", "mlflow")),
    (("tracking",), ("ray",)),
)


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Dotted name → file of every module, packages included; not of what is loaded by its path into other programs."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        if set(file.parent.relative_to(package).parts) & LOADED_BY_PATH:
            continue
        parts = (package.name, *file.relative_to(package).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def imported_names(source: str) -> tuple[tuple[int, str], ...]:
    """(line, dotted name) of every import; `from a import b` counts as `a.b`, for b may be a submodule."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            found += ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
    return tuple(found)


def importable(names: Iterable[str]) -> list[str]:
    """Without the integrations whose library is not installed."""
    wanted = {f"tune_ssim.integrations.{name}": library for name, library in INTEGRATIONS.items()}
    return [name for name in names if name not in wanted or find_spec(wanted[name]) is not None]


def top(module: str) -> str:
    """`tune_ssim.guards.watch` → `guards`; the package itself → the empty string."""
    return module.split(".")[1] if "." in module else ""


def within(module: str, places: Iterable[str]) -> bool:
    return any(module == f"tune_ssim.{place}" or module.startswith(f"tune_ssim.{place}.") for place in places)


def room_of(name: str) -> str:
    """`tune_ssim.guards.watch` → `guards`; `tune_ssim.load_space` → the room that holds it; empty where there is none."""
    room = top(name)
    places = [module for module, names in tune_ssim._MODULES.items() if room in names]
    return room if room in ORDER or room in LOOSE or not places else places[0].split(".")[0]


def arrows(files: dict[str, Path]) -> Iterator[tuple[str, str, str]]:
    """(importing room, imported room, place in words) of every import from one room into another."""
    for module, file in files.items():
        if top(module) in LOOSE | {""}:
            continue  # tune_ssim/__init__.py only names what others hold
        for line, name in imported_names(file.read_text(encoding="utf-8")):
            below = room_of(name) if name.split(".")[0] == "tune_ssim" else ""
            if below in ORDER and below != top(module):
                yield top(module), below, f"{file.name}:{line}: {top(module)} imports {name}"


def upward_imports(files: dict[str, Path]) -> list[str]:
    return [place for above, below, place in arrows(files) if ORDER[below] > ORDER[above]]


def in_fresh_interpreter(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(stages: Iterable[tuple[Iterable[str], Iterable[str]]], then: str = "") -> dict[str, list[str]]:
    """Imports the modules of each stage in turn, all in one new interpreter: module → the libraries, of those that its stage must
    not load, that it was first to load. `then` runs afterwards, in the same interpreter."""
    code = """
import importlib, json, sys
blame, seen = {}, set()
for names, libraries in json.loads(sys.argv[1]):
    for name in names:
        importlib.import_module(name)
        new = [library for library in libraries if library in sys.modules and library not in seen]
        if new:
            blame[name] = new
            seen.update(new)
"""
    given = json.dumps([(list(names), list(libraries)) for names, libraries in stages])
    return json.loads(in_fresh_interpreter(f"{code}{then}\nprint(json.dumps(blame))", given).splitlines()[-1])


def test_every_module_stands_in_a_room() -> None:
    assert {top(module) for module in modules()} - {""} == set(ROOMS) | LOOSE - {"__init__"}


def test_imports_go_down_only() -> None:
    assert not upward_imports(modules())


def test_there_are_few_arrows_between_rooms() -> None:
    found = {(above, below) for above, below, _ in arrows(modules())}
    assert len(found) <= MAX_ARROWS, sorted(found)


def test_every_room_says_what_it_is_for() -> None:
    for room in ROOMS:
        text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
        assert text, room


def test_the_order_check_sees_a_violation(tmp_path: Path) -> None:
    guards = tmp_path / "tune_ssim" / "guards"
    guards.mkdir(parents=True)
    (guards / "watch.py").write_text(
        "from tune_ssim import load_study\ndef f():\n    from tune_ssim.tasks import task\nimport tune_ssim.records\n"
    )
    wrong = upward_imports(modules(tmp_path / "tune_ssim"))
    assert [line.split(" ")[0] for line in wrong] == ["watch.py:1:", "watch.py:3:"]


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("ray", ("tune_ssim.orchestration.",)),
        ("mlflow", ("tune_ssim.tracking.",)),
    ],
)
def test_only_these_files_name(library: str, allowed: tuple[str, ...]) -> None:
    for module, file in modules().items():
        for line, name in imported_names(file.read_text(encoding="utf-8")):
            assert name.split(".")[0] != library or module.startswith(allowed), f"{file}:{line}: imports {name}"


def test_what_importing_loads_and_all_public_names_resolve() -> None:
    """The names after every submodule was imported: one of the same name would hide what the name stands for."""
    stages = [
        (importable(module for module in modules() if within(module, places)), libraries) for places, libraries in MUST_NOT_LOAD
    ]
    assert all(names for names, _ in stages)
    then = """
import types
for name in names:
    module = sys.modules[name]
    for public in getattr(module, "__all__", ()):
        value = getattr(module, public)  # AttributeError: the name leads nowhere
        assert not isinstance(value, types.ModuleType), f"{name}.{public} is a module"
        assert public in dir(module), f"{name}.{public} is not in dir()"
"""
    assert loaded_by([*stages, (importable(modules()), ())], then) == {}


def test_the_import_check_sees_a_violation() -> None:
    assert loaded_by([(["json", "optuna"], ["torch", "optuna"])]) == {"optuna": ["optuna"]}
    assert loaded_by([(["json"], ["optuna"]), (["optuna"], ["torch"])]) == {}


def test_importing_the_package_costs_nothing() -> None:
    packages = ["tune_ssim", "tune_ssim.guards", "tune_ssim.orchestration"]
    assert loaded_by([(packages, ["torch", "ray", "mlflow", "optuna", "numpy"])]) == {}


def test_help_loads_nothing_heavy() -> None:
    code = """
import sys
from tune_ssim.cli.app import main
sys.argv = ["tune-ssim", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print("loaded:", *(name for name in ("torch", "ray", "mlflow", "optuna", "numpy") if name in sys.modules))
"""
    assert in_fresh_interpreter(code).splitlines()[-1].strip() == "loaded:"


@pytest.mark.parametrize("name", ["tune_ssim", "tune_ssim.losses", "tune_ssim.orchestration", "tune_ssim.probes"])
def test_no_public_name_is_a_submodules_name(name: str) -> None:
    package = importlib.import_module(name)
    folder = Path(package.__file__).parent
    submodules = {file.stem for file in folder.glob("*.py")} | {file.parent.name for file in folder.glob("*/__init__.py")}
    assert not submodules & set(package.__all__)
    assert set(package.__all__) - {"__version__"} == {name for names in package._MODULES.values() for name in names}


def test_no_public_name_is_its_modules_name() -> None:
    for name, file in modules().items():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            is_named = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == file.stem
            assert not is_named, f"{name}.{file.stem}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_spaces'"):
        tune_ssim.load_spaces  # noqa: B018


@pytest.mark.parametrize("folder", ["tune_ssim", "tests"])
def test_every_imported_library_is_declared(folder: str) -> None:
    # Read from pyproject.toml: the installed metadata may be older.
    extras = {extra for _, extra in EXTRA_OF.values()} | ({"test"} if folder == "tests" else set())
    lines = [line for key in ("dependencies", *sorted(extras)) for line in declared(key)]
    known = {canonicalize_name(Requirement(line).name) for line in lines}
    # tests/references.py is imported by its bare name, and so are benchmarks and the script of the site, which tests look at.
    siblings = {
        file.stem for place in (folder, "benchmarks", "benchmarks/replay", "docs/website") for file in (ROOT / place).glob("*.py")
    }
    distributions = packages_distributions()
    for file in sorted((ROOT / folder).rglob("*.py")):
        if file.parent.name in LOADED_BY_PATH:
            continue
        for line, name in imported_names(file.read_text(encoding="utf-8")):
            library = name.split(".")[0]
            if library in {"tune_ssim", "tests"} | siblings or library in sys.stdlib_module_names:
                continue
            if library == "pytorch_lightning":
                continue  # Lightning under its other name
            owners = {canonicalize_name(owner) for owner in distributions.get(library, [library])}
            assert owners & known, f"{file}:{line}: {library} comes from {sorted(owners)}: not in pyproject.toml"


@pytest.mark.parametrize("library", EXTRA_OF)
def test_the_extra_that_a_message_names_installs_the_library(library: str) -> None:
    name, extra = EXTRA_OF[library]
    installed = [Requirement(line) for line in declared(extra)]
    assert canonicalize_name(name.replace("PyTorch", "torch")) in {canonicalize_name(line.name) for line in installed}
    if extra not in ("diffusers", "lightning", "transformers"):  # large, and of use to few
        (everything,) = map(Requirement, declared("all"))
        assert extra in everything.extras


def declared(key: str) -> list[str]:
    """The requirements under `key` in pyproject.toml. (tomllib is new in Python 3.11, and this runs on 3.10.)"""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.split(rf"^{key} = \[.*\n", text, maxsplit=1, flags=re.M)[1].split("\n]", 1)[0]
    return [ast.literal_eval(line.split("#")[0].strip().rstrip(",")) for line in block.splitlines()]


def test_what_is_loaded_into_programs_needs_nothing_of_ours() -> None:
    """Standard library, torch, and what the program itself has imported already."""
    observer = PACKAGE / "probes" / "observer"
    files = [file for folder in LOADED_BY_PATH for file in (observer / folder).glob("*.py")]
    assert len(files) > 5
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                assert name.split(".")[0] in {*sys.stdlib_module_names, "torch", "safetensors"}, f"{file.name}: {name}"
