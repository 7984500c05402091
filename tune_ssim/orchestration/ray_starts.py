"""Runs the starts of a command on a Ray cluster: side by side where there is room, each with a trial's resources."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tune_ssim.before_launch.command.starts import Start, StartJob
from tune_ssim.before_launch.command.take_start import take_one
from tune_ssim.orchestration.nodes import NodesProcess
from tune_ssim.orchestration.trainable import TrialResources
from tune_ssim.study.study import Study
from tune_ssim.trials.command.command_task import CommandTask
from tune_ssim.trials.load_training import load_task


def take_on_ray(study: Study, resources: TrialResources, jobs: Sequence[StartJob]) -> Iterator[Start]:
    """A `Take` once its first two arguments are bound. If it is interrupted, its commands end with it."""
    bundles = resources.placement()
    own = bundles.bundles[0] if resources.nodes == 1 else {}  # a process that only waits for those on the nodes needs none
    remote = ray.remote(num_cpus=own.get("CPU", 0), num_gpus=own.get("GPU", 0), max_retries=0)(_take)
    groups = {}  # task → its placement group
    for job in jobs:
        group = placement_group(bundles.bundles, strategy=bundles.strategy)
        where = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
        groups[remote.options(scheduling_strategy=where).remote(study, resources, job)] = group
    try:
        while groups:
            for done in ray.wait(list(groups))[0]:
                remove_placement_group(groups.pop(done))  # its room is the next start's
                yield ray.get(done)
    finally:
        for task, group in groups.items():
            ray.cancel(task, force=True)
            remove_placement_group(group)


def _take(study: Study, resources: TrialResources, job: StartJob) -> Start:
    def make() -> CommandTask:
        task: Any = load_task(study.task_path, study.import_path)()
        if resources.nodes > 1:
            task.launch = partial(NodesProcess, resources.nodes, resources.cpus, resources.gpus)
        return task  # type: ignore[no-any-return]

    with tempfile.TemporaryDirectory(prefix="tune-ssim-start-") as folder:
        return take_one(make, job, study.name, Path(folder))
