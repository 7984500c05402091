"""A table of plain text for a terminal."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from tune_ssim.results.trial_text import readable


class PlainTable(Table):
    """A table whose cells are shown as they are: no markup, no control characters, ASCII if `ascii_only`."""

    def __init__(self, ascii_only: bool, title: str | None = None, gap: int = 1) -> None:
        super().__init__(
            title=title, title_justify="left", title_style="bold",
            box=SIMPLE_HEAD, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold",
        )  # fmt: skip
        self._ascii_only = ascii_only

    def columns_of(self, *headings: str, **look: Any) -> PlainTable:
        """Adds columns that are not wrapped."""
        for heading in headings:
            self.add_column(readable(heading, self._ascii_only), no_wrap=True, **look)
        return self

    def numbers_of(self, *headings: str) -> PlainTable:
        return self.columns_of(*headings, justify="right")

    def text_of(self, heading: str, **look: Any) -> PlainTable:
        """Adds a column of sentences, which are wrapped."""
        self.add_column(readable(heading, self._ascii_only), overflow="fold", **look)
        return self

    def add(self, *cells: str | Text, end_section: bool = False) -> None:
        texts = (cell if isinstance(cell, Text) else Text(readable(cell, self._ascii_only)) for cell in cells)
        self.add_row(*texts, end_section=end_section)
