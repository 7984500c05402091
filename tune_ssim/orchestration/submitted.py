"""Studies as Ray Jobs: shipped to a cluster with their code, run there without a terminal, and followed or stopped from afar."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from tune_ssim.base.errors import UserError
from tune_ssim.base.yaml_source import dump_yaml
from tune_ssim.orchestration.ray_cluster import token_file
from tune_ssim.study.command_spec import CommandSpec
from tune_ssim.study.study import Study
from tune_ssim.trials.command.dependencies import Dependencies

STUDY, STORAGE = "tune_ssim_study", "tune_ssim_storage"  # keys of a job's metadata
SHIPPED = ("code/", "settings/")  # kinds of files; data and weights stay where they are


@dataclass(frozen=True)
class SubmittedJob:
    """A study as a Ray Job. status: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED. started, ended: ISO 8601, UTC."""

    id: str
    study: str
    status: str
    message: str
    storage: str
    started: str | None
    ended: str | None

    @property
    def has_ended(self) -> bool:
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


class SubmittedStudies:
    """The studies submitted to a cluster. address: of its dashboard, `http://HOST:8265`. Raises UserError if it does not answer or
    refuses the token."""

    def __init__(self, address: str) -> None:
        self._address = address
        for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
            logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)  # they tell of each upload
        with self._errors():
            self._client = JobSubmissionClient(address)

    def submit(self, study: Study, storage: str) -> str:
        """Starts the study, or resumes it if it was started in this storage. Returns the job's id."""
        words = ["run", "study.yaml", "--resume-if-started", "--address", "auto", "--storage-path", storage]
        with tempfile.TemporaryDirectory(prefix="tune-ssim-submit-") as folder, self._errors():
            ship(study, Path(folder))
            return str(
                self._client.submit_job(
                    entrypoint=f"python -m tune_ssim {shlex.join(words)}",
                    submission_id=f"{study.name}-{secrets.token_hex(3)}",
                    runtime_env={"working_dir": folder},
                    metadata={STUDY: study.name, STORAGE: storage},
                )
            )

    def jobs(self) -> list[SubmittedJob]:
        """The latest first."""
        with self._errors():
            found = [job for job in self._client.list_jobs() if job.submission_id and STUDY in (job.metadata or {})]
        return [_submitted_job(job) for job in sorted(found, key=lambda job: job.start_time or 0, reverse=True)]

    def find(self, name: str | None) -> SubmittedJob:
        """The latest job of the study `name`, or the job of that id, or the latest of all."""
        jobs = self.jobs()
        for job in jobs:
            if name in (None, job.id, job.study):
                return job
        there = ", ".join(sorted({job.study for job in jobs})) or "none"
        raise UserError(f"--address {self._address}: no such submitted study: {name or 'any'}; there are: {there}")

    def logs(self, job: SubmittedJob, follow: bool, write: Callable[[str], None]) -> None:
        """Writes the output of the driver, until the job ends if `follow`."""
        with self._errors():
            if not follow:
                write(self._client.get_job_logs(job.id))
                return
            asyncio.run(self._follow(job.id, write))

    async def _follow(self, job_id: str, write: Callable[[str], None]) -> None:
        async for text in self._client.tail_job_logs(job_id):
            write(text)

    def stop(self, job: SubmittedJob) -> bool:
        """Ends the job as Ctrl-C would; its study can be submitted again and goes on. False if it had ended already."""
        if job.has_ended:
            return False
        with self._errors():
            return bool(self._client.stop_job(job.id))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except AuthenticationError:
            raise UserError(
                f"--address {self._address}: the token is missing or wrong: set RAY_AUTH_MODE=token, and the cluster's token in "
                f"{token_file()} or RAY_AUTH_TOKEN_PATH"
            ) from None
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise UserError(f"--address {self._address}: {str(error).strip().splitlines()[0]}") from None


def _submitted_job(job: JobDetails) -> SubmittedJob:
    metadata, lines = job.metadata or {}, (job.message or "").strip().splitlines()
    return SubmittedJob(
        id=job.submission_id or "",
        study=metadata[STUDY],
        status=str(job.status.value),
        message=lines[0] if lines else "",
        storage=metadata.get(STORAGE, ""),
        started=_time(job.start_time),
        ended=_time(job.end_time),
    )


def _time(milliseconds: int | None) -> str | None:
    return datetime.fromtimestamp(milliseconds / 1000, timezone.utc).isoformat(timespec="seconds") if milliseconds else None


def ship(study: Study, folder: Path) -> None:
    """Writes the resolved study and the files of its code and settings into `folder`. Raises UserError for code outside the study's
    own folder, which would not be found on the cluster."""
    (folder / "study.yaml").write_text(dump_yaml(study.to_dict() | {"import_path": None}), encoding="utf-8")
    home = Path(study.import_path or ".")
    for name, path in files_of(study).items():
        inside = os.path.relpath(path, home)
        if not name.startswith(SHIPPED):
            continue
        if inside.startswith(".."):
            raise UserError(f"{path}: outside {home}, so it cannot be sent with the study")
        target = folder / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)


def files_of(study: Study) -> Mapping[str, Path]:
    """The local files of the study's task, as the proof names them: a command's, or a module's and what it imports. None of a
    bundled task, and of a command whose `cwd` is an absolute path, since that is a folder of the cluster."""
    task, settings = study.task, {**study.task_config, **study.baseline_settings}
    if study.import_path is None:
        return {}
    if not isinstance(task, CommandSpec):
        task = CommandSpec.model_validate({"command": ["{python}", "-m", str(task).partition(":")[0]]})
    if Path(task.cwd or "").is_absolute():
        return {}
    return Dependencies(task, settings, study.import_path).files
