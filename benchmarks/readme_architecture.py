"""Draws docs/images/architecture.svg: the rooms of the package in order, and which room imports which.

    python benchmarks/readme_architecture.py

Everything in the picture is read from the code: the purpose of a room is the first line of its docstring, a dot is an import
that tests/test_imports.py finds. Needs the extra `test`.
"""

from __future__ import annotations

import ast
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from test_imports import PACKAGE, ROOMS, arrows, modules  # noqa: E402

PICTURE = ROOT / "docs" / "images" / "architecture.svg"
ROW, NAMES, PURPOSES, TOP = 30, 16, 150, 130  # pixels
GRID = 800  # where the dots begin


def purpose(room: str) -> str:
    """The first sentence of the room's docstring."""
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))) or ""
    return text.split("\n")[0].replace("`", "")


def draw() -> str:
    found = {(above, below) for above, below, _ in arrows(modules())}
    rooms = ROOMS[::-1]  # the command line first, as a reader meets it
    width, height = GRID + ROW * len(rooms) + 20, TOP + ROW * len(rooms) + 20
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="14">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{NAMES}" y="30" font-size="18">The rooms of tune_ssim: a room imports only from rooms below it</text>',
        f'<text x="{NAMES}" y="54" fill="#555">A dot: the room of the row imports the room of the column. '
        f"{len(found)} of {len(rooms) * (len(rooms) - 1) // 2} possible.</text>",
    ]
    for index, room in enumerate(rooms):
        y, x = TOP + ROW * index, GRID + ROW * index
        if index % 2 == 0:
            lines.append(f'<rect x="0" y="{y}" width="{width}" height="{ROW}" fill="#f2f5f9"/>')
        lines.append(f'<text x="{NAMES}" y="{y + 20}" font-weight="bold">{room}</text>')
        lines.append(f'<text x="{PURPOSES}" y="{y + 20}" font-size="12" fill="#333">{escape(shorten(purpose(room)))}</text>')
        lines.append(f'<text transform="translate({x + 20} {TOP - 8}) rotate(-60)" font-size="12">{room}</text>')
        lines.append(f'<rect x="{x + 9}" y="{y + 9}" width="12" height="12" fill="#c8d2de"/>')
        for column, other in enumerate(rooms):
            if (room, other) in found:
                lines.append(f'<circle cx="{GRID + ROW * column + 15}" cy="{y + 15}" r="6" fill="#2a6496"/>')
    return "\n".join([*lines, "</svg>", ""])


def shorten(text: str, longest: int = 102) -> str:
    return text if len(text) <= longest else text[: longest - 1].rstrip(" ,") + "…"


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    print(f"wrote {PICTURE.relative_to(ROOT)}")
