"""The documentation as a site: every page is in its navigation, no link is broken, and nothing is loaded from elsewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "docs" / "website"))
import make_site  # noqa: E402


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
    listed = places(make_site.navigation())
    assert len(listed) == len(set(listed))
    assert {*make_site.pages().values()} - {"contents.md"} <= {*listed}


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
