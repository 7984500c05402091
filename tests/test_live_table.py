"""The live table on a real terminal (a pseudo-terminal) and in a pipe."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

from rich.console import Console
from small_studies import SETTING, USUAL, trial

from tune_ssim.cli.live_table import LiveTable

SCRIPT = """
import sys, time
sys.path.insert(0, "tests")
from small_studies import SETTING, USUAL
from tune_ssim.cli.live_table import LiveTable
from rich.console import Console
with LiveTable(6, Console()) as table:
    table.phase("search")
    table.trial_started("00009", SETTING)
    table.trial_progress("00009", 57, 200, norm_ratio=2.25, smoke="passed")
    for summary in USUAL:
        table.trial_ended(summary)
    time.sleep(0.8)  # two or three redraws
print("after")
"""


def in_a_pipe(width: int = 80) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=width), text


def test_a_pipe_gets_one_whole_line_a_trial() -> None:
    console, text = in_a_pipe()
    with LiveTable(6, console) as table:
        table.phase("baseline")
        for summary in USUAL:
            table.trial_started(summary.trial_id, summary.config)
            for step in range(500):
                table.trial_progress(summary.trial_id, step, 500, norm_ratio=1.0)
            table.trial_ended(summary)
    lines = text.getvalue().splitlines()
    assert lines[0] == "baseline"
    assert lines[3] == " 3/6 safe      00002  gain 10 @ 0.3  ΔSSIM +0.0065  safe to step 200, batch 8, lr 0.005"
    assert lines[4] == " 4/6 pruned    00003  gain 1000 @ 0.3  total_norm is 32 times the baseline's over steps 1-10"
    assert lines[1] == " 1/6 safe      baseline-0  baseline  safe to step 200, batch 8, lr 0.005"
    assert len(lines) == 1 + len(USUAL)


def test_text_from_elsewhere_stays_one_line_and_no_markup() -> None:
    console, text = in_a_pipe()
    with LiveTable(None, console) as table:
        table.phase("[red]a\nb\x1b[31m")
        table.trial_started("[/bold]", "x\ny")
        table.trial_ended(trial("[/bold]", "stopped", None, reason="first\nsecond \x1b[2J", metrics={}))
        table.trial_ended(trial("unknown before"))
    lines = text.getvalue().splitlines()
    assert lines[0] == "[red]a b [31m"
    assert lines[1].endswith("[/bold]  gain 30 @ 0.3  first second  [2J")
    assert len(lines) == 3
    assert "\x1b" not in text.getvalue()


def test_ascii_terminals() -> None:
    buffer = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with LiveTable(2, Console(file=buffer)) as table:
        table.trial_ended(trial("a", reason="ratio ≥ 10 × ü"))
    buffer.flush()
    assert b"dSSIM +0.0050  ratio >= 10 x ?" in buffer.buffer.getvalue()  # type: ignore[attr-defined]


def on_a_terminal(**environment: str) -> str:
    """What a terminal of 120 columns receives."""
    parent, child = pty.openpty()
    source = Path(__file__).resolve().parents[1]
    plain = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    done = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=source,
        stdout=child,
        stderr=child,
        env={**plain, "TERM": "xterm", "COLUMNS": "120", "LINES": "30", "PYTHONIOENCODING": "utf-8", **environment},
    )
    os.close(child)
    received = b""
    try:
        while chunk := os.read(parent, 65536):
            received += chunk
    except OSError:  # EIO: the other end has closed
        pass
    os.close(parent)
    assert done.wait(60) == 0, received
    return received.decode()


def test_a_terminal_sees_the_running_trials_and_keeps_the_lines() -> None:
    text = on_a_terminal()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "search: 6 of 6 trials done" in plain
    running = next(line for line in plain.splitlines() if "57/200" in line)
    assert "00009" in running and "gain 30 @ 0.3" in running and "norm 2.25x" in running and "smoke passed" in running
    assert "4/6 pruned    00003" in plain
    assert "\x1b[31m" in text  # red, beside the word
    assert "\x1b[?25l" in text and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor comes back
    assert plain.rstrip().endswith("after")
    assert "\x1b[31m" not in on_a_terminal(NO_COLOR="1")


def test_a_dumb_terminal_gets_the_lines_only() -> None:
    text = on_a_terminal(TERM="dumb")
    assert "\x1b" not in text
    assert "pruned" in text and "57/200" not in text


def test_the_terminal_is_given_back_when_the_study_fails() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100)
    try:
        with LiveTable(1, console) as table:
            table.trial_started("a", SETTING)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert text.getvalue().rindex("\x1b[?25h") > text.getvalue().rindex("\x1b[?25l")


def test_calls_from_several_threads() -> None:
    text = io.StringIO()
    with LiveTable(40, Console(file=text, force_terminal=True, width=100)) as table:

        def run(prefix: int) -> None:
            for index in range(10):
                name = f"{prefix}-{index}"
                table.trial_started(name, SETTING)
                for step in range(200):
                    table.trial_progress(name, step, 200, norm_ratio=float("nan"))
                table.trial_ended(trial(name))

        threads = [threading.Thread(target=run, args=(prefix,)) for prefix in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert text.getvalue().count("40/40") >= 1
    assert all(f"{prefix}-{index}" in text.getvalue() for prefix in range(4) for index in range(10))
