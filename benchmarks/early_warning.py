"""Can a rule on loss and gradient norm alone warn before a training is ruined, and never without cause? No: docs/measurements.md.

    python benchmarks/early_warning.py [--streams DIR] [--health DIR] [--output benchmarks/results/early_warning.json]

The rule: in 3 records in a row the loss and the norm are both above the range of their own 50 records before (`is_above`). The two
trainings of benchmarks/against_trainscope.py, with its faults and more, and with sound changes that look like a fault: a
fault or a change begins after step 60 of 120. The constants were chosen on the design runs and not touched afterwards.

design    seeds 100 to 102, the kinds in DESIGN, and the safe runs of benchmarks/replay/curves
judged    seeds 0, 1, 200, all kinds; on seeds 0 and 1 long trainings of other sorts too: GPT with warm-up and cosine, a GAN,
          a policy gradient, each also with every fifth record only; examples/logs; with --health the sound runs of
          benchmarks/health.py from the folder of its --streams (`health.py --only healthy --seeds 5 --first-seed 300`)
warning   steps from the first warning after the fault to ruin, as in against_trainscope.py; negative: it came later
false     a warning in a sound run, or before the fault

A run that is in --streams already is judged again, not trained again. About 10 s a run on a quiet core.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from against_trainscope import CONTEXT, EVERY, FAULT_AT, SAFE_GAIN, STEPS, VOCABULARY, Change, Fundus, Text, ruin_step
from ssim import save
from torch import Tensor, nn
from torch.nn import functional

from tune_ssim.cli.log_arguments import open_log
from tune_ssim.probes import total_norm
from tune_ssim.records import LOSS, TOTAL_NORM
from tune_ssim.tasks.fundus_sr import FundusSR

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / "replay"))
DESIGN_SEEDS, JUDGED_SEEDS, LONG_SEEDS = (100, 101, 102), (0, 1, 200), (0, 1)
LONG, SPARSE = 1000, 5  # steps; records of which one is kept
BEFORE, IN_A_ROW = 50, 3  # records; a single bad batch is felt in two
TOP, MARGIN = 3, 1.75  # of the third largest record before; a margin of 1.25 gave a false alarm in the design runs, 1.5 to 2 none
TIMES = {LOSS: 1.03, TOTAL_NORM: 3.0}  # the median before, at least; design: a norm of 2.5 to 4 did the same
SAFE_DB = 1.0  # a recorded run is safe whose PSNR ends no further below its baseline's


@dataclass(frozen=True)
class Course(Change):
    """A `Change` whose factors may be functions of the step. prepare: changes the training before a step. config: of the bundled
    task, from the start."""

    lr: Any = 1.0
    weight: Any = 1.0
    prepare: Callable[[Any, int], None] = lambda training, step: None
    config: Any = None

    def at(self, factor: Any, step: int) -> float:
        return float(factor(step)) if callable(factor) else super().at(factor, step)


class Images(Fundus):
    def __init__(self, seed: int, config: Any = None) -> None:
        super().__init__(seed)
        if config is not None:
            self.task = FundusSR()
            self.task.setup({"steps": STEPS, "ssim_loss_weight": SAFE_GAIN, "ssim_loss_max_t": 1.0, **config}, seed)
            self.model, self.optimizer, self.batch = self.task.model, self.task.optimizer, self.task._batch
            self.lr = self.optimizer.param_groups[0]["lr"]
        self.drawn = self.batch

    def draw_by(self, batch: Callable[[int], Any]) -> None:
        self.batch = self.task._batch = batch


class Letters(Text):
    size, is_shuffled = 16, False

    def __init__(self, seed: int, config: Any = None) -> None:
        super().__init__(seed)

    def batch(self, text: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        at = torch.randint(len(text) - CONTEXT - 1, (self.size,), generator=generator)
        ids = torch.stack([text[i : i + CONTEXT + 1] for i in at])
        return torch.randint(VOCABULARY, ids.shape) if self.is_shuffled else ids


KINDS: dict[str, Any] = {"images": Images, "text": Letters}


def single_bad_batches(training: Any, step: int) -> None:
    """Two, twenty steps apart: images, noise and latents three times too large; random letters."""
    is_bad = step in (64, 84)
    if isinstance(training, Images):
        draw = training.drawn
        training.draw_by((lambda n: tuple(3 * one if at < 3 else one for at, one in enumerate(draw(n)))) if is_bad else draw)
    else:
        training.is_shuffled = is_bad


def batch_times(factor: float) -> Callable[[Any, int], None]:
    def prepare(training: Any, step: int) -> None:
        if step == FAULT_AT + 1 and isinstance(training, Images):
            training.draw_by(lambda n: training.drawn(int(factor * n)))
        elif step == FAULT_AT + 1:
            training.size = int(factor * training.size)

    return prepare


def harder_data(training: Any, step: int) -> None:
    """A curriculum: more noise (t becomes its root); Python instead of prose."""
    if step == FAULT_AT + 1 and isinstance(training, Images):

        def batch(n: int) -> Any:
            crops, low, z0, noise, t = training.drawn(n)
            return crops, low, z0, noise, t.sqrt()

        training.draw_by(batch)
    elif step == FAULT_AT + 1:
        text = "".join(path.read_text() for path in sorted(HERE.glob("*.py")))
        training.train = torch.tensor([ord(letter) % VOCABULARY for letter in text])


def layer_reshuffled(training: Any, step: int) -> None:
    if step == FAULT_AT + 1:
        with torch.no_grad():
            last = [weights for weights in training.model.parameters() if weights.ndim > 1][-1]
            last.copy_(last[torch.randperm(len(last), generator=torch.Generator().manual_seed(1))])


def weights_leak(training: Any, step: int) -> None:
    """Noise of a twentieth of their deviation is added to all weights before each step."""
    if step > FAULT_AT:
        with torch.no_grad():
            for weights in training.model.parameters():
                if weights.numel() > 1:
                    weights.add_(0.05 * float(weights.std()) * torch.randn(weights.shape))


def restarts(step: int) -> float:
    """Cosine to a twentieth within 60 steps, then anew (Loshchilov and Hutter 2017)."""
    return 0.05 + 0.95 * (1 + math.cos(math.pi * ((step - 1) % FAULT_AT) / FAULT_AT)) / 2


def cyclic(step: int) -> float:
    """A triangle between 1 and 3 with a period of 40 steps (Smith 2017)."""
    return 1 + 2 * (1 - abs((step % 40) / 20 - 1))


def of_both(course: Course) -> dict[str, Course]:
    return dict.fromkeys(KINDS, course)


FAULTS = {
    "rate": of_both(Course(lr=1000.0)),
    "weight": {"images": Course(weight=Fundus.ruins["weight"].weight), "text": Course(weight=1e8)},
    "data": of_both(Course(bad_data=True)),
    "rate at once": of_both(Course(lr=100.0, ramp=1)),
    "rate slowly": of_both(Course(lr=1000.0, ramp=60)),
    "ascent": of_both(Course(lr=lambda step: -1.0 if step > FAULT_AT else 1.0)),
    "layer reshuffled": of_both(Course(prepare=layer_reshuffled)),
    "weights leak": of_both(Course(prepare=weights_leak)),
}
SOUND = {
    "as it is": of_both(Course()),
    "weight annealed": {"images": Course(weight=2.0), "text": Course(weight=10.0)},
    "rate lowered": of_both(Course(lr=0.1)),
    "warm-up": of_both(Course(lr=lambda step: min(1.0, step / 40))),
    "restarts": of_both(Course(lr=restarts)),
    "single bad batches": of_both(Course(prepare=single_bad_batches)),
    "smaller batch": of_both(Course(prepare=batch_times(0.5))),
    "weight switched on": of_both(Course(weight=lambda step: 1.0 if step > FAULT_AT else 0.0)),
    "weight switched off": of_both(Course(weight=lambda step: 0.0 if step > FAULT_AT else 1.0)),
    "larger batch": of_both(Course(prepare=batch_times(4))),
    "cyclic rate": of_both(Course(lr=cyclic)),
    "harder data": of_both(Course(prepare=harder_data)),
    "gate": {"images": Course(config={"ssim_loss_max_t": 0.3})},
    "clipped": {"images": Course(config={"preset": "adamw_clip"})},
    "from random weights": {"images": Course(config={"pretrained": False, "preset": "adamw_clip", "lr": 1e-3})},
}
DESIGN = (*list(FAULTS)[:4], *list(SOUND)[:8])


def trained(kind: str, seed: int, course: Course, with_quality: bool) -> dict[str, Any]:
    training = KINDS[kind](seed, course.config)
    records, quality = [], {}
    for step in range(1, STEPS + 1):
        course.prepare(training, step)
        for group in training.optimizer.param_groups:
            group["lr"] = training.lr * course.at(course.lr, step)
        records.append({"step": step, **training.step(step, course)})
        if with_quality and step >= FAULT_AT and step % EVERY == 0:
            quality[step] = training.quality()
    return {"records": records, "quality": quality}


# ---- long sound trainings of other sorts: the loss and the norm of each step


def long_text(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The GPT, with 50 steps of warm-up and a cosine to zero."""
    training = Letters(seed)
    for step in range(1, LONG + 1):
        for group in training.optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, step / 50) * (1 + math.cos(math.pi * step / LONG)) / 2
        values = training.step(step, Change())
        yield torch.tensor(values[LOSS]), torch.tensor(values[TOTAL_NORM])


def gan(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Eight Gaussians on a ring; loss and norm of the generator."""
    torch.manual_seed(seed)
    generator = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    critic = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.5, 0.999)) for model in (generator, critic)]
    for _ in range(LONG):
        angle = torch.randint(8, (64,)) * math.pi / 4
        real = torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(64, 2)
        fake = generator(torch.randn(64, 4))
        optimizers[1].zero_grad()
        (functional.softplus(-critic(real)) + functional.softplus(critic(fake.detach()))).mean().backward()
        optimizers[1].step()
        optimizers[0].zero_grad()
        loss = functional.softplus(-critic(fake)).mean()
        loss.backward()
        yield loss.detach(), total_norm(generator.parameters())
        optimizers[0].step()


def policy_gradient(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """REINFORCE without a baseline on a walk of 12 steps over 9 places, rewarded at one end only."""
    torch.manual_seed(seed)
    policy = nn.Sequential(nn.Linear(9, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for _ in range(LONG):
        at, log_p, reward = torch.full((16,), 4), torch.zeros(16), torch.zeros(16)
        for _ in range(12):
            choice = torch.distributions.Categorical(logits=policy(functional.one_hot(at, 9).float()))
            action = choice.sample()
            log_p = log_p + choice.log_prob(action)
            at = (at + 2 * action - 1).clamp(0, 8)
            reward = reward + (at == 8)
        optimizer.zero_grad()
        loss = -(log_p * reward).mean()
        loss.backward()
        yield loss.detach(), total_norm(policy.parameters())
        optimizer.step()


LONG_KINDS = {"long text": long_text, "GAN": gan, "policy gradient": policy_gradient}


# ---- judging


def is_above(values: list[float], times: float) -> bool:
    """Whether the last IN_A_ROW of BEFORE + IN_A_ROW values are above the range of those before."""
    before = sorted(values[:BEFORE])
    middle = statistics.median(before)
    return min(values[BEFORE:]) > middle + max(MARGIN * (before[-TOP] - middle), (times - 1) * abs(middle))


def warnings(records: list[dict[str, float]]) -> list[int]:
    """The steps at which the rule begins to hold. Records that are not finite do not count."""
    rows = [row for row in records if math.isfinite(row[LOSS] + row[TOTAL_NORM])]
    found, held = [], False
    for end in range(BEFORE + IN_A_ROW, len(rows) + 1):
        window = rows[end - BEFORE - IN_A_ROW : end]
        holds = all(is_above([row[name] for row in window], times) for name, times in TIMES.items())
        if holds and not held:
            found.append(int(window[-1]["step"]))
        held = holds
    return found


def kept(streams: Path, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is in the file of this name, or else made and written to it."""
    file = streams / f"{name.replace(' ', '_')}.json"
    if not file.exists():
        found = make()
        file.write_text(json.dumps(found))
        print(f"{name}: {warnings(found['records'])}", flush=True)
    found = json.loads(file.read_text())
    return {**found, "quality": {int(step): value for step, value in found["quality"].items()}}


def of_seed(seed: int, names: tuple[str, ...], streams: Path) -> Iterator[dict[str, Any]]:
    for kind, training in KINDS.items():
        sound = None
        for is_fault, courses in ((False, SOUND), (True, FAULTS)):
            for name, by_kind in courses.items():
                if name not in names or kind not in by_kind:
                    continue
                course, needs_quality = by_kind[kind], is_fault or name == "as it is"
                made = lambda kind=kind, course=course, needed=needs_quality: trained(kind, seed, course, needed)  # noqa: E731
                run = kept(streams, f"{kind}-{name}-{seed}", made)
                sound = sound or run
                ruined = ruin_step(training, run, sound) if is_fault else None
                yield {
                    "run": f"{kind}: {name}",
                    "seed": seed,
                    "fault": is_fault,
                    "ruined": ruined,
                    "warned": warnings(run["records"]),
                }


def long_run(make: Callable[[int], Iterator[tuple[Tensor, Tensor]]], seed: int) -> dict[str, Any]:
    pairs = enumerate(make(seed), 1)
    return {"records": [{"step": step, LOSS: float(loss), TOTAL_NORM: float(norm)} for step, (loss, norm) in pairs], "quality": {}}


def sound_row(name: str, seed: int, records: list[dict[str, float]]) -> dict[str, Any]:
    return {"run": name, "seed": seed, "fault": False, "ruined": None, "warned": warnings(records)}


def long_runs(seed: int, streams: Path) -> Iterator[dict[str, Any]]:
    for name, make in LONG_KINDS.items():
        records = kept(streams, f"{name}-{seed}", lambda make=make: long_run(make, seed))["records"]
        yield sound_row(name, seed, records)
        yield sound_row(f"{name}, every {SPARSE}th record", seed, records[::SPARSE])


def recorded() -> Iterator[dict[str, Any]]:
    """The safe runs of benchmarks/replay/curves."""
    from curves import Curves

    for path in sorted((HERE / "replay" / "curves").glob("*.json")):
        curves = Curves.read(path)
        sound = {run.seed: run.values["evaluations"]["psnr"][-1] for run in curves.baselines}
        for run in curves.runs:
            if run.values["evaluations"]["psnr"][-1] > sound.get(run.seed, math.inf) - SAFE_DB:
                pairs = zip(run.values["steps"]["loss"], run.values["steps"]["total_norm"], strict=True)
                records = [{"step": step, LOSS: float(a), TOTAL_NORM: float(b)} for step, (a, b) in enumerate(pairs, 1)]
                yield sound_row(f"{curves.name}: gain {run.gain:g}, max_t {run.max_t:g}", run.seed, records)


def logs(health: Path | None) -> Iterator[dict[str, Any]]:
    for path in (HERE.parent / "examples" / "logs" / name for name in ("baseline.csv", "safe.csv")):
        source = open_log(str(path), {})
        records = [{"step": one.step, **one.values} for one in (*source.read(), *source.finish())]
        yield sound_row(path.name, 0, records)
    for path in sorted(health.glob("*healthy*.jsonl")) if health else ():
        seed = int(path.stem.rpartition("-")[2])
        yield sound_row(path.stem, seed, [json.loads(line) for line in path.read_text().splitlines()])


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    sound, ruined = [row for row in rows if not row["fault"]], [row for row in rows if row["ruined"] is not None]
    first = [next((step for step in row["warned"] if step > FAULT_AT), None) for row in ruined]
    leads = [row["ruined"] - step for row, step in zip(ruined, first, strict=True) if step is not None]
    return {
        "ruined": len(ruined),
        "warned": len(leads),
        "before_ruin": sum(lead > 0 for lead in leads),
        "median_warning_steps": statistics.median(leads) if leads else None,
        "least_and_most": [min(leads), max(leads)] if leads else None,
        "sound": len(sound),
        "false": sum(bool(row["warned"]) for row in sound),
        "before_the_fault": sum(any(step <= FAULT_AT for step in row["warned"]) for row in rows if row["fault"]),
        "faults_without_ruin": sum(row["fault"] and row["ruined"] is None for row in rows),
    }


def shared_with_trainscope(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The judged runs of the kinds and seeds that benchmarks/against_trainscope.py has."""
    kinds = {f"{kind}: {name}" for kind in KINDS for name in (*Fundus.ruins, *Fundus.sound)}
    return [row for row in rows if row["run"] in kinds and row["seed"] in (0, 1)]


def markdown(design: dict[str, Any], judged: dict[str, Any], shared: dict[str, Any]) -> list[str]:
    """The rows of the table of docs/measurements.md."""
    lines = []
    for name, one in (("design", design), ("judged", judged), ("of these, the kinds and seeds of the table above", shared)):
        least, most = one["least_and_most"]
        warning = f"{one['median_warning_steps']:g} ({least}, {most})"
        false = f"{one['false']} of {one['sound']}"
        lines.append(f"| {name} | {one['warned']} of {one['ruined']} | {one['before_ruin']} | {warning} | {false} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=Path, default=Path(tempfile.gettempdir()) / "tune_ssim_early_warning")
    parser.add_argument("--health", type=Path, help="folder of benchmarks/health.py --streams")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "early_warning.json")
    arguments = parser.parse_args()
    arguments.streams.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    everything = (*FAULTS, *SOUND)
    design = [row for seed in DESIGN_SEEDS for row in of_seed(seed, DESIGN, arguments.streams)] + list(recorded())
    judged = [row for seed in JUDGED_SEEDS for row in of_seed(seed, everything, arguments.streams)]
    judged += [row for seed in LONG_SEEDS for row in long_runs(seed, arguments.streams)] + list(logs(arguments.health))
    rows = {"design": design, "judged": judged}
    found = {name: summary(of_set) for name, of_set in rows.items()}
    save(arguments.output, {**found, "runs": {"design": [r for r in design if r["fault"] or r["warned"]], "judged": judged}})
    print("\n".join(markdown(found["design"], found["judged"], summary(shared_with_trainscope(judged)))))
    print("\n".join(f"false: {row}" for row in (*design, *judged) if not row["fault"] and row["warned"]))


if __name__ == "__main__":
    main()
