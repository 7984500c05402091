"""The command line as a user meets it: exit codes, stdout and stderr."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from small_studies import SETTING, USUAL, baseline, study, trial

from tune_ssim.cli.app import exit_code
from tune_ssim.cli.options import ChosenStudy
from tune_ssim.cli.tables import trials_table

COMMAND = [sys.executable, "-m", "tune_ssim"]
VERBS = ("run", "check", "trials", "export", "ui", "spaces", "mirror")


def tune_ssim(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A verb in a copy of this process, which has imported everything. With `environment`, in a process of its own."""
    words = list(map(str, arguments))
    own = {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "TUNE_SSIM_STORAGE": str(cwd), **environment}
    if environment or COMMAND[1:] != ["-m", "tune_ssim"]:
        return subprocess.run(
            [*COMMAND, *words],
            cwd=cwd,
            env={**os.environ, **own},
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=120,
            check=False,
        )
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        if (pid := os.fork()) == 0:
            code = 70
            try:
                os.chdir(cwd)
                os.environ.update(own)
                sys.stdout, sys.stderr = _to(1, output.fileno()), _to(2, errors.fileno())
                code = exit_code(words)
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(words, code, output.read().decode(), errors.read().decode())


def _to(stream: int, file: int) -> io.TextIOWrapper:
    os.dup2(file, stream)
    return io.TextIOWrapper(os.fdopen(stream, "wb", closefd=False), encoding="utf-8", line_buffering=stream == 2)


def mistake(done: subprocess.CompletedProcess[str], *said: str, code: int = 2) -> None:
    """One line on stderr that holds `said`, nothing on stdout."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for words in said:
        assert words in lines[0]


def test_the_next_command_is_of_the_same_study(tmp_path: Path) -> None:
    chosen = ChosenStudy("s.yaml", tmp_path, fresh=False, space="note_v3", seed=0, address="127.0.0.1:6379")
    assert chosen.arguments == ["s.yaml", "--space", "note_v3", "--seed", "0", "--address", "127.0.0.1:6379"]
    assert ChosenStudy(None, tmp_path, fresh=False, space=None, seed=None, address=None).arguments == []


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)])
def test_help_loads_nothing_heavy(tmp_path: Path, arguments: list[str]) -> None:
    code = """
import sys
from tune_ssim.cli.app import exit_code
code = exit_code(sys.argv[1:])
heavy = {"torch", "ray", "mlflow", "optuna", "numpy", "rich", "pydantic", "ruamel", "ruamel.yaml"} & sys.modules.keys()
assert not heavy, heavy
sys.exit(code)
"""
    source = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=source, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "tune-ssim" in done.stdout


def test_every_verb_and_the_exit_codes_are_in_the_help(tmp_path: Path) -> None:
    text = tune_ssim("--help", cwd=tmp_path).stdout
    for verb in VERBS:
        assert f"\n  {verb} " in text
    for code in ("0 ", "2 ", "3 ", "1 ", "130 "):
        assert f"\n    {code}" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trails"], "unknown verb 'trails'; did you mean 'trials'?"),
        (["run", "--trails", "3"], "--trails"),
        (["run", "--trials", "0"], "0 is not in the range"),
        (["run", "--trials", "many"], "'many' is not a valid integer"),
        (["run", "--seed", "-1"], "--seed"),
        (["export", "--format", "xml"], "'xml' is not one of"),
        (["export", "a", "b"], "unexpected extra argument"),
        (["trials"], "no study in"),
        (["export"], "no study in"),
        (["ui"], "no study in"),
        (["mirror"], "no study in"),
        (["run", "--resume"], "no study in"),
        (["spaces", "wid"], "did you mean 'wide'?"),
        (["spaces", "nowhere.yaml"], "no such file"),
        (["run", "--storage-path", "/dev/null"], "/dev/null: a file, not a folder"),
        (["trials", "--storage-path"], "--storage-path"),
    ],
)
def test_mistakes_before_any_study(tmp_path: Path, arguments: list[str], said: str) -> None:
    mistake(tune_ssim(*arguments, cwd=tmp_path), said)
    assert list(tmp_path.iterdir()) == []  # nothing is left behind, no traceback either


@pytest.mark.parametrize("name", ["fundus", "../x", "", "a\nb", "\x1b[31mred", "-", "ü", "$(touch x)"])
def test_a_name_that_is_not_there(tmp_path: Path, name: str) -> None:
    study(tmp_path, *USUAL)
    mistake(tune_ssim("trials", "--", name, cwd=tmp_path), "there are: fundus-ssim")


def test_trials_json_is_the_documented_schema(tmp_path: Path) -> None:
    study(tmp_path, *USUAL)
    done = tune_ssim("trials", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trials = json.loads(done.stdout, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert trials == [summary.to_dict() for summary in USUAL]
    assert all(list(one) == documented_fields() for one in trials)
    assert done.stderr == "next: tune-ssim export fundus-ssim  # writes the best safe setting\n"


def documented_fields() -> list[str]:
    """The fields in the first table of docs/trials_schema.md."""
    text = (Path(__file__).resolve().parents[1] / "docs" / "trials_schema.md").read_text(encoding="utf-8")
    first = text.split("\n## ")[0]
    return [line.split("`")[1] for line in first.splitlines() if line.startswith("| `")]


def test_trials_of_a_study_that_has_just_begun(tmp_path: Path) -> None:
    study(tmp_path)
    assert json.loads(tune_ssim("trials", "--json", cwd=tmp_path).stdout) == []
    assert "no trial has ended yet" in tune_ssim("trials", cwd=tmp_path).stdout


def test_the_latest_study_is_meant_and_the_storage_path_is_repeated(tmp_path: Path) -> None:
    folder = tmp_path / "here it is"
    study(folder, trial("old"), name="a")
    later = study(folder, trial("new"), name="b")
    os.utime(later.study_file, (time.time() + 5, time.time() + 5))
    done = tune_ssim("trials", "--json", "--storage-path", folder, cwd=tmp_path)
    assert [summary["trial_id"] for summary in json.loads(done.stdout)] == ["new"]
    assert f"tune-ssim export b --storage-path '{folder}'" in done.stderr


@pytest.mark.parametrize(
    ("columns", "encoding"), [("40", "utf-8"), ("40", "ascii"), ("80", "ascii"), ("80", "utf-8"), ("132", "latin-1")]
)
def test_the_table_in_any_terminal(tmp_path: Path, columns: str, encoding: str) -> None:
    folder = study(tmp_path, *USUAL, trial("x[/red]", "error", None, reason="\x1b[31m≥ 3 × [bold]\n\tübel", metrics={}))
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": columns}
    done = subprocess.run(
        [*COMMAND, "trials", "--storage-path", str(folder.path.parent)],
        cwd=Path(__file__).resolve().parents[1],
        env=environment,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode(encoding)
    assert "\x1b" not in text  # no colour in a pipe, and none from a trial's reason
    flat = " ".join(text.split())
    assert flat.index("00004") < flat.index("00002") < flat.index("00005") < flat.index("00003") < flat.index("x[/red]")
    for verdict in ("safe", "degraded", "pruned", "error"):
        assert verdict in flat  # a word, never a colour alone
    lines = [line for line in text.splitlines() if not line.startswith("next:")]
    if int(columns) >= 80:
        assert max(map(len, lines)) <= int(columns)


def test_the_table_after_a_long_study_is_short() -> None:
    """`run` shows the best trials; `trials` shows all."""
    assert trials_table(USUAL).row_count == len(USUAL)
    assert trials_table(USUAL, most=2).row_count == 2


def test_no_color(tmp_path: Path) -> None:
    study(tmp_path, *USUAL)
    assert "\x1b[32m" in tune_ssim("trials", cwd=tmp_path, FORCE_COLOR="1", TERM="xterm").stdout
    assert "\x1b[32m" not in tune_ssim("trials", cwd=tmp_path, FORCE_COLOR="1", TERM="xterm", NO_COLOR="1").stdout


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_export_of_a_document(tmp_path: Path, form: str) -> None:
    study(tmp_path, *USUAL)
    mistake(tune_ssim("export", "--format", form, "-o", "best", cwd=tmp_path), "00004 is unproven: it was not confirmed")
    assert not (tmp_path / "best").exists()
    done = tune_ssim("export", "--format", form, "--unproven", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    exported = YAML(typ="safe", pure=True).load(done.stdout) if form == "yaml" else json.loads(done.stdout)
    assert exported["config"] == SETTING
    assert exported["trial_id"] == "00004"
    assert len(exported["proof"]["unproven"]) == 2 and exported["proof"]["confirmed"] is False
    warning, following = done.stderr.splitlines()
    assert warning.startswith("warning: ") and following.startswith("next: tune-ssim ")

    written = tune_ssim("export", "fundus-ssim", "--format", form, "--unproven", "-o", "best", cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    assert (tmp_path / "best").read_text(encoding="utf-8") == done.stdout
    assert written.stdout.startswith("wrote best\nnext: tune-ssim ")


def test_export_env_and_args(tmp_path: Path) -> None:
    study(tmp_path, *USUAL)
    comment, *env = tune_ssim("export", "--format", "env", "--unproven", cwd=tmp_path).stdout.splitlines()
    assert comment.startswith("# UNPROVEN: it was not confirmed")
    assert env[:3] == ["SSIM_LOSS_WEIGHT=30.0", "SSIM_LOSS_MAX_T=0.3", "SSIM_GRAD_SCALE=1.0"]
    assert env[3].startswith("EXP_NAME=fundus-ssim-00004-")
    assert len(env) == 4
    args = tune_ssim("export", "--format", "args", "--unproven", cwd=tmp_path).stdout
    assert args == "--ssim_loss_weight 30.0 --ssim_loss_max_t 0.3 --ssim_grad_scale 1.0\n"


@pytest.mark.parametrize(
    ("trials", "said"),
    [
        ((), "no trial of the search has ended"),
        ((baseline(), trial("7", "pruned", "NaN"), trial("8", "degraded")), "1 pruned, 1 degraded; nearest miss 8"),
        ((trial("a", delta_ssim=-0.1),), "no setting beats the baseline"),
    ],
)
def test_no_safe_trial(tmp_path: Path, trials: Any, said: str) -> None:
    study(tmp_path, *trials)
    mistake(tune_ssim("export", "--format", "env", "-o", tmp_path / "out", cwd=tmp_path), said)
    assert not (tmp_path / "out").exists()


def test_export_never_leaves_half_a_file(tmp_path: Path) -> None:
    study(tmp_path, *USUAL)
    (tmp_path / "folder").mkdir()
    (tmp_path / "old").write_text("kept")
    mistake(tune_ssim("export", "-o", "folder", cwd=tmp_path), "folder: a folder")
    mistake(tune_ssim("export", "-o", "none/x", cwd=tmp_path), "there is no folder none")
    mistake(tune_ssim("export", "-o", "old/x", cwd=tmp_path), "there is no folder old")
    mistake(tune_ssim("export", "-o", "/dev/null", cwd=tmp_path), "not a regular file")
    mistake(tune_ssim("export", "nobody", "-o", "old", cwd=tmp_path), "no study 'nobody'")
    assert (tmp_path / "old").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "fundus-ssim", "old"]


def test_spaces(tmp_path: Path) -> None:
    listed = json.loads(tune_ssim("spaces", "--json", cwd=tmp_path).stdout)
    assert {"note_v2", "note_v3", "wide"} <= {space["name"] for space in listed}
    route = json.loads(tune_ssim("spaces", "note_v3", "--json", cwd=tmp_path).stdout)
    assert [stage["name"] for stage in route["stages"]] == ["conservative", "moderate", "assertive", "aggressive"]
    for name in ("", "wide", "note_v3:conservative"):
        done = tune_ssim("spaces", *filter(None, [name]), cwd=tmp_path, PYTHONIOENCODING="ascii", COLUMNS="80")
        assert done.returncode == 0, done.stderr
        assert "next: tune-ssim " in done.stdout


@pytest.mark.parametrize("verb", [["trials", "--json"], ["trials"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves(tmp_path: Path, verb: list[str], unbuffered: str) -> None:
    """`| head -1`: silent, and not an error of anybody's."""
    study(tmp_path, *(trial(f"{index:05d}") for index in range(1000)))
    writer = subprocess.Popen(
        [*COMMAND, *verb, "--storage-path", str(tmp_path)],
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert writer.stdout is not None and writer.stderr is not None
    assert len(writer.stdout.read(10)) == 10
    writer.stdout.close()
    error = writer.stderr.read()
    writer.stderr.close()
    assert writer.wait(60) == 141
    assert error == b""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    study(tmp_path, *USUAL)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    mistake(tune_ssim("export", "-o", closed / "x", cwd=tmp_path), "Permission denied")


def test_a_bug_of_ours_is_said_to_be_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The traceback goes into a file, and to the screen when asked."""
    code = (
        "import tune_ssim.results.winner as w; from tune_ssim.cli.app import main; w.best_safe = lambda _: int('x ' * 9999); main()"
    )
    monkeypatch.setitem(globals(), "COMMAND", [sys.executable, "-c", code])
    study(tmp_path, *USUAL)
    done = tune_ssim("export", cwd=tmp_path)
    mistake(done, "a bug of tune-ssim", "ValueError: invalid literal", code=1)
    assert len(done.stderr) < 1000
    file = Path(done.stderr.split("traceback in ")[1].strip())
    assert file.parent == tmp_path
    assert "Traceback (most recent call last)" in file.read_text(encoding="utf-8")

    loud = tune_ssim("export", cwd=tmp_path, TUNE_SSIM_DEBUG="1")
    assert loud.returncode == 1
    assert "Traceback (most recent call last)" in loud.stderr
    assert loud.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("when", ["w.best_safe = press", "w.best_safe = int; output.fail = app.fail = press_once"])
def test_ctrl_c(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a verb, and while it reports an error."""
    code = f"""
import signal, sys, time
import tune_ssim.cli.app as app, tune_ssim.cli.exit_codes as output, tune_ssim.results.winner as w
fail = app.fail
def press(*_):
    signal.raise_signal(signal.SIGINT)
    time.sleep(60)
def press_once(*_):
    output.fail = app.fail = fail
    press()
{when}
app.main(sys.argv[1:])
"""
    monkeypatch.setitem(globals(), "COMMAND", [sys.executable, "-c", code])
    study(tmp_path, *USUAL)
    done = tune_ssim("export", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


def test_dry_run_prints_a_study_that_resolves_to_itself(tmp_path: Path) -> None:
    done = tune_ssim("run", "--dry-run", "--trials", "3", "--seed", "7", "--space", "note_v3:conservative", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    resolved = YAML(typ="safe", pure=True).load(done.stdout)
    assert (resolved["search"]["trials"], resolved["search"]["seed"]) == (3, 7)
    assert resolved["space"]["name"] == "note_v3:conservative"
    assert "next: tune-ssim run --space note_v3:conservative --trials 3 --seed 7 " in done.stderr

    (tmp_path / "again.yaml").write_text(done.stdout, encoding="utf-8")
    again = tune_ssim("run", "again.yaml", "--dry-run", cwd=tmp_path)
    assert again.stdout == done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["again.yaml"]  # nothing was started


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "study.yaml"),
        (b"name: [\n", "study.yaml:"),
        (b"\x89PNG\r\n\x1a\n\x00\x01", "study.yaml"),
        (b"name: x\nspaec: wide\n", "study.yaml:2: unknown key 'spaec'; did you mean 'space'?"),
        (b"name: x\nspace: wid\n", "did you mean 'wide'?"),
        (b"name: x\nspace: wide\nsearch: {trials: many}\n", "study.yaml:3:"),
        (b"name: x\nspace: wide\ntask: nobody:Task\n", "nobody"),
    ],
)
def test_a_bad_study_file(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "study.yaml").write_bytes(content)
    mistake(tune_ssim("run", "study.yaml", cwd=tmp_path), said)
    mistake(tune_ssim("run", "missing.yaml", "--dry-run", cwd=tmp_path), "missing.yaml")
