"""Every file of a study, damaged at random: one line names it, nothing hangs, no finished trial is lost or run again unsaid.

TUNE_SSIM_CASES: cases for each file; `make chaos` takes 2,000. TUNE_SSIM_COUNTS: a file to which the counts are appended as JSON.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import LARGE, PLACES, Content, Ran, Template, command, damaged, resumed
from hypothesis import HealthCheck, Phase, given, settings

from tune_ssim.results.study_folder import StudyFolder

N_CASES = int(os.environ.get("TUNE_SSIM_CASES", "3"))
# If so, every command that reads a file sees each case, and every file is replaced by each of PLACES. Else one of them.
IS_LONG = N_CASES > 100
LOCK = b'{"host": "a", "namespace": "b", "pid": 1, "started": 3, "since": "2026-01-01T00:00:00", "token": "abc"}'
PACK = b"""name: mine
known_by: [loss]
rules:
  loss_rises:
    when: {metric: loss, trend: rising, steps: 20, by: 0.05}
    sentence: the loss rises
    cause: the learning rate is too large
    remedy: halve it
"""
SPACE = b"name: mine\nparameters:\n  gain: {log_uniform: [0.01, 3000]}\nfixed: {ssim_grad_scale: 1.0, ssim_loss_max_t: 0.3}\n"
LOG = b"".join(b'{"step": %d, "loss": %.3f, "total_norm": 1.5}\n' % (n, 1 / n) for n in range(1, 40))
CSV = b"step,loss,total_norm\n" + b"".join(b"%d,%.3f,1.5\n" % (n, 1 / n) for n in range(1, 40))
TEXT = b"".join(b"step %d loss=%.3f total_norm=1.5\n" % (n, 1 / n) for n in range(1, 40))
DOCUMENT = json.dumps({"log_history": [{"step": n, "loss": 1 / n, "total_norm": 1.5} for n in range(1, 40)]}).encode()

# Files in which a changed number is as valid as the one before: another study, other verdicts or suggestions.
CHANGEABLE = ("trials", "resolved study")

SHORT_PLACES = [put for place, put in PLACES.items() if place != LARGE]

Verb = Callable[[StudyFolder, Path], Ran]


def of_storage(*arguments: str) -> Verb:
    return lambda folder, _: command(*arguments, "--storage-path", str(folder.path.parent))


def with_file(*arguments: str) -> Verb:
    def verb(folder: StudyFolder, file: Path) -> Ran:
        names = {"FILE": str(file), "LOG": str(folder.path.parent / "log.jsonl")}
        return command(*(names.get(word, word) for word in arguments))

    return verb


TRIALS, LEDGER = of_storage("trials"), of_storage("quarantine", "list")
EXPORT = of_storage("export", "--unproven", "--format", "json")
RESUME: Verb = lambda folder, _: resumed(folder)  # noqa: E731
CHECK = with_file("check", "FILE", "--json")

# Kind of file: (its path in the storage path, the commands that read it, its content if no study has it).
KINDS: dict[str, tuple[str, tuple[Verb, ...], bytes | None]] = {
    "trials": ("small/trials.jsonl", (TRIALS, EXPORT, RESUME), None),
    "resolved study": ("small/study.yaml", (TRIALS, EXPORT, RESUME), None),
    "events": ("small/events.jsonl", (RESUME,), None),
    "skipped": ("small/skipped.jsonl", (TRIALS, RESUME), None),
    "checkpoints": ("small/checkpoints.jsonl", (RESUME,), None),
    "preflight": ("small/preflight.json", (EXPORT, RESUME), None),
    "calibration": ("small/calibration.json", (EXPORT, RESUME), None),
    "provenance": ("small/provenance.json", (EXPORT, RESUME), None),
    "start": ("small/start.json", (EXPORT, RESUME), None),
    "baseline": ("small/baseline/*.json", (RESUME,), None),
    "lock": ("small/writer.lock", (RESUME,), LOCK),
    "quarantine ledger": ("quarantine.jsonl", (LEDGER, RESUME), None),
    "kept starts": (".starts/small.json", (RESUME,), b'{"format": 1, "fingerprint": "a", "starts": []}'),
    "user's study": ("mine.yaml", (with_file("run", "FILE", "--dry-run"),), None),
    "space": ("space.yaml", (with_file("spaces", "FILE"),), SPACE),
    "rule pack": ("pack.yaml", (with_file("check", "LOG", "--rules", "FILE"),), PACK),
    "export as json": ("best.json", (with_file("verify", "FILE", "--in-process"),), None),
    "export as yaml": ("best.yaml", (with_file("verify", "FILE", "--in-process"),), None),
    "log: jsonl": ("log.jsonl", (CHECK,), LOG),
    "log: csv": ("log.csv", (CHECK,), CSV),
    "log: text": ("log.txt", (CHECK,), TEXT),
    "log: json": ("trainer_state.json", (CHECK,), DOCUMENT),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    root = tmp_path_factory.mktemp("damage")
    made = Template.make(root)
    storage = made.folder.path.parent
    (storage / "mine.yaml").write_text(made.study.to_yaml())
    for form in ("json", "yaml"):
        done = command(
            "export", "--unproven", "--format", form, "-o", str(storage / f"best.{form}"), "--storage-path", str(storage)
        )
        assert done.code == 0, done.stderr
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_file_holds(template: Template, kind: str) -> None:
    pattern, verbs, content = KINDS[kind]
    template_storage = template.folder.path.parent
    found = sorted(template_storage.glob(pattern)) if content is None else [template_storage / pattern]
    original = found[-1].read_bytes() if content is None and found else content or b""
    relative = found[-1].relative_to(template_storage) if found else Path(pattern)
    counts: Counter[str] = Counter()

    def case(put: Callable[[Path], object]) -> None:
        with template.copy() as folder:
            storage = folder.path.parent
            (storage / "log.jsonl").write_bytes(LOG)
            file = storage / relative
            file.parent.mkdir(exist_ok=True)
            file.unlink(missing_ok=True)
            put(file)
            before = ended(template.folder)
            counts["cases"] += 1
            for verb in verbs if IS_LONG else verbs[counts["cases"] % len(verbs) :][:1]:
                done = verb(folder, file)
                counts[f"exit code {done.code}"] += 1
                assert not done.problem
                if done.code == 2 and verb is RESUME and kind != "lock":
                    assert file.name in done.stderr
                if done.code == 0 and verb is RESUME and kind not in CHANGEABLE:
                    assert ended(folder) == before, done.stdout

    places = list(PLACES.values()) if IS_LONG else [SHORT_PLACES[list(KINDS).index(kind) % len(SHORT_PLACES)]]
    for put in places:
        case(put)

    @settings(
        max_examples=N_CASES, deadline=None, derandomize=True, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(damaged(Content(original)))
    def many(content: bytes) -> None:
        case(lambda path: path.write_bytes(content))

    many()
    if counts_file := os.environ.get("TUNE_SSIM_COUNTS"):
        with Path(counts_file).open("a") as log:
            log.write(json.dumps({"kind": kind, **counts}) + "\n")


def ended(folder: StudyFolder) -> list[tuple[str, str, int]]:
    """The trials, with verdict and steps."""
    return [(trial.trial_id, trial.verdict.value, trial.steps) for trial in folder.trials()]
