"""The progress display of a running study, for a terminal and for a pipe.

A terminal shows the running trials, redrawn at most four times a second, below one line for every trial that has ended. A pipe or
CI log gets the lines only.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tune_ssim.results.trial_text import format_number, format_setting, readable, verdict_line
from tune_ssim.trials.summary import TrialSummary

REFRESHES_PER_S = 4


@dataclass
class _Running:
    label: str
    step: int = 0
    steps: int = 0
    norm_ratio: float | None = None
    smoke: str = ""


class LiveTable:
    """A context manager. `total`: number of trials, baselines included; None if unknown.

    The methods may be called from any thread and as often as there are records: they only keep the newest numbers.
    """

    def __init__(self, total: int | None, console: Console | None = None) -> None:
        self.total = total
        self.console = console or Console()
        self._ascii = self.console.options.ascii_only
        self._lock = threading.RLock()
        self._running: dict[str, _Running] = {}
        self.ended = 0  # trials, those of an earlier start included
        self._phase = ""
        self._started_s = time.monotonic()
        self._live: Live | None = None

    def __enter__(self) -> LiveTable:
        self._started_s = time.monotonic()
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(
                get_renderable=self._picture,
                console=self.console,
                refresh_per_second=REFRESHES_PER_S,
                transient=True,  # only the lines stay on the screen
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def expect(self, total: int | None, done: int | None = None) -> None:
        """Sets the number of trials in this phase, None if unknown. `done` of them ended in an earlier start."""
        with self._lock:
            if total is not None:
                self.ended = done or 0
            self.total = total

    def phase(self, text: str) -> None:
        """Sets the current phase, e.g. "baseline" or "search: conservative"."""
        with self._lock:
            self._phase = readable(text, self._ascii)
        self._print(Text(self._phase, "bold"))

    def say(self, line: str) -> None:
        """Prints a permanent line."""
        self._print(Text(readable(line, self._ascii)))

    def trial_started(self, trial_id: str, config: Mapping[str, Any] | str) -> None:
        """`config`: the trial's settings, or a word such as "baseline"."""
        label = config if isinstance(config, str) else format_setting(config)
        with self._lock:
            self._running[trial_id] = _Running(readable(label, self._ascii))

    def trial_progress(
        self, trial_id: str, step: int, steps: int, norm_ratio: float | None = None, smoke: str | None = None
    ) -> None:
        """`step` of `steps`, 0 if it is not known. `norm_ratio` and `smoke` ("passed", "failed once") are kept until the next
        values."""
        with self._lock:
            trial = self._running.setdefault(trial_id, _Running(""))
            trial.step, trial.steps = step, steps
            if norm_ratio is not None:
                trial.norm_ratio = norm_ratio
            if smoke is not None:
                trial.smoke = readable(smoke, self._ascii)

    def trial_ended(self, summary: TrialSummary) -> None:
        with self._lock:
            self._running.pop(summary.trial_id, None)
            self.ended += 1
            count = f"{self.ended:>2}/{self.total}" if self.total else f"{self.ended:>2}"
        self._print(Text(f"{count} ") + verdict_line(summary, self._ascii))

    def _print(self, line: Text) -> None:
        # A pipe has no width, so lines are not wrapped there.
        self.console.print(line, soft_wrap=not self.console.is_terminal, highlight=False)

    def _picture(self) -> Group:
        with self._lock:
            running = [(trial_id, _Running(**vars(trial))) for trial_id, trial in self._running.items()]
            ended, phase = self.ended, self._phase
        minutes, seconds = divmod(int(time.monotonic() - self._started_s), 60)
        of_total = f" of {self.total}" if self.total else ""
        title = Text(f"{phase or 'starting'}: {ended}{of_total} trials done, {minutes}:{seconds:02d}", "bold")
        table = Table.grid(padding=(0, 2, 0, 0))
        for column in ("trial", "setting", "progress", "step", "norm ratio", "smoke test"):
            table.add_column(column, no_wrap=True)
        for trial_id, trial in running:
            table.add_row(
                Text(readable(trial_id, self._ascii)),
                Text(trial.label),
                ProgressBar(total=max(trial.steps, 1), completed=trial.step if trial.steps else 0, width=16),
                f"{trial.step}/{trial.steps}" if trial.steps else str(trial.step or "starting"),
                "" if trial.norm_ratio is None else f"norm {format_number(trial.norm_ratio, '.3g')}x",
                Text(f"smoke {trial.smoke}" if trial.smoke else ""),
            )
        return Group(title, table)
