"""docs/architecture.md, CONTRIBUTING.md and the other pages against the code that they name."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from test_imports import PACKAGE, ROOMS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
NAMED = re.compile(r"`([\w./-]+/|[\w./-]*\w+\.(?:py|yaml|md|toml|txt)|Makefile)(?::([\w.]+))?`")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def names_in(page: str) -> list[tuple[str, str]]:
    """(file or folder, name within it) of everything in code font that is one."""
    return NAMED.findall((ROOT / page).read_text(encoding="utf-8"))


def defined(file: Path) -> set[str]:
    """`name`, `Class` and `Class.method` at a module's top, assigned constants included."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def missing(names: list[tuple[str, str]]) -> list[str]:
    """Those that are neither in the repository nor in the package. A bare file name may be a user's own."""
    wrong = []
    for path, name in names:
        places = [folder / path for folder in (ROOT, PACKAGE) if (folder / path).exists()]
        if not places and "/" not in path.rstrip("/") and not name:
            continue
        if not places or (name and name not in defined(places[0])):
            wrong.append(f"{path}:{name}" if name else path)
    return wrong


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_every_file_and_function_that_is_named_exists(page: str) -> None:
    names = names_in(page)
    assert len(names) > 20
    assert not missing(names)


def test_the_check_sees_what_is_not_there() -> None:
    names = [("guards/watch.py", "Watch.fold"), ("guards/watch.py", "Watch.unfold"), ("guards/clock.py", ""), ("study.yaml", "")]
    assert missing(names) == ["guards/watch.py:Watch.unfold", "guards/clock.py"]


def test_the_page_lists_the_rooms_in_order() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)/` \|", page, re.M) == ROOMS


def test_the_picture_is_drawn_from_this_code() -> None:
    from readme_architecture import PICTURE, draw

    assert PICTURE.read_text(encoding="utf-8") == draw(), "out of date: python benchmarks/readme_architecture.py"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for target in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        assert ((ROOT / page).parent / target).exists(), target


def test_the_index_has_every_page() -> None:
    linked = set(LINK.findall((ROOT / "docs/index.md").read_text(encoding="utf-8")))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"} <= linked
