"""Does `check` read what well-known trainers write, without an option? Each trains a small model here, soundly and until a NaN.

    pip install transformers accelerate lightning tensorboard 'ray[tune]'   # in an environment with tune-ssim[train]
    python benchmarks/check_producers.py [--output benchmarks/results/check_producers.json]

sound     60 steps or more of a regression whose loss falls: the verdict must not be `alerts`
NaN       the same with labels that are NaN from step 40 on: the verdict must be `alerts`, at the first record with the NaN

A trainer that is not installed is listed as such. Ray is started on one CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from ssim import save
from torch.utils.data import DataLoader, Dataset

from tune_ssim.base.errors import UserError
from tune_ssim.cli.log_arguments import open_log
from tune_ssim.guards.log_check import check_log

STEPS, NAN_FROM, BATCH = 80, 40, 4
Logs = dict[str, Path]


class Points(Dataset[dict[str, torch.Tensor]]):
    """A line, whose values are NaN from one sample on."""

    def __init__(self, nan_from: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(STEPS * BATCH, 8, generator=generator)
        self.y = self.x.sum(1, keepdim=True)
        self.y[nan_from * BATCH :] = math.nan

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[at], "labels": self.y[at]}


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": torch.nn.functional.mse_loss(self.layer(x), labels)}


@contextlib.contextmanager
def printed_to(path: Path) -> Iterator[None]:
    """What is printed in the block, and the bars, in a file."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        yield
    path.write_text(text.getvalue())


def by_transformers(points: Points, folder: Path) -> Logs:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH, logging_steps=1, learning_rate=0.05,
        report_to=["tensorboard"], use_cpu=True, save_strategy="no", lr_scheduler_type="constant", remove_unused_columns=False,
        logging_nan_inf_filter=False, train_sampling_strategy="sequential",
    )  # fmt: skip
    with printed_to(folder / "out.log"):
        trainer = Trainer(model=Line(), args=arguments, train_dataset=points)
        trainer.train()
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    boards = next(path.parent for path in folder.rglob("*tfevents*"))
    return {"trainer_state.json": folder / "trainer_state.json", "printed": folder / "out.log", "TensorBoard": boards}


def by_lightning(points: Points, folder: Path) -> Logs:
    import lightning
    from lightning.pytorch.callbacks import TQDMProgressBar
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.line = Line()

        def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
            loss = self.line(**batch)["loss"]
            self.log("train_loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.05)

    loggers = [CSVLogger(folder, "csv"), TensorBoardLogger(folder, "board")]
    with printed_to(folder / "out.log"):
        trainer = lightning.Trainer(
            max_epochs=1, logger=loggers, log_every_n_steps=1, accelerator="cpu", enable_checkpointing=False,
            default_root_dir=folder, callbacks=[TQDMProgressBar()], enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Module(), DataLoader(points, BATCH))
    boards = next(path.parent for path in folder.rglob("*tfevents*"))
    return {"metrics.csv": next(folder.rglob("metrics.csv")), "TensorBoard": boards, "printed": folder / "out.log"}


def by_accelerate(points: Points, folder: Path) -> Logs:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(folder))
    accelerator.init_trackers("run")
    model, optimizer, loader = Line(), None, DataLoader(points, BATCH)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for step, batch in enumerate(loader, 1):
        loss = model(**batch)["loss"]
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.log({"train_loss": loss.item(), "grad_norm": float(norm)}, step=step)
    accelerator.end_training()
    return {"TensorBoard": next(path.parent for path in folder.rglob("*tfevents*"))}


def by_ray(points: Points, folder: Path) -> Logs:
    import ray
    from ray import tune

    def train(_: dict[str, Any]) -> None:
        model = Line()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for batch in DataLoader(points, BATCH):
            loss = model(**batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tune.report({"loss": loss.item()})

    ray.init(num_cpus=1, include_dashboard=False, ignore_reinit_error=True, log_to_driver=False)
    try:
        with printed_to(folder / "out.log"):
            tune.Tuner(train, run_config=tune.RunConfig(storage_path=str(folder), name="run", verbose=0)).fit()
    finally:
        ray.shutdown()
    names = ("result.json", "progress.csv")
    return {name: next(folder.rglob(name)) for name in names} | {
        "TensorBoard": next(path.parent for path in folder.rglob("*tfevents*"))
    }


PRODUCERS: dict[str, Callable[[Points, Path], Logs]] = {
    "transformers": by_transformers,
    "lightning": by_lightning,
    "accelerate": by_accelerate,
    "ray": by_ray,
}


def checked(path: Path) -> dict[str, Any]:
    try:
        report = check_log(open_log(str(path), {})).to_json()
    except UserError as error:
        return {"verdict": f"not read: {error}", "records": 0, "first_alert": None}
    first = min((alert["step"] for alert in report["alerts"]), default=None)
    return {"verdict": report["verdict"], "records": report["records"], "first_alert": first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PRODUCERS, nargs="*", default=list(PRODUCERS))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "check_producers.json")
    arguments = parser.parse_args()
    rows = []
    for producer in arguments.only:
        found: dict[str, dict[str, Any]] = {}
        try:
            for kind, nan_from in (("sound", STEPS), ("nan", NAN_FROM)):
                with tempfile.TemporaryDirectory() as folder:
                    torch.manual_seed(0)
                    for log, path in PRODUCERS[producer](Points(nan_from), Path(folder)).items():
                        found.setdefault(log, {})[kind] = checked(path)
        except ImportError as error:
            found["not installed"] = {"sound": {"verdict": str(error)}, "nan": {}}
        rows += [{"producer": producer, "log": log, **both} for log, both in found.items()]
    table = Table("producer", "log", "records", "sound", "with a NaN from step 40", "first alert at step")
    for row in rows:
        sound, nan = row["sound"], row["nan"]
        seen = (str(sound.get("records")), sound["verdict"], str(nan.get("verdict")), str(nan.get("first_alert")))
        table.add_row(row["producer"], row["log"], *seen)
    Console(width=140).print(table)
    save(arguments.output, {"steps": STEPS, "nan_from": NAN_FROM, "logs": json.loads(json.dumps(rows))})


if __name__ == "__main__":
    main()
