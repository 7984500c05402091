"""The task under test: instances of it, its steps as numbers, and what its own code does wrong as a sentence."""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tune_ssim.base.errors import UserError
from tune_ssim.trials.training import as_training

Numbers = dict[str, float]


class Fault(Exception):
    """The task's own code fails. remedy: what to do about it."""

    def __init__(self, sentence: str, remedy: str) -> None:
        super().__init__(sentence)
        self.remedy = remedy


class Refused(Exception):
    """setup() does not accept these settings, and says so as the contract wants it."""


@dataclass(frozen=True)
class Subject:
    """A task's class and what it is set up with. Instances are made one after the other: two models may not fit into memory."""

    task_class: type
    config: Mapping[str, Any]
    seed: int
    device: str | None
    still: Mapping[str, Any]  # settings that switch the update off
    broken_methods: frozenset[str] = frozenset()  # absent or with a wrong signature: said once, not called
    accepted: dict[Any, bool] = field(default_factory=dict, compare=False)  # settings that were tried on setup()

    @property
    def exact(self) -> bool:
        """On a CPU equal means to the bit; kernels of an accelerator add in any order."""
        return self.device == "cpu" or not torch.accelerator.is_available()

    def make(self, settings: Mapping[str, Any] | None = None, *, seed: int | None = None, chance: int = 0) -> Any:
        """A new instance, set up while the global generators stand at `chance`. Raises Refused or Fault."""
        task = as_training(self.task_class())
        set_global_generators(chance)
        self.set_up(task, settings, seed=seed)
        return task

    def set_up(self, task: Any, settings: Mapping[str, Any] | None = None, *, seed: int | None = None) -> None:
        config = {**self.config, **(settings or {})}
        try:
            task.setup(config, self.seed if seed is None else seed, self.device)
        except (UserError, ValueError) as error:
            raise Refused(short(error)) from None
        except (Exception, SystemExit) as error:
            raise fault(task, "setup", error) from None

    def call(self, task: Any, method: str, *arguments: Any) -> Any:
        """Raises Fault where the method fails."""
        try:
            return getattr(task, method)(*arguments)
        except (Exception, SystemExit) as error:
            raise fault(task, method, error) from None

    def steps(self, task: Any, count: int, *, shake: bool = False) -> list[Numbers]:
        """The next `count` steps as numbers; `shake`: somebody else uses the global generators between them."""
        made = []
        for n in range(count):
            if shake:
                set_global_generators(1000 + n)
            made.append(as_numbers(self.call(task, "step")))
        return made

    def difference(self, one: Sequence[Numbers], other: Sequence[Numbers], first: int = 1) -> str:
        """Where two runs part, in words; empty if they do not."""
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


def as_numbers(metrics: Any) -> Numbers:
    """A step's metrics on the host; what is no number is left out (and found by the check of `step()`)."""
    found: Numbers = {}
    for name, value in metrics.items() if isinstance(metrics, Mapping) else ():
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            found[str(name)] = float(value.detach() if isinstance(value, torch.Tensor) else value)
    return found


def fault(task: Any, method: str, error: BaseException) -> Fault:
    """The sentence of an exception, with the line of the user's own file where it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = Path(str(getattr(sys.modules.get(type(task).__module__), "__file__", "")))
    place = next((frame for frame in reversed(frames) if own.name and Path(frame.filename) == own), frames[-1])
    where = f"{Path(place.filename).name}:{place.lineno}"
    return Fault(f"{method}() failed: {short(error)} ({where})", f"mend {where}, in {place.name}()")


def short(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    if isinstance(error, (UserError, ValueError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def set_global_generators(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # the very generator that tasks misuse


@contextlib.contextmanager
def global_generators_kept() -> Iterator[None]:
    """Whoever calls the suite finds the generators as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def digests(value: Any, name: str = "", depth: int = 0) -> dict[str, str]:
    """Of every tensor, number and text in nested containers and in objects with a state_dict(): place → digest."""
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
        except Exception:  # not every state_dict() can be called: it is for a hint only
            return {}
    else:
        return {}
    found: dict[str, str] = {}
    for place, item in pairs:
        found |= digests(item, place, depth + 1)
    return found


def attributes(task: Any) -> dict[str, str]:
    """Digests of what an instance keeps, by the name of the attribute."""
    found = {}
    for name, value in dict(getattr(task, "__dict__", {})).items():
        if parts := digests(value, name):
            found[name] = hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()
    return found
