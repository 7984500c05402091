"""What a comment or a rule cites (FACTS, SEEDS, DESIGN, a note) is explained on docs/facts.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "facts.md").read_text(encoding="utf-8")
FOLDERS = ("tune_ssim", "search_spaces", "examples", "benchmarks", "docs")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*") if file.suffix in (".py", ".yaml", ".md"))
SECTION = r"§\d+(?:\.\d+)?"


def cited(text: str) -> set[str]:
    """`FACTS §1`, `SEEDS A7`, `DESIGN`, `000 §5.1`: one entry for each of `SEEDS C6, A7` and `note 000 §2, §5.1`."""
    found = {"DESIGN"} if re.search(r"\bDESIGN\b", text) else set()
    for sections in re.findall(rf"\bFACTS\b'?:?((?:,? ?{SECTION})*)", text):
        found |= {f"FACTS {section}" for section in re.findall(SECTION, sections)} or {"FACTS"}
    for ids in re.findall(r"\bSEEDS ((?:[A-Z]\d+(?:, (?=[A-Z]\d))?)+)", text):
        found |= {f"SEEDS {name}" for name in ids.split(", ")}
    for number, sections in re.findall(rf"(?<![\w.#])(00\d)\b((?:,? {SECTION})*)", text):
        found |= {f"{number} {section}" for section in re.findall(SECTION, sections)} or {f"note {number}"}
    return found


def is_explained(citation: str) -> bool:
    kind, _, name = citation.partition(" ")
    if kind == "DESIGN":
        return "\n## Design\n" in PAGE
    if kind == "FACTS":
        return f"\n## {name} " in PAGE
    if kind == "SEEDS":
        return re.search(rf"\b{name}: ", PAGE) is not None
    if kind == "note":
        return re.search(rf"\b{name}: ", PAGE.split("**The notes.**")[1].split("\n\n")[0]) is not None
    rows = [line for line in PAGE.splitlines() if line.startswith(f"| {kind} ")]
    return any(re.search(rf"{re.escape(name)}(?![.\d])", row) for row in rows)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("(FACTS §2, §6); SEEDS C6, A7, and DESIGN", {"FACTS §2", "FACTS §6", "SEEDS C6", "SEEDS A7", "DESIGN"}),
        ("notes 000 §2, 001 §7; note 004 too", {"000 §2", "001 §7", "note 004"}),
        ("(note 000 §2, §5.1), as FACTS: says", {"000 §2", "000 §5.1", "FACTS"}),
    ],
)
def test_citations_are_found(text: str, found: set[str]) -> None:
    assert cited(text) == found


@pytest.mark.parametrize("citation", ["FACTS §99", "FACTS", "SEEDS F1", "note 009", "000 §9", "000 §5.9"])
def test_what_is_not_on_the_page_is_not_explained(citation: str) -> None:
    assert not is_explained(citation)


def test_every_citation_is_explained() -> None:
    missing, found = [], set()
    for file in FILES:
        if file.name == "facts.md":
            continue
        citations = cited(file.read_text(encoding="utf-8"))
        found |= citations
        missing += [f"{file.relative_to(ROOT)}: {name}" for name in sorted(citations) if not is_explained(name)]
    assert not missing
    assert {"FACTS §2", "SEEDS C4", "note 004", "000 §5.2", "DESIGN"} <= found
