"""Do the rule packs tell healthy trainings from ruined ones? Real runs of the three tasks `vae_kl`, `flow_dino_kl` and
`two_stage_vlm`, sound and with one fault each, several seeds; each run's records go through the task's pack.

    python benchmarks/health.py [--systems vae_kl …] [--seeds 5] [--first-seed 0] [--only TEXT] [--streams DIR] [--output FILE]

A fault sits where it would in a user's code: in the configuration, in what is frozen or detached, in the labels. The records
of every run are kept in `--streams` as JSON lines (`tune-ssim check` reads them too); a run that is there already is judged
again, not trained again.

ruined    a ruinous setting of the notes, or a fault. caught: the pack says anything; by name: a rule that knows this fault
healthy   sound settings. false alarm: the pack says anything
refused   the task itself would not start (BadSetup): counted as caught, and listed apart

About 5 to 15 s a run on a quiet core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from ssim import save

from tune_ssim.base.errors import BadSetup
from tune_ssim.guards.log_check import LogCheck
from tune_ssim.guards.rule_pack import load_rules
from tune_ssim.records import Record
from tune_ssim.tasks import two_stage_vlm
from tune_ssim.tasks.flow_dino_kl import FlowDinoKL
from tune_ssim.tasks.two_stage_vlm import TwoStageVLM
from tune_ssim.tasks.vae_kl import VAEKL
from tune_ssim.trials.checkpoint import save_checkpoint

SYSTEMS: dict[str, type] = {"vae_kl": VAEKL, "flow_dino_kl": FlowDinoKL, "two_stage_vlm": TwoStageVLM}
SHOWN_RULES = 4  # in a row of the table in docs/tasks.md
STEPS = {"vae_kl": 600, "flow_dino_kl": 400, "two_stage_vlm": 1016}
# What a user would tell the pack about a sound training: a quarter of the 16 latents, when the KL has risen, two micro-batches, the
# warm-up's middle.
OPTIONS: dict[str, dict[str, float]] = {
    "vae_kl": {"units_floor": 4, "kl_after": 100},
    "flow_dino_kl": {"ga": 2, "dino_after": 50, "kl_after": 100},
    "two_stage_vlm": {},
}


@dataclass(frozen=True)
class Case:
    """One way to train. known_by: the rules that name this fault; empty: it is healthy. fault: changes the task after its
    set-up. options: of the pack, where they differ."""

    system: str
    config: Mapping[str, Any] = field(default_factory=dict)
    known_by: tuple[str, ...] = ()
    fault: Callable[[Any], None] = lambda task: None
    options: Mapping[str, float] = field(default_factory=dict)
    starts_ruined: bool = False  # stage 2 from what a ruined stage 1 has left


def freeze(*names: str) -> Callable[[Any], None]:
    """These modules do not train, though the optimiser has them."""

    def apply(task: Any) -> None:
        for name in names:
            owner, _, path = name.partition(".")
            getattr(task, owner).get_submodule(path).requires_grad_(False)

    return apply


def detach(name: str) -> Callable[[Any], None]:
    """No gradient passes out of this module's outputs."""

    def apply(task: Any) -> None:
        owner, _, path = name.partition(".")
        getattr(task, owner).get_submodule(path).register_forward_hook(lambda module, inputs, output: output.detach())

    return apply


def unmask_labels(task: Any) -> None:
    """Every position counts: visual tokens, question, padding."""
    masked = task._dialogues

    def unmasked(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids, labels = masked(*arguments)
        return ids, ids.to(labels.device)

    task._dialogues = unmasked


def thaw_language(task: Any) -> None:
    """The language model trains, in a copy of the training script that does not check."""
    task.language.requires_grad_(True)
    task._require_frozen = lambda: None
    task.trainable_parameters = lambda: [
        *task.vision.parameters(), *task.bridge.parameters(), *task.language.parameters()
    ]  # fmt: skip
    task.optimizer = task._optimizer(task.config.lr)


STAGE_2 = {"stage1_steps": 0}
# A hundred times the sound learning rate, for five epochs: note 003 had ten times, overnight. (3e-4 leaves 0.0027 after five.)
COLLAPSE: dict[str, Any] = {"steps": 635, "stage1_steps": 635, "stage1_lr": 1e-3}
CASES: dict[str, Case] = {
    "vae_kl/healthy": Case("vae_kl"),
    "vae_kl/healthy, beta1 0.9": Case("vae_kl", {"beta1": 0.9}),
    "vae_kl/healthy, cyclical": Case("vae_kl", {"kl_alpha": 0.002, "kl_schedule": "cyclical"}),
    "vae_kl/KL off": Case("vae_kl", {"kl_alpha": 0.0}, ("kl_rising", "kl_hidden", "prior_missed")),
    "vae_kl/KL too weak": Case("vae_kl", {"kl_alpha": 1e-5}, ("kl_rising", "kl_hidden", "prior_missed")),
    "vae_kl/KL vanishing (note: 0.01)": Case("vae_kl", {"kl_alpha": 0.01}, ("kl_vanished", "units_dead")),
    "vae_kl/KL too strong": Case("vae_kl", {"kl_alpha": 1.0}, ("kl_vanished", "units_dead", "recon_flat")),
    "vae_kl/LR too small": Case("vae_kl", {"lr": 1e-7}, ("recon_flat", "no_update", "small_updates")),
    "vae_kl/LR too large": Case("vae_kl", {"lr": 0.3}, ("recon_flat", "kl_vanished", "kl_rising", "non_finite")),
    "vae_kl/log_var unclamped": Case(
        "vae_kl", {"lr": 0.03, "kl_alpha": 1e-5, "kl_max_variance": None}, ("kl_rising", "kl_hidden", "prior_missed", "non_finite")
    ),
    "vae_kl/frozen decoder": Case("vae_kl", {}, ("coverage:decoder", "no_update:decoder", "recon_flat"), freeze("decoder.body")),
    "vae_kl/detached encoder": Case(
        "vae_kl", {}, ("coverage:mu_head", "kl_vanished", "no_update:mu_head"), detach("encoder.mu_head")
    ),
    "flow_dino_kl/healthy": Case("flow_dino_kl"),
    "flow_dino_kl/healthy, weaker DINO": Case("flow_dino_kl", {"dino_alpha": 0.1}),
    "flow_dino_kl/frozen flow": Case(
        "flow_dino_kl", {}, ("coverage:flow", "flow_stuck", "no_update:flow"), freeze("networks.flow")
    ),
    "flow_dino_kl/frozen logvar head": Case(
        "flow_dino_kl", {}, ("coverage:logvar_head", "no_update:logvar_head"), freeze("networks.logvar_head")
    ),
    "flow_dino_kl/detached mu head": Case("flow_dino_kl", {}, ("coverage:mu_head",), detach("networks.mu_head")),
    "flow_dino_kl/detached DINO head": Case(
        "flow_dino_kl", {}, ("coverage:dino_t_head", "dino_stuck"), detach("networks.dino_t_head")
    ),
    "flow_dino_kl/DINO ablated by mistake": Case("flow_dino_kl", {"ablate": "dino"}, ("coverage:dino_t_head", "dino_stuck")),
    "flow_dino_kl/GA mismatch": Case(
        "flow_dino_kl", {"accumulation": 1}, tuple(f"coverage:{tag}" for tag in ("flow", "mu_head", "logvar_head"))
    ),
    "flow_dino_kl/LR too small": Case(
        "flow_dino_kl", {"lr": 1e-8}, ("flow_stuck", "no_update:flow", "small_updates:flow", "dino_stuck")
    ),
    "flow_dino_kl/LR too large": Case(
        "flow_dino_kl", {"lr": 0.3}, ("flow_unstable", "flow_stuck", "z_var_high", "z_mean", "non_finite")
    ),
    "flow_dino_kl/DINO too early": Case(
        "flow_dino_kl", {"dino_alpha": 100.0, "dino_warmup": 0.0}, ("dino_pushes", "dino_stuck", "flow_stuck", "flow_unstable")
    ),
    "flow_dino_kl/KL too weak": Case(
        "flow_dino_kl", {"kl_weight": 0.0}, ("kl_idle", "kl_rising", "z_var_low", "z_var_high", "z_mean")
    ),
    "flow_dino_kl/KL too strong": Case(
        "flow_dino_kl", {"kl_weight": 1.0}, ("kl_vanished", "z_var_low", "dino_stuck", "flow_stuck")
    ),
    "flow_dino_kl/log_var unclamped": Case(
        "flow_dino_kl",
        {"kl_weight": 0.0, "kl_max_variance": None, "lr": 0.03},
        ("kl_rising", "z_var_high", "z_mean", "non_finite"),
    ),
    "two_stage_vlm/healthy": Case("two_stage_vlm"),
    "two_stage_vlm/healthy, stage 2 from scratch": Case("two_stage_vlm", STAGE_2),
    "two_stage_vlm/proxy collapse": Case("two_stage_vlm", COLLAPSE, ("proxy_ruined", "proxy_vanishing")),
    "two_stage_vlm/label mask off": Case(
        "two_stage_vlm", STAGE_2, ("labels_unmasked", "caption_masking", "caption_too_low"), unmask_labels
    ),
    "two_stage_vlm/LLM not frozen": Case("two_stage_vlm", STAGE_2, ("llm_not_frozen",), thaw_language),
    "two_stage_vlm/stage 2 from ruined stage 1": Case("two_stage_vlm", STAGE_2, ("refused",), starts_ruined=True),
    "two_stage_vlm/LR too small": Case(
        "two_stage_vlm", {**STAGE_2, "lr": 1e-7}, ("caption_slow_5", "caption_stuck", "small_updates")
    ),
    "two_stage_vlm/LR too large": Case(
        "two_stage_vlm", {**STAGE_2, "lr": 1.0}, ("tokens_blown_up", "caption_slow_5", "caption_stuck")
    ),
    "two_stage_vlm/frozen vision": Case(
        "two_stage_vlm", STAGE_2, ("coverage:vision", "no_update:vision"), freeze("vision.body", "vision.norm")
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--streams", type=Path, default=Path(tempfile.gettempdir()) / "tune_ssim_health")
    parser.add_argument("--judge-only", action="store_true", help="train nothing: judge the runs that are there")
    parser.add_argument("--markdown", action="store_true", help="print the table as docs/tasks.md has it")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "health.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    started, runs = time.perf_counter(), []
    for seed in range(
        arguments.first_seed, arguments.first_seed + arguments.seeds
    ):  # all cases of one seed first: whatever time allows is a whole table
        for name, case in CASES.items():
            if case.system not in arguments.systems or arguments.only not in name:
                continue
            file = arguments.streams / f"{name.replace('/', '-').replace(' ', '_')}-{seed}.jsonl"
            if not file.exists() and not arguments.judge_only:
                train(case, seed, file)
            if file.exists():
                run = {"case": name, "seed": seed, "healthy": not case.known_by, **judge(case, file)}
                runs.append(run)
                console.print(f"{name}, seed {seed}: {', '.join(run['said']) or 'nothing'} ({run['trained_s']} s)", highlight=False)
    result = {"what": __doc__.splitlines()[0], "seconds": round(time.perf_counter() - started, 1), **counts(runs)}
    said: dict[str, dict[str, str]] = {}
    for run in runs:
        firsts = sorted(run["said"].items(), key=lambda one: one[1])
        said.setdefault(run["case"], {})[str(run["seed"])] = ", ".join(f"{rule} {step}" for rule, step in firsts)
    save(arguments.output, {**result, "by_case": by_case(runs), "said_first_at": said})
    console.print(table(runs))
    if arguments.markdown:
        print("\n".join(markdown(by_case(runs))))
    console.print({key: value for key, value in result.items() if key != "what"})


def train(case: Case, seed: int, file: Path) -> None:
    """The records of one run, one JSON object a line; a task that refuses to go on leaves its words in the last."""
    started, lines = time.process_time(), []
    config = {"steps": STEPS[case.system], **case.config}
    refused = None
    with tempfile.TemporaryDirectory() as folder:
        try:
            if case.starts_ruined:
                config["vision_checkpoint"] = str(ruined_stage1(Path(folder), seed))
            task = SYSTEMS[case.system]()
            task.setup(config, seed, "cpu")
            case.fault(task)
            for step in range(1, config["steps"] + 1):
                lines.append({"step": step, **{name: float(value) for name, value in task.step().items()}})
        except BadSetup as error:
            refused = str(error)
    trained = round(time.process_time() - started, 1)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    unfinished.write_text("".join(json.dumps(line) + "\n" for line in lines))
    file.with_suffix(".json").write_text(json.dumps({"trained_s": trained, "refused": refused}))
    unfinished.replace(file)


def ruined_stage1(folder: Path, seed: int) -> Path:
    """What the proxy collapse leaves behind."""
    task = TwoStageVLM()
    task.setup(COLLAPSE, seed, "cpu")
    for _ in range(COLLAPSE["steps"]):
        task.step()
    epoch = task.epoch_losses
    assert sum(epoch) / len(epoch) < two_stage_vlm.RUINED_PROXY, "the stage 1 of this case must be ruined"
    save_checkpoint(folder / "stage1", {"task": task.state_dict()})
    return folder / "stage1"


def judge(case: Case, file: Path) -> dict[str, Any]:
    """What the pack of the case's system says about a run."""
    about = json.loads(file.with_suffix(".json").read_text())
    records = [Record(int(line.pop("step")), line) for line in map(json.loads, file.read_text().splitlines())]
    pack = load_rules(case.system, {**OPTIONS[case.system], **case.options})
    check = LogCheck([pack])
    said: dict[str, int] = {}
    for alert in check.feed(records):
        said.setdefault(alert.violation.guard, alert.violation.step)
    if about["refused"]:
        said["refused"] = len(records)
    known = [name for name in said if any(is_known(name, rule) for rule in case.known_by)]
    return {"said": said, "by_name": known, "trained_s": about["trained_s"], "refused": about["refused"]}


def is_known(guard: str, rule: str) -> bool:
    """Guards of a pack are called `pack/rule` or `pack/rule:tag`; of a rule with several tags `rule` alone means all."""
    said = guard.rpartition("/")[2]
    return said == rule or said.partition(":")[0] == rule


def counts(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The confusion table, and how often a fault was called by its name."""
    ruined, healthy = ([run for run in runs if run["healthy"] is is_healthy] for is_healthy in (False, True))
    caught = [run for run in ruined if run["said"]]
    false_alarms = [run for run in healthy if run["said"]]
    return {
        "runs": len(runs),
        "ruined": {"caught": len(caught), "missed": len(ruined) - len(caught), "by name": sum(bool(r["by_name"]) for r in ruined)},
        "healthy": {"quiet": len(healthy) - len(false_alarms), "false alarms": len(false_alarms)},
        "recall": round(len(caught) / len(ruined), 4) if ruined else None,
        "precision": round(len(caught) / (len(caught) + len(false_alarms)), 4) if caught else None,
    }


def by_case(runs: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in dict.fromkeys(run["case"] for run in runs):
        mine = [run for run in runs if run["case"] == name]
        firsts = [min(run["said"].values()) for run in mine if run["said"]]
        rules = sorted({rule for run in mine for rule in run["said"]})
        found[name] = {
            "healthy": mine[0]["healthy"], "runs": len(mine), "alarms": len(firsts),
            "by_name": sum(bool(run["by_name"]) for run in mine),
            "first_step": [min(firsts), max(firsts)] if firsts else None, "rules": rules,
        }  # fmt: skip
    return found


def table(runs: list[dict[str, Any]]) -> Table:
    shown = Table("case", "runs", "alarms", "by name", "first step", "rules that spoke")
    for name, row in by_case(runs).items():
        first = "–" if row["first_step"] is None else "–".join(map(str, dict.fromkeys(row["first_step"])))
        wrong = row["alarms"] if row["healthy"] else row["runs"] - row["alarms"]
        named = "" if row["healthy"] else str(row["by_name"])
        cells = (name, str(row["runs"]), str(row["alarms"]), named, first, ", ".join(row["rules"]))
        shown.add_row(*cells, style="red" if wrong else None)
    return shown


def markdown(cases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["| case | caught | first alert at step | by |", "|---|---|---|---|"]
    for name, row in cases.items():
        first = "–" if row["first_step"] is None else "–".join(map(str, dict.fromkeys(row["first_step"])))
        rules = [f"`{rule.split('/')[-1]}`" for rule in row["rules"]]
        said = ", ".join(rules[:SHOWN_RULES]) + (" …" if len(rules) > SHOWN_RULES else "") if rules else "–"
        false = " (false)" if row["healthy"] and row["alarms"] else ""
        lines.append(f"| {name.replace('/', ': ', 1)} | {row['alarms']} of {row['runs']}{false} | {first} | {said} |")
    return lines


if __name__ == "__main__":
    main()
