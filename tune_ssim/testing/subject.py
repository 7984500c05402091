"""The class under test: instances whose runs are compared step by step."""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tune_ssim.base.errors import UserError
from tune_ssim.before_launch.preflight.subject import Failure, Subject, call, numbers
from tune_ssim.trials.training import Training

Numbers = dict[str, float]


@dataclass(frozen=True)
class ClassUnderTest(Subject):
    """A subject whose runs are compared. broken_methods: missing or with a wrong signature; reported once, never called."""

    broken_methods: frozenset[str] = frozenset()
    accepted: dict[str, bool] = field(default_factory=dict, compare=False)  # settings that were tried on setup()

    @property
    def exact(self) -> bool:
        """Whether equal runs must agree bit for bit, as on a CPU. Kernels of an accelerator sum in any order."""
        return self.device == "cpu" or not torch.accelerator.is_available()

    def make(self, settings: Mapping[str, Any] | None = None, seed: int | None = None, chance: int = 0) -> Training:
        """A new instance, set up with the global generators seeded with `chance`."""
        set_global_generators(chance)
        return super().make(settings, seed)

    def unmoved(self, settings: Mapping[str, Any]) -> Training:
        """An instance whose steps do not change the weights, if its update can be switched off. Otherwise use its first step."""
        return self.make({**settings, **self.disable_update} if self.accepts(self.disable_update) else settings)

    def accepts(self, settings: Mapping[str, Any]) -> bool:
        key = repr(sorted(settings.items()))
        if key not in self.accepted:
            try:
                self.make(settings)
                self.accepted[key] = True
            except (UserError, Failure):
                self.accepted[key] = False
        return self.accepted[key]

    def steps(self, task: Training, count: int, *, shake: bool = False) -> list[Numbers]:
        """Metrics of the next `count` steps. `shake`: whether the global generators are reseeded between them."""
        made = []
        for n in range(count):
            if shake:
                set_global_generators(1000 + n)
            made.append(numbers(call(task, "step")))
        return made

    def difference(self, one: Sequence[Numbers], other: Sequence[Numbers], first: int = 1) -> str:
        """The first difference of two runs; empty if there is none."""
        for n, (a, b) in enumerate(zip(one, other, strict=False), first):
            for name in sorted(a.keys() | b.keys()):
                if name not in a or name not in b:
                    return f"step {n}: only one run records {name}"
                if not self.same(a[name], b[name]):
                    return f"step {n}: {name} {a[name]:.9g} against {b[name]:.9g}"
        return ""

    def same(self, a: float, b: float) -> bool:
        if self.exact or not (math.isfinite(a) and math.isfinite(b)):
            return a == b or (math.isnan(a) and math.isnan(b))
        return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-6)  # float32 sums of a few steps in another order


def set_global_generators(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # the global generator that tasks may misuse


@contextlib.contextmanager
def global_generators_kept() -> Iterator[None]:
    """Restores the global generators at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def attributes(task: Any) -> dict[str, str]:
    """A digest of each attribute of an instance that holds tensors, numbers or texts, by name."""
    found = {name: _content(value) for name, value in vars(task).items()}
    return {name: hashlib.sha256(content.encode()).hexdigest() for name, content in found.items() if content}


def _content(value: Any, depth: int = 0) -> str:
    """Tensors, numbers and texts in nested containers and in objects with a state_dict(), as text; empty if there are none."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
    if isinstance(value, (bool, int, float, str)) or value is None:
        return repr(value)
    if callable(getattr(value, "state_dict", None)):
        try:
            value = value.state_dict()
        except Exception:  # the digest is only a hint
            return ""
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    parts = {key: _content(item, depth + 1) for key, item in value.items()} if isinstance(value, Mapping) and depth < 7 else {}
    return repr({key: part for key, part in parts.items() if part}) if any(parts.values()) else ""
