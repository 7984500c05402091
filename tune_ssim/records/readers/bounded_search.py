"""Regular expressions of other people, in bounded time: some need years for one line."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# A pattern sees this many characters of a line: what a bad one needs may grow with a power of the length.
MAX_PATTERN_TEXT = 10_000
# And it gets this much CPU time for a line, against an exponential one. A search of a line takes a millionth of that.
LINE_LIMIT_S = 2.0
SLOW_LINES = 3  # after so many that took too long a pattern is not asked again


class BoundedSearch:
    """`search` many lines at once. Time is bounded in the main thread only (a signal ends the search), and only
    where nobody else uses SIGVTALRM."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self.pattern = pattern
        self.slow: list[int] = []  # of the last search: the lines that took too long
        self._slow_lines = 0

    @property
    def given_up(self) -> bool:
        return self._slow_lines >= SLOW_LINES

    def search(self, lines: list[str]) -> list[re.Match[str] | None]:
        """A match or None for each line."""
        self.slow = []
        try:
            with cpu_limit(LINE_LIMIT_S):
                return list(map(self.pattern.search, lines))
        except _TooLong:
            return [self._search_one(line, at) for at, line in enumerate(lines)]

    def _search_one(self, line: str, at: int) -> re.Match[str] | None:
        if self.given_up:
            return None
        try:
            with cpu_limit(LINE_LIMIT_S):
                return self.pattern.search(line)
        except _TooLong:
            self._slow_lines += 1
            self.slow.append(at)
            return None


class _TooLong(Exception):
    pass


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raises _TooLong in the body once the process has used so much CPU time. `re` looks for signals while it searches."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGVTALRM) is signal.SIG_DFL
    if not mine:
        yield
        return
    signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
