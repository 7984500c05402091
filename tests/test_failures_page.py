"""docs/failures.md: every row names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "failures.md"


def test_every_row_names_a_test_that_exists() -> None:
    defined = {name for file in TESTS.glob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)}
    table = PAGE.read_text().partition("## Random faults")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 15
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.split(" | ")[-1])
        assert named, row
        assert set(named) <= defined, set(named) - defined


def test_long_tests_are_marked() -> None:
    """`*long*` follows exactly the tests that only `make e2e` runs."""
    text = "\n".join(file.read_text() for file in TESTS.glob("test_*.py"))
    long = set(re.findall(r"@pytest\.mark\.e2e[^\n]*\n(?:@[^\n]*\n)*def (test_\w+)", text))
    page = PAGE.read_text()
    for name in set(re.findall(r"`(test_\w+)`", page)):
        marks = {bool(found) for found in re.findall(rf"`{name}`( \(\*long\*\))?", page)}
        assert marks == {name in long}, name
