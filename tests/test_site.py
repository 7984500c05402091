"""The documentation as a site: every page is in its navigation, no link is broken, and nothing is loaded from elsewhere."""

from __future__ import annotations

import html
import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "docs" / "website"))
import make_site  # noqa: E402
import reference  # noqa: E402


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with --strict: a broken link or anchor is an error."""
    pytest.importorskip("zensical", reason="needs Python 3.11")
    folder = tmp_path_factory.mktemp("docs") / "site"
    make_site.build(folder)
    return folder


def places(navigation: list) -> list[str]:
    """The pages of a navigation in their order."""
    found: list[str] = []
    for entry in navigation:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            found += [value] if isinstance(value, str) else places(value)
    return found


def test_every_page_is_in_the_navigation_once() -> None:
    listed = places(make_site.navigation({}))
    assert len(listed) == len(set(listed))
    assert {*make_site.pages().values()} - {"contents.md"} <= {*listed}


def test_every_key_of_a_file_has_a_meaning() -> None:
    """It is the comment at the field, or words of the docstring."""
    models = [reference.Study, *reference.parts_of(reference.Study, []), reference.Space, reference.Stage, reference.RulePack]
    models += reference.parts_of(reference.RulePack, [reference._Rule, reference._Condition])
    guards = dict(reference.guard_keys().values())
    keys = [(cls.__name__, row) for cls in (*models, *guards) for row in reference.keys_of(cls, guards.get(cls))]
    assert not [f"{name}.{row[0]}" for name, row in keys if not row[3]]
    assert ("Search", "trials", "integer >= 1", "`12`") in [(name, *row[:3]) for name, row in keys]


def test_the_reference_has_every_public_name_key_and_verb(site: Path) -> None:
    text = {page.stem: html.unescape(page.read_text(encoding="utf-8")) for page in (site / "reference").glob("*.html")}
    assert all(f"tune-ssim {name}" in text["command_line"] for name in reference.cli.commands)
    assert all(f"<code>{key}</code>" in text["study"] for key in reference.Study.model_fields)
    for module in reference.MODULES:
        public = importlib.import_module(module).__all__
        assert all(name in text["python"] for name in public if not name.startswith("__")), module


def test_every_page_is_built(site: Path) -> None:
    assert {*make_site.pages().values()} <= {f"{page.stem}.md" for page in site.glob("*.html")}


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loads = re.compile(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="?((?:https?:)?//[^" >]+)')
    for page in site.rglob("*.html"):
        assert not loads.findall(page.read_text(encoding="utf-8")), page.name
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


@pytest.mark.parametrize("link", ["nowhere.md", "../nowhere.txt"])
def test_a_link_that_leads_nowhere_is_an_error(link: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_site, "ROOT", tmp_path)
    (tmp_path / "page.md").write_text(f"[a link]({link})")
    with pytest.raises(FileNotFoundError, match=f"page.md: a link to {link}"):
        make_site.staged(tmp_path / "page.md", tmp_path)
