"""Random kills of a study's processes and cuts of its network, and whether its result is the same as without them.

    python benchmarks/chaos/kills.py [--faults 20] [--seed 0] [--shapes NAME ...] [--output benchmarks/results/chaos_kills.json]

A study with a Ray of its own: at random moments the process of a random trial, the driver or the raylet is killed with SIGKILL, in
turn. A killed driver is resumed, and so is one that ended because its only raylet was killed; one that has not ended by then counts
as hung, and is killed. A study on two hosts (network namespaces, which need root): the link between them is cut for 2 to 45 s, all
processes of the host with the trials are killed and its Ray is started again, and drivers and trials are killed as above.

After each study its trials are compared with those of an undisturbed one: lost, with two verdicts, with another verdict or step
count, and whether the best setting is the same. Processes of the study that are left 60 s after the end count as orphans; so do
those of its own Ray.
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from two_hosts import TwoHosts, two_hosts  # noqa: E402

ORPHANS_AFTER_S = 60.0
RAYLET_TIMEOUT_S = 120.0  # in which a driver without a raylet has to end
STUDY_TIMEOUT_S = 1200.0  # ten times a study of these
CUT_S = (2.0, 45.0)  # shorter and longer than what Ray takes for a dead node
WRONG = ("hung", "failed", "lost", "twice", "changed", "other best", "orphans")
PATHS = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "trainings")))
LONG = {"steps": 1500}  # seconds a trial
CONFIRM = {"seeds": 3, "steps": 2000, "finalists": 2}


@dataclass(frozen=True)
class Shape:
    """What a study has other than SMALL, and the CPUs of the head and of the worker if it runs on two hosts."""

    changes: Mapping[str, Any]
    cpus_of_hosts: tuple[int, int] | None = None


STAGED = {"confirm": CONFIRM, "search": {**SMALL["search"], "trials": 4}}
RANKED = {"task": "ranked_task:RankedTask", "import_path": str(ROOT / "tests" / "trainings"), "search": {"trials": 2}}
SHAPES = {
    "search and confirm": Shape(STAGED),
    "two workers a trial": Shape({**RANKED, "resources": {"workers": 2, "cpus": 0.5}}),
    "two hosts": Shape(STAGED, cpus_of_hosts=(0, 2)),
    "two workers on two hosts": Shape({**RANKED, "resources": {"workers": 2, "cpus": 1}}, cpus_of_hosts=(1, 1)),
}


def study_file(folder: Path, shape: str) -> Path:
    paths = {"import_path": str(ROOT / "tests" / ("trainings" if "workers" in shape else ""))}
    study = load_study(
        {
            **SMALL,
            "name": "chaos",
            "checkpoint_every": 50,
            "result_every": 10,
            "task_config": LONG,
            **paths,
            **SHAPES[shape].changes,
        }
    )
    (folder / "chaos.yaml").write_text(study.to_yaml())
    return folder / "chaos.yaml"


def processes(sessions: set[int] | None = None, pids: Iterable[int] = ()) -> dict[int, str]:
    """The living processes of these sessions or of `pids`, and their titles. Ray's stay in the session of the driver."""
    found = {}
    for path in Path("/proc").iterdir():
        if not path.name.isdigit():
            continue
        try:
            state, _, _, session = (path / "stat").read_text().rpartition(")")[2].split()[:4]
            if (int(path.name) in pids if sessions is None else int(session) in sessions) and state != "Z":
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
    return found


def of_trials(found: Mapping[int, str]) -> list[int]:
    """Processes of trials and of their workers."""
    return [pid for pid, title in found.items() if any(name in title for name in ("Trainable", "GuardedTrial", "::_Worker"))]


def facts(folder: StudyFolder) -> dict[str, Any]:
    return {trial.trial_id: (trial.verdict.value, trial.steps) for trial in folder.trials()}


def winner(folder: StudyFolder) -> str:
    try:
        return best_safe(folder).trial_id
    except NoSafeTrial:
        return ""


class Disturbed:
    """A study with a Ray of its own that runs to its end, however often its processes are killed."""

    FAULTS: tuple[str, ...] = ("trial", "driver", "trial", "driver", "raylet")

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.folder, self.chance = folder, chance
        self.counts: Counter[str] = Counter()
        self.sessions: set[int] = set()

    def run(self) -> None:
        self.driver = self.start()
        for fault in self.FAULTS:
            self.wait_for_a_trial()
            time.sleep(self.chance.uniform(0, 8))
            if self.driver.poll() is not None:
                break
            self.counts[fault] += self.strike(fault)
        while self.wait() in (4, 130):  # a trial that was killed three times has no verdict yet
            self.resume()
        self.counts["failed"] += self.driver.returncode != 0

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        run = ["run", str(self.folder / "chaos.yaml"), "--storage-path", str(self.folder), *more]
        argv = self.argv(sys.executable, "-m", "tune_ssim", *run)
        with (self.folder / "log").open("ab") as log:
            driver = subprocess.Popen(argv, env=self.environment(), stdout=log, stderr=log, start_new_session=True)
        self.sessions.add(driver.pid)
        return driver

    def argv(self, *command: str) -> Sequence[str]:
        return command

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}

    def strike(self, fault: str) -> bool:
        """Whether there was something to be killed."""
        if fault == "trial":
            self.wait_for_a_trial()
            return self.kill_one(self.trials())
        if fault == "driver":
            self.kill_driver()
        else:
            raylets = [pid for pid, title in processes({self.driver.pid}).items() if title.split(" ")[0].endswith("/raylet")]
            if not self.kill_one(raylets):
                return False
            self.wait(RAYLET_TIMEOUT_S)
        self.resume()
        return True

    def kill_one(self, pids: list[int]) -> bool:
        try:
            os.kill(self.chance.choice(pids), signal.SIGKILL)
        except (IndexError, ProcessLookupError):
            return False
        return True

    def kill_driver(self) -> None:
        os.killpg(self.driver.pid, signal.SIGKILL)
        self.driver.wait()

    def wait(self, timeout_s: float = STUDY_TIMEOUT_S) -> int:
        """For the end of the driver. One that does not end is killed, and counts as hung."""
        try:
            return self.driver.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.counts["hung"] += 1
            self.kill_driver()
            return self.driver.returncode

    def trials(self) -> list[int]:
        return of_trials(processes({self.driver.pid}))

    def orphans(self) -> int:
        return len(processes(self.sessions))

    def wait_for_a_trial(self) -> None:
        while not self.trials() and self.driver.poll() is None:
            time.sleep(0.1)

    def resume(self) -> None:
        again = ["--resume", "--name", "chaos"] if (self.folder / "chaos" / "study.yaml").exists() else []
        self.driver = self.start(*again)


class OnTwoHosts(Disturbed):
    """A study on a cluster of two hosts: the driver is on the head, and the trials are where the CPUs are."""

    FAULTS = ("cut", "trial", "node", "cut", "driver", "cut")

    def __init__(self, folder: Path, chance: random.Random, hosts: TwoHosts, cpus: tuple[int, int]) -> None:
        super().__init__(folder, chance)
        self.hosts, self.cpus = hosts, cpus
        for host in (hosts.head, hosts.worker):
            host.environment["PYTHONPATH"] = PATHS
        hosts.start(cpus)

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        return super().start("--address", self.hosts.address, *more)

    def argv(self, *command: str) -> Sequence[str]:
        return self.hosts.head.argv(*command)

    def environment(self) -> dict[str, str]:
        return self.hosts.head.environment

    def strike(self, fault: str) -> bool:
        if fault == "cut":
            self.hosts.cut(self.chance.uniform(*CUT_S))
        elif fault == "node":
            self.hosts.worker.end()
            time.sleep(self.chance.uniform(0, 10))
            self.hosts.worker.ray(f"--address={self.hosts.address}", cpus=self.cpus[1])
        else:
            return super().strike(fault)
        return True

    def trials(self) -> list[int]:
        return of_trials(processes(pids={*self.hosts.head.pids(), *self.hosts.worker.pids()}))

    def orphans(self) -> int:
        return len(self.trials())


@contextmanager
def disturbed(folder: Path, shape: str, chance: random.Random) -> Iterator[Disturbed]:
    if cpus := SHAPES[shape].cpus_of_hosts:
        with two_hosts(folder / "hosts") as hosts:
            yield OnTwoHosts(folder, chance, hosts, cpus)
    else:
        yield Disturbed(folder, chance)


def study_under_faults(shape: str, expected: dict[str, Any], best: str, chance: random.Random) -> Counter[str]:
    with tempfile.TemporaryDirectory(prefix="tune-ssim-chaos-") as name:
        folder = Path(name)
        study_file(folder, shape)
        with disturbed(folder, shape, chance) as study:
            study.run()
            counts = study.counts
            deadline = time.monotonic() + ORPHANS_AFTER_S
            while study.orphans() and time.monotonic() < deadline:
                time.sleep(1)
            counts["orphans"] = study.orphans()
        found = StudyFolder(folder / "chaos")
        lines = [TrialSummary.from_dict(json.loads(line)) for line in found.trials_file.read_text().splitlines()]
        final = [trial.trial_id for trial in lines if not trial.is_repeated_on_resume]
        results = facts(found)
        counts["lost"] = len(set(expected) - set(results))
        counts["twice"] = len(final) - len(set(final))
        counts["changed"] = sum(results[name] != value for name, value in expected.items() if name in results)
        counts["other best"] = int(winner(found) != best)
        if any(counts[key] for key in WRONG):
            print((folder / "log").read_text()[-8000:], found.trials_file.read_text(), sep="\n", file=sys.stderr)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=20, help="of each shape, in studies of five or six")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES), metavar="NAME")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "chaos_kills.json")
    arguments = parser.parse_args()
    shapes = dict[str, dict[str, int]](json.loads(arguments.output.read_text())["shapes"] if arguments.output.exists() else {})
    faults = tuple(dict.fromkeys((*Disturbed.FAULTS, *OnTwoHosts.FAULTS)))
    for shape in arguments.shapes:
        chance = random.Random(f"{arguments.seed} {shape}")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            study_file(folder, shape)
            undisturbed = Disturbed(folder, chance)
            undisturbed.start().wait()
            expected, best = facts(StudyFolder(folder / "chaos")), winner(StudyFolder(folder / "chaos"))
        total: Counter[str] = Counter()
        while sum(total[fault] for fault in faults) < arguments.faults:
            found = study_under_faults(shape, expected, best, chance)
            total.update({**found, "studies": 1})
            print(shape, dict(found), flush=True)
            # After each study, so that an interruption loses nothing. What other shapes have in the file stays.
            shapes[shape] = {column: total[column] for column in ("studies", *faults, *WRONG)}
            save(arguments.output, {"seed": arguments.seed, "shapes": shapes})
            if not any(found[fault] for fault in faults):
                break
    table = Table("shape", "studies", *faults, *WRONG)
    for shape, counts in shapes.items():
        table.add_row(shape, *(str(counts.get(key, 0)) for key in ("studies", *faults, *WRONG)))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
