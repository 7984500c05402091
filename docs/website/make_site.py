"""Builds the documentation as a site: python docs/website/make_site.py [FOLDER]; default ./site

The pages are those of docs/ as they stand, so that they also read well in the repository. They are copied to a temporary folder,
with links that leave docs/ changed to a page of the site or to a copy of the file. The navigation is docs/index.md.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reference import reference_pages
from ruamel.yaml import YAML

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent
ROOT = DOCS.parent
# Pages whose place in the site is another than in the repository.
PLACES = {ROOT / "README.md": "index.md", DOCS / "index.md": "contents.md", ROOT / "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(?<=\]\()([^)\s#]*)(#[^)\s]*)?(?=\))")
LINKED_TEXT = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#]+)\)")
SECTION = re.compile(r"^## (.+)$|^- \[([^\]]+)\]\(([^)\s]+\.md)\)", re.M)


def pages() -> dict[Path, str]:
    """The pages written by hand, each with its place in the site."""
    return {**{page: page.name for page in sorted(DOCS.glob("*.md"))}, **PLACES}


def staged(page: Path, folder: Path) -> str:
    """The text of a page with links that lead somewhere in the site. Files outside of docs/ are copied to `folder`.

    Raises FileNotFoundError for a link that leads nowhere."""
    known = pages()

    def target(name: str) -> Path:
        found = (page.parent / name).resolve()
        if not found.exists():
            raise FileNotFoundError(f"{page.relative_to(ROOT)}: a link to {name}, which does not exist")
        return found

    def without_folders(link: re.Match[str]) -> str:
        text, name = link.groups()
        return link.group() if "://" in name or not target(name).is_dir() else text

    def place(link: re.Match[str]) -> str:
        name, anchor = link.group(1), link.group(2) or ""
        if not name or "://" in name or name.startswith("mailto:"):
            return link.group()
        found = target(name)
        if found in known:
            return known[found] + anchor
        if found.is_relative_to(DOCS):
            return found.relative_to(DOCS).as_posix()
        copy = Path("files") / f"{found.relative_to(ROOT)}.txt"  # a browser shows it instead of saving it
        (folder / copy).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(found, folder / copy)
        return copy.as_posix()

    return LINK.sub(place, LINKED_TEXT.sub(without_folders, page.read_text(encoding="utf-8")))


def navigation(generated: Mapping[str, str]) -> list[dict[str, Any]]:
    """The sections and pages of docs/index.md in their order; pages that it does not name come last.

    generated: place → title of the pages that are made from the code; they go into the section Reference."""
    found: list[dict[str, Any]] = [{"Home": "index.md"}]
    listed = {DOCS / "index.md", ROOT / "README.md"}
    entries: list[dict[str, str]] = []
    for heading, title, name in SECTION.findall((DOCS / "index.md").read_text(encoding="utf-8")):
        if heading:
            entries = [{title: place} for place, title in generated.items()] if heading == "Reference" else []
            found.append({heading: entries})
            continue
        page = (DOCS / name).resolve()
        listed.add(page)
        if page in pages() and page != ROOT / "README.md":
            entries.append({title: pages()[page]})
    found = [section for section in found if list(section.values()) != [[]]]
    more = [place for page, place in pages().items() if page not in listed]
    return [*found, *([{"More": more}] if more else [])]


def build(site: Path) -> None:
    """Builds into `site`. Raises CalledProcessError if a link or an anchor is broken."""
    with tempfile.TemporaryDirectory(prefix="tune_ssim_docs_") as work:
        source = Path(work) / "docs"
        shutil.copytree(DOCS / "images", source / "images")
        shutil.copy(HERE / "site.css", source / "site.css")
        for page, place in pages().items():
            (source / place).write_text(staged(page, source), encoding="utf-8")
        generated = reference_pages()
        (source / "reference").mkdir()
        for place, (_, text) in generated.items():
            (source / place).write_text(text, encoding="utf-8")
        titles = {place: title for place, (title, _) in generated.items()}
        config = YAML(typ="safe").load(HERE / "mkdocs.yml")
        config |= {"docs_dir": "docs", "site_dir": "site", "nav": navigation(titles)}
        (Path(work) / "mkdocs.yml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
        subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=work, check=True)
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(Path(work) / "site", site)


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "site"))
