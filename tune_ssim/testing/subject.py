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
                    return f"step {n}: {name} is there in one run only"
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


def digests(value: Any, name: str = "", depth: int = 0) -> dict[str, str]:
    """Digests of every tensor, number and text in nested containers and in objects with a state_dict(), by place."""
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous()
        return {name: hashlib.sha256(data.reshape(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b"").hexdigest()}
    if isinstance(value, (bool, int, float, str)) or value is None:
        return {name: repr(value)}
    if depth > 6:
        return {}
    if isinstance(value, Mapping):
        pairs = [(f"{name}[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        pairs = [(f"{name}[{i}]", item) for i, item in enumerate(value)]
    elif callable(getattr(value, "state_dict", None)):
        try:
            pairs = [(name, value.state_dict())]
        except Exception:  # some state_dict() may raise; the digests only serve as a hint
            return {}
    else:
        return {}
    found: dict[str, str] = {}
    for place, item in pairs:
        found |= digests(item, place, depth + 1)
    return found


def attributes(task: Any) -> dict[str, str]:
    """Digests of an instance's attributes, by name."""
    found = {}
    for name, value in dict(getattr(task, "__dict__", {})).items():
        if parts := digests(value, name):
            found[name] = hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()
    return found
