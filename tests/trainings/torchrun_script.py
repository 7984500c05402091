"""A script for torchrun on any number of ranks and nodes: gloo all-reduce each step, a JSON log of the first rank.

`--ignore_term`: its ranks do not end when they are asked to. `--pids`: a folder in which every process leaves its pid."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import distributed

sys.path.insert(0, str(Path(__file__).parents[1]))
from small_task import SmallTask

parser = argparse.ArgumentParser()
parser.add_argument("--ssim_loss_weight", type=float, default=0.0)
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--pause", type=float, default=0.0)
parser.add_argument("--ignore_term", action="store_true")
parser.add_argument("--pids", type=Path)
options = parser.parse_args()
torch.set_num_threads(1)
if options.ignore_term:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if options.pids:
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)  # as data loaders and loggers are
    options.pids.mkdir(parents=True, exist_ok=True)
    for pid in (os.getpid(), os.getppid(), child.pid):
        (options.pids / str(pid)).touch()
distributed.init_process_group("gloo")
task = SmallTask()
task.setup({"ssim_loss_weight": options.ssim_loss_weight}, 0)
print(f"rank {distributed.get_rank()} of {distributed.get_world_size()}", flush=True)
for step in range(1, options.steps + 1):
    found = {name: float(value) for name, value in task.step().items()}
    distributed.all_reduce(task.x)
    task.x /= distributed.get_world_size()
    if distributed.get_rank() == 0:
        print("TUNE_SSIM " + json.dumps({"step": step, **found}), flush=True)
    time.sleep(options.pause)
distributed.destroy_process_group()
if options.pids:
    child.kill()
