"""The small task as an ordinary loop that reports through `trial_context`: as a function of a study, and as a script."""

from __future__ import annotations

import argparse

from small_task import SmallTask

from tune_ssim import trial_context


def main(**given: float) -> None:
    with trial_context(steps=40, ssim_loss_weight=0.0, ssim_grad_scale=1.0, ssim_loss_max_t=0.3) as t:
        task = SmallTask()
        task.setup({**t.config, **given}, t.seed)
        t.in_force(ssim_loss_weight=task.gain / float(t.config["ssim_grad_scale"]))
        if t.due(0):
            push(t, task, 0)
        for step in range(1, int(t.config["steps"]) + 1):
            t.report(step=step, **task.step())
            if t.due(step):
                push(t, task, step)
        t.held_out(**task.evaluate())
        print("trained to the end")


def push(t, task, step):
    sample = task.sample(0)
    t.samples(sample.images, step=step, references=sample.references, inputs=sample.inputs, reconstructions=sample.reconstructions)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--ssim_loss_weight", type=float, default=0.0)
    main(ssim_loss_weight=parser.parse_args().ssim_loss_weight)
