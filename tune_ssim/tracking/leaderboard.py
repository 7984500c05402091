"""Texts of a study in MLflow: the names of its runs, and the table in the description of the parent run."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tune_ssim.guards.verdict import Verdict
from tune_ssim.results.events import Event, gain
from tune_ssim.results.trial_text import format_objective, metric_label
from tune_ssim.study.objective import DEFAULT_OBJECTIVE, OBJECTIVE, Goal, Objective
from tune_ssim.tracking.mlflow_internals import MAX_NAME_LENGTH, MAX_NOTE_LENGTH, run_page, runs_page

Summary = Mapping[str, Any]  # a trial's summary as an event holds it; a foreign trainable's verdict may be "unjudged"
OTHER_COLUMNS = {"PSNR": ("psnr", ".2f"), "norm ratio": ("norm_ratio_max", ".3g")}  # heading → metric, format; if any trial has it


@dataclass
class Leaderboard:
    """The trials of a study, collected from its events."""

    name: str
    also: Sequence[Goal] = ()  # further objectives
    note: str = ""
    has_ended: bool = False
    roles: dict[str, str] = field(default_factory=dict)
    configs: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    summaries: dict[str, Summary] = field(default_factory=dict)

    def add(self, event: Event) -> None:
        if event.event == "study":
            self.name, self.note, self.has_ended = event.name or self.name, event.note, False
        elif event.event == "trial":
            self.roles[event.trial_id], self.configs[event.trial_id] = event.role, event.config
        elif event.event == "verdict":
            self.summaries[event.trial_id] = event.summary
        elif event.event == "end":
            self.has_ended = True

    def run_name(self, trial_id: str) -> str:
        """gain 1 @ t≤0.3 · safe · ΔSSIM +0.0084"""
        seed = self.summaries.get(trial_id, {}).get("seed")
        parts = [_setting(self.roles.get(trial_id, "search"), self.configs.get(trial_id, {}), seed) or trial_id]
        if (summary := self.summaries.get(trial_id)) is not None:
            evidence, verdict = summary.get("evidence") or {}, summary["verdict"]
            if verdict == "pruned" and evidence.get("guard"):
                verdict = f"pruned by {evidence['guard']} at {evidence.get('step')}"
            parts.append("bad setup" if verdict == "bad_setup" else verdict)
            if (result := _result(summary)) and summary.get("role") != "baseline":
                parts.append(result)
        return " · ".join(parts)[:MAX_NAME_LENGTH]

    def study_name(self) -> str:
        """fundus-ssim: best gain 1 @ t≤0.3, ΔSSIM +0.0084"""
        if not self.summaries:
            return self.name
        best = next((one for _, one in self.ranked() if one["verdict"] == "safe" and _is_improved(one)), None)
        if best is None:
            return f"{self.name}: no safe setting {'found' if self.has_ended else 'yet'}"[:MAX_NAME_LENGTH]
        return f"{self.name}: best {_setting('search', best.get('config') or {})}, {_result(best)}"[:MAX_NAME_LENGTH]

    def ranked(self) -> list[tuple[str, Summary]]:
        """Sorted by verdict, then by the objective, best first; baselines last."""

        def place(item: tuple[str, Summary]) -> tuple[bool, int, float]:
            summary = item[1]
            rank = {verdict.value: verdict.rank for verdict in Verdict}.get(summary["verdict"], len(Verdict))
            objective = _objective(summary)
            return summary.get("role") == "baseline", rank, objective.rank(_metrics(summary).get(objective.name, math.nan))

        return sorted(self.summaries.items(), key=place)

    def text(self, experiment_id: str, share_key: str, runs: Mapping[str, str]) -> str:
        """Markdown: the result in one sentence, then a table whose rows link to the runs. `runs`: trial_id → run_id."""
        counts = Counter(one["verdict"] for one in self.summaries.values() if one.get("role") != "baseline")
        verdicts = ", ".join(f"{n} {verdict}" for verdict, n in counts.items()) or "no trial has ended yet"
        objective = next((_objective(summary) for summary in self.summaries.values()), DEFAULT_OBJECTIVE)
        goals: tuple[Goal, ...] = (objective, *self.also)
        columns = {metric_label(goal.name): (goal.name, "+.4f" if goal.is_delta else ".5g") for goal in goals} | {
            heading: (name, form)
            for heading, (name, form) in OTHER_COLUMNS.items()
            if any(name in _metrics(summary) for summary in self.summaries.values())
        }
        lines = [
            f"**{_cell(self.study_name())}** ({verdicts}). [All trials, best first]({runs_page(experiment_id, share_key)})",
            "",
            *([self.note, ""] if self.note else []),
            f"| setting | verdict | reason | {' | '.join(map(_cell, columns))} |",
            "|---" * (3 + len(columns)) + "|",
        ]
        text = "\n".join(lines)
        for n, row in enumerate(self._rows(list(columns.values()), experiment_id, runs)):
            if len(text) + len(row) > MAX_NOTE_LENGTH - 60:
                text += f"\n\n… and {len(self.summaries) - n} more in the table of runs."
                break
            text += f"\n{row}"
        return text[:MAX_NOTE_LENGTH]

    def _rows(self, columns: Sequence[tuple[str, str]], experiment_id: str, runs: Mapping[str, str]) -> Iterator[str]:
        """columns: (metric, format)."""
        for trial_id, summary in self.ranked():
            metrics = _metrics(summary)
            config = {**self.configs.get(trial_id, {}), **(summary.get("config") or {})}
            setting = _setting(summary.get("role") or "search", config, summary.get("seed")) or trial_id
            cells = [
                f"[{_cell(setting)}]({run_page(experiment_id, runs.get(trial_id, ''))})",
                summary["verdict"],
                _cell(shortened(str(summary.get("reason") or ""), 160)),
                *(_cell_number(metrics.get(name), form) for name, form in columns),
            ]
            yield f"| {' | '.join(cells)} |"


def number(value: Any) -> float | None:
    """A value as float, including the strings that `jsonable` writes for NaN and infinities; None if it is not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def plain(value: Any) -> str:
    """A value as text, the same for 1.0 and 1; 0.1 · 0.01 gives 0.001."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return str(value)
    if isinstance(value, (int, float)):
        return f"{value:.12g}" if abs(value) < 1e15 else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    return json.dumps(value, ensure_ascii=False, default=str)


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}"""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found.update(flattened(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _setting(role: str, config: Mapping[str, Any], seed: int | None = None) -> str:
    """`gain 30 @ t≤0.3`; of baselines and confirmations with their seed, since they differ in nothing else."""
    seed = config.get("seed", seed)
    of_seed = "" if seed is None else f"seed {seed}"
    if role == "baseline":
        return f"baseline {of_seed}".strip()
    strength, max_t = gain(config), config.get("ssim_loss_max_t")
    if strength is None or max_t is None:
        return ", ".join(f"{key.rsplit('.', 1)[-1]} {plain(value)}" for key, value in flattened(config).items())[:100]
    setting = f"gain {strength:.4g} @ t≤{plain(max_t)}"
    return f"{role}: {setting} {of_seed}".strip() if role != "search" else setting


def _objective(summary: Summary) -> Objective:
    return Objective.of(str(summary.get("objective") or OBJECTIVE), str(summary.get("direction")))


def _metrics(summary: Summary) -> dict[str, float]:
    found = {name: number(value) for name, value in (summary.get("metrics") or {}).items()}
    return {name: value for name, value in found.items() if value is not None}


def _is_improved(summary: Summary) -> bool:
    objective, metrics = _objective(summary), _metrics(summary)
    return objective.name in metrics and objective.is_improved(metrics)


def _result(summary: Summary) -> str:
    """ΔSSIM +0.0084; empty if it was not measured"""
    name = _objective(summary).name
    value = _metrics(summary).get(name)
    return "" if value is None else f"{metric_label(name)} {format_objective(name, value)}".replace("-", "−")


def _cell(text: str) -> str:
    """Escapes text for a Markdown table, since a reason may contain anything."""
    return re.sub(r"([\\|\[\]<>`*_])", r"\\\1", " ".join(text.split()))


def _cell_number(value: Any, form: str) -> str:
    found = number(value)
    return "–" if found is None else format(found, form).replace("-", "−")
