"""The study's folder survives kill -9: no torn file, and a torn line swallows nothing."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_studies import baseline, trial

from tune_ssim.base.errors import UserError
from tune_ssim.base.files import append_line, check_name, jsonable, number, parse_lines, read_lines, write_atomically
from tune_ssim.orchestration.progress import NoProgress
from tune_ssim.orchestration.recorder import StudyRecorder
from tune_ssim.results import study_folder
from tune_ssim.results.events import EventWriter
from tune_ssim.results.study_folder import DEFAULT_STORAGE, STORAGE_VARIABLE, StudyFolder, find_study, storage_path
from tune_ssim.trials.trial_run import TrialResult

ROOT = Path(__file__).parents[1]


class Child:
    """A real process that runs `code` with `tune_ssim` on its path, and prints once it is under way."""

    def __init__(self, code: str, *arguments: Any) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)

    def kill_after(self, delay_s: float) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"
        time.sleep(delay_s)
        self.process.send_signal(signal.SIGKILL)
        assert self.process.wait() == -signal.SIGKILL
        self.process.stdout.close()

    def join(self) -> None:
        self.process.communicate(timeout=60)
        assert self.process.returncode == 0


REWRITE = """
    import sys
    from pathlib import Path
    from tune_ssim.base.files import write_atomically

    print("ready", flush=True)
    count = 0
    while True:
        count += 1
        write_atomically(Path(sys.argv[1]), str(count % 10).encode() * (1 << 20))
"""
APPEND = """
    import sys
    from pathlib import Path
    from tune_ssim.base.files import append_line

    print("ready", flush=True)
    count = int(sys.argv[3])
    while count:
        append_line(Path(sys.argv[1]), {"writer": sys.argv[2], "count": count, "padding": "x" * 20_000})
        count -= 1
"""


@pytest.mark.parametrize("delay_s", [0.001, 0.013, 0.04])
def test_a_file_is_whole_after_kill(tmp_path: Path, delay_s: float) -> None:
    file = tmp_path / "baseline.json"
    write_atomically(file, b"0" * (1 << 20))
    Child(REWRITE, file).kill_after(delay_s)
    content = file.read_bytes()
    assert len(content) == 1 << 20
    assert len(set(content)) == 1
    write_atomically(file, b"after")  # whatever the killed process left behind is not in the way
    assert file.read_bytes() == b"after"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a"
    write_atomically(file, b"old")
    with pytest.raises(TypeError):
        write_atomically(file, "text")  # type: ignore[arg-type]
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_others_may_read_what_was_written(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("delay_s", [0.001, 0.01, 0.03])
def test_lines_are_whole_after_kill(tmp_path: Path, delay_s: float) -> None:
    file = tmp_path / "events.jsonl"
    Child(APPEND, file, "first", 10**9).kill_after(delay_s)
    append_line(file, {"writer": "second"})
    lines = list(read_lines(file))
    assert lines[-1] == {"writer": "second"}
    counts = [line["count"] for line in lines[:-1]]
    assert counts == list(range(10**9, 10**9 - len(counts), -1))


def test_several_processes_append_to_one_file(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    for child in [Child(APPEND, file, name, 40) for name in ("a", "b", "c")]:
        child.join()
    for name in ("a", "b", "c"):
        assert [line["count"] for line in read_lines(file) if line["writer"] == name] == list(range(40, 0, -1))


@settings(deadline=None, max_examples=40)
@given(cut=st.integers(0, 80), zeros=st.integers(0, 3))
def test_a_torn_line_does_not_swallow_the_next(tmp_path_factory: pytest.TempPathFactory, cut: int, zeros: int) -> None:
    """`zeros`: some file systems leave them at the end of a file after a power failure."""
    file = tmp_path_factory.mktemp("torn") / "trials.jsonl"
    append_line(file, {"n": 1})
    whole = file.stat().st_size
    append_line(file, {"n": 2, "reason": "é ruined \n é", "metrics": {"ssim": math.nan}})
    file.write_bytes(file.read_bytes()[: whole + cut] + b"\0" * zeros)
    append_line(file, {"n": 3})
    append_line(file, {"n": 4})
    found = [line["n"] for line in read_lines(file)]
    assert found in ([1, 3, 4], [1, 2, 3, 4])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


GARBAGE = [
    b"\xff\xfe\x00{", b"null\n", b"[1]\n", b"3\n", b"{]\n", b'"text"\n', b"plain words", b"[" * 100_000,
    b'{"trial_id": a}\n', b'{"trial_id": "a",}\n', b'{"a": 1} {"b": 2}\n', b'{"n": ' + b"1" * 5000 + b"}\n",
]  # fmt: skip


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_line_that_is_no_object_is_an_error_with_its_place(tmp_path: Path, garbage: bytes) -> None:
    file = tmp_path / "a.jsonl"
    append_line(file, {"n": 1})
    file.write_bytes(file.read_bytes() + garbage)
    with pytest.raises(UserError, match=r"a\.jsonl:2: not (JSON|a JSON object)") as caught:
        list(read_lines(file))
    assert len(str(caught.value)) < 500


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(), JSON, min_size=1, max_size=4), st.data())
def test_a_line_may_be_cut_anywhere(tmp_path_factory: pytest.TempPathFactory, value: dict[str, Any], data: st.DataObject) -> None:
    file = tmp_path_factory.mktemp("cut") / "a.jsonl"
    append_line(file, value)
    whole = file.read_bytes()
    file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 2))])
    assert list(read_lines(file)) == []
    append_line(file, {"n": 2})
    assert list(read_lines(file)) == [{"n": 2}]


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    """The process may write 4 kB to a file: the kernel then writes a part of the line, as on a full disk."""
    code = """
        import resource, signal, sys
        from pathlib import Path
        from tune_ssim.base.files import append_line

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            append_line(Path(sys.argv[1]), {"padding": "x" * 10_000})
        except OSError:
            sys.exit(0)
        sys.exit("a torn line was written without a word")
    """
    Child(code, tmp_path / "a.jsonl").join()
    assert list(read_lines(tmp_path / "a.jsonl")) == []


def test_no_file_has_no_lines(tmp_path: Path) -> None:
    assert list(read_lines(tmp_path / "absent.jsonl")) == []


@settings(max_examples=40)
@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_anything_made_of_json_values_is_strict_json(value: dict[str, Any]) -> None:
    text = json.dumps(jsonable(value), allow_nan=False)
    assert json.loads(text) == jsonable(value)
    assert jsonable(json.loads(text)) == jsonable(value)


@given(st.floats())
def test_numbers_come_back(value: float) -> None:
    back = number(json.loads(json.dumps(jsonable(value), allow_nan=False)))
    assert back == value or (math.isnan(back) and math.isnan(value))


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ((1, (2.0,)), [1, [2.0]]),
        ({3: Path("/a/b")}, {"3": "/a/b"}),
        ([math.nan, math.inf, -math.inf], ["NaN", "Infinity", "-Infinity"]),
        ([True, None, 1], [True, None, 1]),
        # a user's evaluation returns NumPy's scalars
        ([np.float32(0.5), np.float64(0.5), np.int64(3), np.float32("nan")], [0.5, 0.5, 3, "NaN"]),
    ],
)
def test_jsonable(value: Any, plain: Any) -> None:
    found = jsonable(value)
    assert found == plain
    assert json.loads(json.dumps(found, allow_nan=False)) == plain


@pytest.mark.parametrize("first", ["safe", "degraded", "pruned", "bad_setup", "stopped", "error"])
def test_the_first_verdict_of_a_trial_is_final(tmp_path: Path, first: str) -> None:
    folder = StudyFolder(tmp_path / "study").create()
    assert folder.trials() == []
    assert folder.add_trial(trial("a", first)) and folder.add_trial(trial("b"))
    for second in ("bad_setup", "safe", "error"):
        assert not folder.add_trial(trial("a", second, reason="another"))
    assert [(one.trial_id, one.verdict) for one in folder.trials()] == [("a", first), ("b", "safe")]
    # An earlier version wrote the second line.
    append_line(folder.trials_file, trial("a", "bad_setup", reason="another").to_dict())
    assert folder.trials()[0].reason == trial("a", first).reason


def test_the_verdicts_of_earlier_trials_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading them after every trial made a trial of a long study cost more than one of a short study."""
    folder = StudyFolder(tmp_path / "study").create()
    folder.add_trial(trial("earlier"))
    reads: list[str] = []
    monkeypatch.setattr(study_folder, "parse_lines", lambda path, *rest: reads.append(path.name) or parse_lines(path, *rest))
    recorder = StudyRecorder(EventWriter(folder), NoProgress(), steps=200)
    for name in ("a", "b", "earlier"):
        recorder.trial_ended(TrialResult(trial(name, "pruned")))
    assert reads.count("trials.jsonl") == 1
    assert [(one.trial_id, one.verdict) for one in folder.trials()] == [("earlier", "safe"), ("a", "pruned"), ("b", "pruned")]


def test_a_trial_whose_process_died_has_no_verdict_yet(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "study").create()
    died = trial("a", "error", reason="the trial's process died: the node is gone")
    assert folder.add_trial(died) and folder.add_trial(trial("b"))
    assert folder.trials()[0] == died
    assert folder.add_trial(trial("a", "pruned")) and not folder.add_trial(died)
    assert [(one.trial_id, one.verdict) for one in folder.trials()] == [("a", "pruned"), ("b", "safe")]


def test_a_baseline_that_could_not_run_is_run_again(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "study").create()
    assert folder.add_trial(trial("baseline-0", "error", role="baseline"))
    assert folder.add_trial(baseline("baseline-0"))
    assert [one.verdict for one in folder.trials()] == ["safe"]


def test_the_folder_and_its_files(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "deep" / "study").create().create()  # a second time it is there already
    assert folder.name == "study"
    assert folder.write_image("00001", 25, b"png").relative_to(folder.path) == Path("images/00001/smoke_000025.png")
    folder.add_event({"event": "study", "value": math.inf})
    assert list(folder.events()) == [{"event": "study", "value": "Infinity"}]


def test_the_latest_study_is_the_one_meant(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tune-ssim run"):
        find_study(tmp_path / "absent", None)
    for index, name in enumerate(("older", "newer")):
        folder = StudyFolder(tmp_path / name).create()
        folder.study_file.write_text("name: x\n")
        os.utime(folder.study_file, (index, index))
    (tmp_path / "no_study_here").mkdir()
    assert find_study(tmp_path, None).name == "newer"
    assert find_study(tmp_path, "older").name == "older"
    with pytest.raises(UserError, match=r"no study 'oldest' in .*; there are: older, newer"):
        find_study(tmp_path, "oldest")


def test_storage_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(STORAGE_VARIABLE, raising=False)
    assert storage_path(None) == tmp_path / DEFAULT_STORAGE
    monkeypatch.setenv(STORAGE_VARIABLE, "~/somewhere")
    assert storage_path(None) == Path.home() / "somewhere"
    assert storage_path("here") == tmp_path / "here"


@pytest.mark.parametrize("name", ["a", "fundus-ssim", "0.1_B", "x" * 100])
def test_names_that_can_be_folders(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "-a", "a/b", "a b", "a\n", "é", "x" * 101, "../up"])
def test_names_that_cannot(name: str) -> None:
    with pytest.raises(UserError, match="letters, digits"):
        check_name(name)
