"""Pages name files, functions and rooms that exist; citations in the code have a place in docs/facts.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from test_imports import ROOMS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tune_ssim"
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FACTS = (ROOT / "docs" / "facts.md").read_text(encoding="utf-8")


def test_the_rooms_are_listed_in_order() -> None:
    assert re.findall(r"^\| `(\w+)` \|", ARCHITECTURE, re.M) == ROOMS


def test_the_walks_name_functions_that_exist() -> None:
    steps = re.findall(r"`([\w/]+\.py):(\w+)`", ARCHITECTURE)
    assert len(steps) >= 12
    for file, function in steps:
        tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
        assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{file}: no {function}"


def test_links_between_pages_resolve() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_citations_in_the_code_have_a_place_on_the_page_of_facts() -> None:
    places = {
        r"FACTS §(\d+)": set(re.findall(r"^## §(\d+)", FACTS, re.M)),
        r"SEEDS ([A-E]\d+)": set(re.findall(r"\b([A-E]\d+):", FACTS)),
        r"\bnote (00\d)": set(re.findall(r"\b(00\d):", FACTS)),
    }
    cited = 0
    for file in PACKAGE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for pattern, known in places.items():
            for name in re.findall(pattern, text):
                cited += 1
                assert name in known, f"{file}: {pattern} {name}"
    assert cited > 20
