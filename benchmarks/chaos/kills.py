"""Random kills of a study's processes, and whether its result is the same as without them.

    python benchmarks/chaos/kills.py [--kills 20] [--seed 0] [--output benchmarks/results/chaos_kills.json]

Each study has a Ray of its own. At random moments the process of a random trial, the driver or the raylet is killed with SIGKILL,
in turn. A killed driver is resumed, and so is one that ended because its only raylet was killed; one that has not ended by then
counts as hung, and is killed. After each study its trials are compared with those of an undisturbed one: lost, with two verdicts,
with another verdict or step count, and whether the best setting is the same. Processes of Ray or of the study that are left 60 s
after the end count as orphans.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.results.winner import NoSafeTrial, best_safe
from tune_ssim.study.study import load_study
from tune_ssim.trials.summary import TrialSummary

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
from small_studies import SMALL  # noqa: E402
from ssim import save  # noqa: E402

ORPHANS_AFTER_S = 60.0
RAYLET_TIMEOUT_S = 120.0  # in which a driver without a raylet has to end
KINDS = ("trial", "driver", "trial", "driver", "raylet")
LONG = {"steps": 1500}  # seconds a trial
CONFIRM = {"seeds": 3, "steps": 2000, "finalists": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "search and confirm": {"confirm": CONFIRM, "search": {**SMALL["search"], "trials": 4}},
    "two workers a trial": {"resources": {"workers": 2, "cpus": 0.5}, "task": "ranked_task:RankedTask", "search": {"trials": 2}},
}


def study_file(folder: Path, shape: str) -> Path:
    paths = {"import_path": str(ROOT / "tests" / ("trainings" if "workers" in shape else ""))}
    study = load_study(
        {**SMALL, "name": "chaos", "checkpoint_every": 50, "result_every": 10, "task_config": LONG, **paths, **SHAPES[shape]}
    )
    (folder / "chaos.yaml").write_text(study.to_yaml())
    return folder / "chaos.yaml"


def start(folder: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tune_ssim", "run", str(folder / "chaos.yaml"), "--storage-path", str(folder), *more]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "trainings")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def processes(sessions: set[int]) -> dict[int, str]:
    """The living processes of these sessions, and their titles. Ray's processes stay in the session of their driver."""
    found = {}
    for path in Path("/proc").iterdir():
        if not path.name.isdigit():
            continue
        try:
            state, _, _, session = (path / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) in sessions and state != "Z":
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
    return found


def trials_of(session: int) -> list[int]:
    return [pid for pid, title in processes({session}).items() if "Trainable" in title or "GuardedTrial" in title]


def raylets_of(session: int) -> list[int]:
    return [pid for pid, title in processes({session}).items() if title.split(" ")[0].endswith("/raylet")]


def kill_one(pids: list[int], chance: random.Random) -> bool:
    try:
        os.kill(chance.choice(pids), signal.SIGKILL)
    except (IndexError, ProcessLookupError):
        return False
    return True


def facts(folder: StudyFolder) -> dict[str, Any]:
    return {trial.trial_id: (trial.verdict.value, trial.steps) for trial in folder.trials()}


def winner(folder: StudyFolder) -> str:
    try:
        return best_safe(folder).trial_id
    except NoSafeTrial:
        return ""


class Disturbed:
    """A study that runs to its end, however often its processes are killed."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.folder, self.chance = folder, chance
        self.counts: Counter[str] = Counter()
        self.driver = start(folder)
        self.sessions = {self.driver.pid}

    def run(self, kinds: Sequence[str]) -> None:
        for kind in kinds:
            self.wait_for_a_trial()
            time.sleep(self.chance.uniform(0, 8))
            if self.driver.poll() is not None:
                break
            if kind == "trial":
                self.wait_for_a_trial()
                self.counts["trial"] += kill_one(trials_of(self.driver.pid), self.chance)
            elif kind == "driver":
                os.killpg(self.driver.pid, signal.SIGKILL)
                self.driver.wait()
                self.counts["driver"] += 1
                self.resume()
            else:
                self.counts["raylet"] += kill_one(raylets_of(self.driver.pid), self.chance)
                try:
                    self.driver.wait(RAYLET_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    self.counts["hung"] += 1
                    os.killpg(self.driver.pid, signal.SIGKILL)
                    self.driver.wait()
                self.resume()
        while self.driver.wait() in (4, 130):  # a trial that was killed three times has no verdict yet
            self.resume()
        self.counts["failed"] += self.driver.returncode != 0

    def wait_for_a_trial(self) -> None:
        while not trials_of(self.driver.pid) and self.driver.poll() is None:
            time.sleep(0.1)

    def resume(self) -> None:
        again = ["--resume", "--name", "chaos"] if (self.folder / "chaos" / "study.yaml").exists() else []
        self.driver = start(self.folder, *again)
        self.sessions.add(self.driver.pid)


def study_under_kills(shape: str, expected: dict[str, Any], best: str, kinds: Sequence[str], chance: random.Random) -> Counter[str]:
    with tempfile.TemporaryDirectory(prefix="tune-ssim-chaos-") as name:
        folder = Path(name)
        study_file(folder, shape)
        study = Disturbed(folder, chance)
        study.run(kinds)
        counts, sessions = study.counts, study.sessions
        found = StudyFolder(folder / "chaos")
        lines = [TrialSummary.from_dict(json.loads(line)) for line in found.trials_file.read_text().splitlines()]
        final = [trial.trial_id for trial in lines if not trial.is_repeated_on_resume]
        deadline = time.monotonic() + ORPHANS_AFTER_S
        while processes(sessions) and time.monotonic() < deadline:
            time.sleep(1)
        results = facts(found)
        counts["lost"] = len(set(expected) - set(results))
        counts["twice"] = len(final) - len(set(final))
        counts["changed"] = sum(results[name] != value for name, value in expected.items() if name in results)
        counts["other best"] = int(winner(found) != best)
        counts["orphans"] = len(processes(sessions))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20, help="of each shape, in studies of five kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "chaos_kills.json")
    arguments = parser.parse_args()
    chance, total = random.Random(arguments.seed), dict[str, Counter[str]]()
    columns = ("driver", "trial", "raylet", "hung", "failed", "lost", "twice", "changed", "other best", "orphans")
    for shape in arguments.shapes:
        with tempfile.TemporaryDirectory() as name:
            study_file(Path(name), shape)
            start(Path(name)).wait()
            undisturbed = StudyFolder(Path(name, "chaos"))
            expected, best = facts(undisturbed), winner(undisturbed)
        total[shape] = Counter(dict.fromkeys(columns, 0) | {"studies": 0})
        while sum(total[shape][kind] for kind in set(KINDS)) < arguments.kills:
            found = study_under_kills(shape, expected, best, KINDS, chance)
            total[shape].update(found)
            total[shape]["studies"] += 1
            print(shape, dict(found), flush=True)
            # After each study, so that an interruption loses nothing.
            save(arguments.output, {"seed": arguments.seed, "shapes": {name: dict(counts) for name, counts in total.items()}})
            if not any(found[kind] for kind in KINDS):
                break
    table = Table("shape", "studies", *columns)
    for shape, counts in total.items():
        table.add_row(shape, *(str(counts[key]) for key in ("studies", *columns)))
    Console().print(table)


if __name__ == "__main__":
    main()
