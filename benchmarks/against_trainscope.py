"""How many steps before a training is ruined does tune_ssim warn, and trainscope, on the same runs? How often without cause?

    pip install trainscope tensorboard          # in an environment of its own, into which tune-ssim[train] is installed too
    python benchmarks/against_trainscope.py [--seeds 2] [--first-seed 0] [--output benchmarks/results/against_trainscope.json]

Two trainings: the bundled fundus super-resolution (pretrained, flow matching with an SSIM loss) and a small character-level GPT on
the text of docs/ (from random weights). In a ruined run a fault begins after step 60: the learning rate or the weight of a loss
grows far too high within 40 steps, or the data are bad (images in [0, 255], random labels). Sound runs are left alone, or change
then as trainings do: a weight is annealed, the rate lowered.

ruined    the first step from which held-out quality stays far worse than in the same run without the fault: the PSNR by 3 dB, the
          cross-entropy by half
warning   steps from the first alarm after the fault to ruin; negative: it came later
false     an alarm in a sound run, or before the fault

trainscope  `step` with its default detector, the change point of the loss: each alarm, and those of a rise alone; and the signals
            that `trainscope report` computes from a finished run, with its kurtosis measured at every step
tune_ssim   the guards of a live trial without samples, whose baseline is the run without the fault; and the alerts
            of `check` on the log alone (its verdict "loss rose again, does not work", which comes at the log's end, is no alert)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from rich.markdown import Markdown
from ssim import save
from torch import Tensor, nn
from torch.nn import functional

from tune_ssim.cli.log_arguments import open_log
from tune_ssim.guards import Baseline, BaselineRun, Divergence, NonFinite, NormRatio, Watch
from tune_ssim.guards.log_check import check_log
from tune_ssim.probes import total_norm
from tune_ssim.records import LOSS, TOTAL_NORM, Record
from tune_ssim.tasks.fundus_sr import FundusSR

ROOT = Path(__file__).resolve().parents[1]
FAULT_AT, STEPS, EVERY = 60, 120, 5  # EVERY: steps between evaluations
SAFE_GAIN, RUINOUS_GAIN = 13.0, 2000.0  # of the bundled task; README: what the second does
WIDTH, CONTEXT, BATCH, VOCABULARY = 64, 64, 16, 128  # of the GPT; characters above 127 are taken modulo
TOOLS = ("trainscope, live", "trainscope, live, rises", "trainscope, report", "tune_ssim, live", "tune_ssim, check")


@dataclass(frozen=True)
class Change:
    """What happens after step 60: factors of learning rate and loss weight, which grow over `ramp` steps, or other data."""

    lr: float = 1.0
    weight: float = 1.0
    ramp: int = 40
    bad_data: bool = False

    def at(self, factor: float, step: int) -> float:
        return float(factor ** min(1.0, max(0, step - FAULT_AT) / self.ramp))


class Fundus:
    """The bundled task. Quality: held-out PSNR in dB."""

    ruins: ClassVar = {
        "rate": Change(lr=1000.0),
        "weight": Change(weight=RUINOUS_GAIN / SAFE_GAIN),
        "data": Change(bad_data=True),
    }
    sound: ClassVar = {"as it is": Change(), "weight annealed": Change(weight=2.0), "rate lowered": Change(lr=0.1)}

    def __init__(self, seed: int) -> None:
        self.task = FundusSR()
        self.task.setup({"steps": STEPS, "ssim_loss_weight": SAFE_GAIN, "ssim_loss_max_t": 1.0}, seed)
        self.model, self.optimizer, self.lr = self.task.model, self.task.optimizer, self.task.config.lr
        self.batch = self.task._batch

    def step(self, step: int, change: Change) -> dict[str, float]:
        self.task.loss = replace(self.task.loss, ssim_loss_weight=SAFE_GAIN * change.at(change.weight, step))
        if change.bad_data and step == FAULT_AT + 1:
            self.task._batch = self._not_normalised
        return {name: float(value) for name, value in self.task.step().items() if name in (LOSS, TOTAL_NORM)}

    def _not_normalised(self, n: int) -> tuple[Tensor, ...]:
        crops, low, z0, noise, t = self.batch(n)
        return 255 * crops, 255 * low, 20 * z0, noise, t  # 20: about what the encoder makes of them

    def quality(self) -> float:
        sample = self.task.sample(0)
        error = float((sample.images - sample.references).square().mean())
        return -10 * torch.tensor(error).log10().item()

    @staticmethod
    def is_ruined(quality: float, sound: float) -> bool:
        return not quality > sound - 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend, self.mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (part.view(b, t, 4, -1).transpose(1, 2) for part in self.qkv(self.attend(x)).split(WIDTH, dim=2))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(b, t, WIDTH))
        return x + self.down(functional.gelu(self.up(self.mlp(x))))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.places.weight)))


class Text:
    """The GPT, with a z-loss (PaLM, Chowdhery et al. 2022) as the auxiliary term. Quality: held-out cross-entropy."""

    ruins: ClassVar = {"rate": Change(lr=1000.0), "weight": Change(weight=1e8), "data": Change(bad_data=True)}
    sound: ClassVar = {"as it is": Change(), "weight annealed": Change(weight=10.0), "rate lowered": Change(lr=0.1)}

    def __init__(self, seed: int) -> None:
        text = "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
        ids = torch.tensor([ord(letter) % VOCABULARY for letter in text])
        self.train, self.held_out = ids[: -len(ids) // 10], ids[-len(ids) // 10 :]
        torch.manual_seed(seed)
        self.model, self.lr = GPT(), 1e-3
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.lr)
        self.seed = seed

    def batch(self, text: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        at = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=generator)
        return torch.stack([text[i : i + CONTEXT + 1] for i in at])

    def step(self, step: int, change: Change) -> dict[str, float]:
        ids = self.batch(self.train, 1000 * self.seed + step)
        logits = self.model(ids[:, :-1])
        targets = torch.randint(VOCABULARY, ids[:, 1:].shape) if change.bad_data and step > FAULT_AT else ids[:, 1:]
        z_loss = 1e-4 * change.at(change.weight, step) * logits.logsumexp(-1).square().mean()
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) + z_loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = total_norm(self.model.parameters())
        self.optimizer.step()
        return {LOSS: loss.item(), TOTAL_NORM: norm.item()}

    @torch.no_grad()
    def quality(self) -> float:
        ids = self.batch(self.held_out, 7)
        return float(functional.cross_entropy(self.model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()))

    @staticmethod
    def is_ruined(quality: float, sound: float) -> bool:
        return not quality < 1.5 * sound


def trained(kind: type[Any], seed: int, change: Change, folder: Path) -> dict[str, Any]:
    """Records, qualities by step, and the alarms of trainscope in one run."""
    trainscope = import_module("trainscope")
    config = import_module("trainscope.core.config").TrainScopeConfig
    training = kind(seed)
    scope = trainscope.TrainScope(
        training.model, training.optimizer, config(run_dir=str(folder), run_name="run", activation_metrics_every_n_steps=1)
    ).attach()
    records, qualities, spikes = [], {}, []
    for step in range(1, STEPS + 1):
        for group in training.optimizer.param_groups:
            group["lr"] = training.lr * change.at(change.lr, step)
        values = training.step(step, change)
        records.append(Record(step, values))
        if (spike := scope.step(values[LOSS])) is not None:
            spikes.append((step, spike["spike_score"]))
        if step >= FAULT_AT and step % EVERY == 0:
            qualities[step] = training.quality()
    scope.detach()
    signature = asyncio.run(import_module("trainscope.analysis").run_signal_signature(folder / "run"))
    return {"records": records, "quality": qualities, "spikes": spikes, "signals": signature["first_steps"]}


def alarms(run: dict[str, Any], baseline: dict[str, Any], has_other_terms: bool, folder: Path) -> dict[str, list[int]]:
    """Tool → the steps of its alarms."""
    series = {name: {one.step: one.values[name] for one in baseline["records"]} for name in (LOSS, TOTAL_NORM)}
    reference = Baseline((BaselineRun(0, series, {}),))
    guards = [NonFinite(), Divergence().bind(reference, 0, has_other_terms), NormRatio().bind(reference, 0, clipped=False)]
    folder.mkdir(exist_ok=True)
    log = folder / "run.jsonl"
    log.write_text("".join(json.dumps({"step": one.step, **one.values}) + "\n" for one in run["records"]))
    report = check_log(open_log(str(log), {}))
    return {
        "trainscope, live": [step for step, _ in run["spikes"]],
        "trainscope, live, rises": [step for step, score in run["spikes"] if score > 0],
        "trainscope, report": sorted(1 + index for index in run["signals"].values()),
        "tune_ssim, live": [one.step for one in Watch(guards).fold(run["records"])],
        "tune_ssim, check": [alert.violation.step for alert in report.alerts],
    }


def ruin_step(kind: type[Any], run: dict[str, Any], sound: dict[str, Any]) -> int | None:
    """The first step from which the run stays ruined."""
    steps = sorted(run["quality"], reverse=True)
    found = None
    for step in steps:
        if not kind.is_ruined(run["quality"][step], sound["quality"][step]):
            break
        found = step
    return found


def measure(kind: type[Any], seed: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sound = trained(kind, seed, Change(), Path(folder, "sound"))
        for is_fault, changes in ((False, kind.sound), (True, kind.ruins)):
            for name, change in changes.items():
                place = Path(folder, f"{name}-{is_fault}")
                run = trained(kind, seed, change, place) if change != Change() else sound
                found = alarms(run, sound, change.weight != 1.0, place)
                ruined = ruin_step(kind, run, sound)
                rows.append(
                    {"training": kind.__name__, "seed": seed, "fault": is_fault, "change": name, "ruined": ruined, "alarms": found}
                )
                say(f"{kind.__name__} seed {seed} {'fault' if is_fault else 'sound'}: {name}: ruined {ruined}, {found}")
    return rows


def summary(rows: list[dict[str, Any]], tool: str) -> dict[str, Any]:
    sound = [row for row in rows if not row["fault"]]
    ruined = [row for row in rows if row["fault"] and row["ruined"] is not None]
    first = [next((step for step in row["alarms"][tool] if step > FAULT_AT), None) for row in ruined]
    leads = [row["ruined"] - step for row, step in zip(ruined, first, strict=True) if step is not None]
    return {
        "tool": tool,
        "ruined": len(ruined),
        "alarm": len(leads),
        "in_time": sum(lead > 0 for lead in leads),
        "median_warning_steps": statistics.median(leads) if leads else None,
        "least_and_most": [min(leads), max(leads)] if leads else None,
        "sound": len(sound),
        "false": sum(bool(row["alarms"][tool]) for row in sound),
        "before_the_fault": sum(any(step <= FAULT_AT for step in row["alarms"][tool]) for row in ruined),
    }


def markdown(results: list[dict[str, Any]]) -> list[str]:
    """The table of docs/measurements.md."""
    lines = [
        "| | ruined runs with an alarm | before ruin | steps of warning: median (least, most) | sound runs with an alarm |",
        "|---|---|---|---|---|",
    ]
    for one in results:
        least, most = one["least_and_most"] or ("–", "–")
        warning = f"{one['median_warning_steps']:g} ({least}, {most})" if one["alarm"] else "–"
        alarm, false = f"{one['alarm']} of {one['ruined']}", f"{one['false']} of {one['sound']}"
        lines.append(f"| {one['tool']} | {alarm} | {one['in_time']} | {warning} | {false} |")
    return lines


def require_trainscope() -> str:
    """Its version. Raises SystemExit if it is not installed."""
    try:
        return version("trainscope")
    except PackageNotFoundError:
        raise SystemExit("trainscope is not installed in this environment: pip install trainscope, then run this again") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "against_trainscope.json")
    arguments = parser.parse_args()
    found, console, rows = require_trainscope(), Console(width=140), []
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        rows += [row for kind in (Fundus, Text) for row in measure(kind, seed, console.print)]
        results = [summary(rows, tool) for tool in TOOLS]
        save(arguments.output, {"trainscope": found, "steps": STEPS, "fault_after": FAULT_AT, "tools": results, "runs": rows})
    console.print(Markdown("\n".join(markdown(results))))


if __name__ == "__main__":
    main()
