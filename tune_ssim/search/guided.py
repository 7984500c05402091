"""Guided search: starts where the calibration predicts a useful push, and moves while that improves the objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tune_ssim.base.errors import UserError
from tune_ssim.base.numbers import is_number
from tune_ssim.before_launch.forecast import gain_at
from tune_ssim.guards.verdict import Verdict
from tune_ssim.probes.norm_model import NormModel, Prediction
from tune_ssim.results.study_folder import Skipped
from tune_ssim.search.search import Done, Outcome, Suggestion, Wait
from tune_ssim.study.domains import Choice, Domain
from tune_ssim.study.space import GAIN, MAX_T, Stage, gain_of, resolve_settings

START_RATIO = 3.0  # FACTS §6: one trial at 3 gave 97 % of the best at max_t 1.0, at 4 101 %, at 2 88 %, all of them safe
FACTOR = 2.0  # between neighbouring gains: FACTS §6, the objective is flat over a factor of 4 around its best
RETREAT = 4.0  # after a harmful trial: FACTS §2, from the first degraded gain to the best is a factor of 7
UNIT_STEP = 0.25  # of the quantiles of a further parameter, so that five trials cover its range


@dataclass(frozen=True)
class Axis:
    """One searched parameter as a line of positions. step: between neighbours. settle: neighbours at most this far apart need no
    trial between them. lower, upper: the ends."""

    name: str
    step: float
    settle: float
    lower: float
    upper: float
    retreat: float
    settings_at: Callable[[float], dict[str, Any]] = field(repr=False)

    def holds(self, place: float) -> bool:
        return self.lower - 1e-9 <= place <= self.upper + 1e-9


@dataclass
class _Try:
    """A trial of the search, at its place on the current axis."""

    place: float
    settings: dict[str, Any]
    outcome: Outcome | None = None

    @property
    def improvement(self) -> float:
        """-inf for a setting that is harmful, unknown, or was stopped since it cannot win."""
        outcome = self.outcome
        if outcome is None or outcome.verdict is not Verdict.SAFE or math.isnan(outcome.improvement):
            return -math.inf
        return outcome.improvement

    @property
    def is_harmful(self) -> bool:
        return self.outcome is not None and self.outcome.verdict is not None and self.outcome.verdict.speaks_against_setting


Round = list[tuple[_Try, str, tuple[int, float] | None]]  # trials to run side by side, why, and the rival of each
Walk = Generator[Round, None, Any]


class GuidedSearch:
    """Line search on the gain, in factors of two, from the predicted norm ratio `start_ratio` behind the widest gate.

    A harmful trial sends it to smaller gains. A safe one that is not effective sends it to larger ones (SEEDS A5). From an
    effective one it tries both neighbours, which are stopped at an intermediate evaluation if they are behind it there. It ends
    when no neighbour is better. A gate behind which nothing is effective is given up for the next narrower one. Then the other
    parameters of the space are searched in the same way, one after the other.

    stage: with a `gain`. model: the calibrated norm model. start: settings to start from, for the other parameters.
    noise_floor: the improvement that counts as effective must exceed it. limit, max_ratio: as in `OptunaSearch`.
    Raises UserError if no setting of the stage can be launched."""

    def __init__(
        self,
        stage: Stage,
        model: NormModel,
        *,
        start: Mapping[str, Any] | None = None,
        start_ratio: float = START_RATIO,
        noise_floor: Callable[[], float] = float,
        max_ratio: float | None = None,
    ) -> None:
        if GAIN not in stage.parameters:
            raise UserError(f"search.strategy: guided needs a space that searches {GAIN}; stage {stage.name!r} does not")
        self.stage, self.model, self.noise_floor = stage, model, noise_floor
        self.start_ratio, self.max_ratio = start_ratio, max_ratio
        self.skipped: list[Skipped] = []  # nothing is suggested that is not launched
        self._others = {
            name: _nearest(domain, (start or {}).get(name))
            for name, domain in stage.parameters.items()
            if name not in (GAIN, MAX_T)
        }
        self._problem = ""
        self._axes = {max_t: axis for max_t in self._gates() if (axis := self._gain_axis(max_t)) is not None}
        if not self._axes:
            raise UserError(f"stage {stage.name!r}: no setting can be launched: {self._problem}")
        self._tries: list[_Try] = []  # by slot
        self._queue: Round = []
        self._walk = self._search()
        self._reason = ""
        self.best: _Try | None = None

    @property
    def start(self) -> tuple[dict[str, Any], Prediction]:
        """The first setting, and its prediction."""
        max_t, axis = next(iter(self._axes.items()))
        settings = axis.settings_at(self._first_place(axis, max_t))
        return settings, self.model.predict_setting({**self.stage.fixed, **settings})

    # -- ask and tell

    def ask(self) -> Suggestion | Wait | Done:
        if not self._queue and not self._reason:
            if any(one.outcome is None for one in self._tries):
                return Wait()
            try:
                self._queue = list(next(self._walk))
            except StopIteration as end:
                self._reason = end.value
        if not self._queue:
            return Done(self._reason)
        one, why, rival = self._queue.pop(0)
        self._tries.append(one)
        return Suggestion(len(self._tries) - 1, one.settings, self.stage.name, reason=why, rival=rival)

    def tell(self, slot: int, outcome: Outcome) -> None:
        self._tries[slot].outcome = outcome

    def replace(self, slot: int, settings: Mapping[str, Any]) -> bool:
        return False  # it suggests the same again, given the same outcomes

    # -- the walk

    def _search(self) -> Walk:
        """Yields rounds of trials. Returns why it ended."""
        reasons = []
        for max_t, axis in self._axes.items():
            reason = yield from self._line(axis, self._first_place(axis, max_t), f"max_t {max_t:g}")
            reasons.append(reason)
            if self._is_effective(self.best):
                break
        for name, value in self._others.items():
            if self.best is None:
                break
            domain, best = self.stage.parameters[name], self.best
            axis = self._other_axis(name, domain, best.settings)
            if _has_order(domain):
                reasons.append((yield from self._line(axis, _place_of(domain, value), name, best)))
            else:
                others = [(float(index), f"another {name}") for index, other in enumerate(domain.listed) if other != value]
                yield from self._run(axis, [], others, best)
                reasons.append(f"{name}: all values tried")
        return "; ".join(reasons)

    def _line(self, axis: Axis, place: float, label: str, here: _Try | None = None) -> Walk:
        """Searches one axis from `place`, or from the trial `here` which has been run. Returns why it ended."""
        tries: list[_Try] = []
        if here is not None:
            here.place = place
            tries.append(here)
        else:
            (first,) = yield from self._run(axis, tries, [(place, "start: " + self._words(axis, place))])
            while first.improvement == -math.inf:
                if not first.is_harmful:
                    return f"{label}: the first trial gave no result"
                if not axis.holds(first.place - axis.retreat):
                    return f"{label}: harmful down to the smallest value of the space"
                why = f"less push, since the last trial was {first.outcome and first.outcome.verdict}"
                (first,) = yield from self._run(axis, tries, [(first.place - axis.retreat, why)])
        step_up = axis.step
        while True:
            best = max(tries, key=lambda one: one.improvement)
            candidates = []
            if (above := self._above(axis, tries, best, step_up)) is not None:
                candidates.append(above)
            if (below := self._below(axis, tries, best)) is not None:
                candidates.append(below)
            if not candidates:
                return f"{label}: {self._end_words(axis, tries, best)}"
            yield from self._run(axis, tries, candidates, best)
            if above is not None and max(tries, key=lambda one: one.improvement).place == above[0]:
                step_up *= 2  # still rising: larger steps
            else:
                step_up = axis.step

    def _above(self, axis: Axis, tries: Sequence[_Try], best: _Try, step: float) -> tuple[float, str] | None:
        """The next place above the best one, and why; None if none is needed."""
        floor = self.noise_floor()
        if best.improvement < -floor:
            return None  # worse than the baseline: more push is not the answer
        above = min((one.place for one in tries if one.place > best.place + 1e-9), default=None)
        why = (
            "more push: the last was safe and still improved" if best.improvement > floor else "more push: safe, but not effective"
        )
        if above is None:
            place = min(best.place + step, axis.upper)
            return (place, why) if place > best.place + 1e-3 * axis.step else None
        if above - best.place > axis.settle:
            return (best.place + above) / 2, "between the best and the next larger one"
        return None

    def _below(self, axis: Axis, tries: Sequence[_Try], best: _Try) -> tuple[float, str] | None:
        floor = self.noise_floor()
        if -floor <= best.improvement <= floor:
            return None  # not effective: less push is not the answer
        below = max((one.place for one in tries if one.place < best.place - 1e-9), default=None)
        if below is None:
            place = max(best.place - axis.step, axis.lower)
            why = "less push: is it as good?" if best.improvement > floor else "less push: the last was worse than the baseline"
            return (place, why) if place < best.place - 1e-3 * axis.step else None
        if best.place - below > axis.settle:
            return (best.place + below) / 2, "between the best and the next smaller one"
        return None

    def _run(self, axis: Axis, tries: list[_Try], wanted: Sequence[tuple[float, str]], best: _Try | None = None) -> Walk:
        """Runs trials at `wanted` places side by side, each of which must keep up with `best`. Returns them."""
        rival = _rival(best)
        made = [_Try(place, axis.settings_at(place)) for place, _ in wanted]
        yield [(one, why, rival) for one, (_, why) in zip(made, wanted, strict=True)]
        tries += made
        for one in made:
            if one.improvement > (self.best.improvement if self.best else -math.inf):
                self.best = one
        return made

    def _is_effective(self, one: _Try | None) -> bool:
        return one is not None and one.improvement > self.noise_floor()

    def _end_words(self, axis: Axis, tries: Sequence[_Try], best: _Try) -> str:
        if not self._is_effective(best):
            floor = self.noise_floor()
            return f"nothing beats the baseline by more than {floor:.2g} (best {best.improvement:+.2g})"
        places = [one.place for one in tries]
        sides = []
        if best.place < max(places) - 1e-9:
            sides.append("more push is not better")
        elif best.place >= axis.upper - 1e-6:
            sides.append("it is at the upper end of the space")
        if best.place > min(places) + 1e-9:
            sides.append("less push is not better")
        elif best.place <= axis.lower + 1e-6:
            sides.append("it is at the lower end of the space")
        return f"the best is bracketed: {', '.join(sides)}" if sides else "no neighbour is left to try"

    # -- axes

    def _gates(self) -> list[float]:
        """Values of max_t to try, the widest first: FACTS §6, at equal predicted norm ratio a wider gate gave more."""
        domain = self.stage.parameters.get(MAX_T)
        if domain is None:
            fixed = self.stage.fixed.get(MAX_T, self.model.held.get(MAX_T))
            return [float(fixed)] if fixed is not None else list(self.model.max_ts[-1:])
        if isinstance(domain, Choice):
            return sorted(map(float, domain.listed), reverse=True)
        return sorted({domain.bounds[1], *(max_t for max_t in self.model.max_ts if max_t in domain)}, reverse=True)

    def _gain_axis(self, max_t: float) -> Axis | None:
        """The logarithm of the gain behind a gate, within the space and `max_ratio`; None if nothing can be launched there."""
        domain = self.stage.parameters[GAIN]
        fixed = {**self.stage.fixed, **self._others, MAX_T: max_t}

        def settings_at(place: float) -> dict[str, Any]:
            searched_t = {MAX_T: max_t} if MAX_T in self.stage.parameters else {}
            return resolve_settings({**self.stage.fixed, **self._others, **searched_t, GAIN: math.exp(place)})

        lower, upper = domain.bounds
        try:
            if domain.unit is not None:
                top = gain_at(self.model, min(upper, self.max_ratio or math.inf), fixed)
                lower, upper = _gain_or(self.model, lower, fixed, top * 1e-6), top
            elif self.max_ratio is not None and self._ratio(upper, fixed) > self.max_ratio:
                upper = gain_at(self.model, self.max_ratio, fixed)
        except ValueError as error:
            self._problem = str(error)
            return None
        if not lower <= upper or not upper > 0:
            self._problem = f"max_t {max_t:g}: the predicted ratio of every gain exceeds {self.max_ratio:g}"
            return None
        lower = max(lower, upper * 1e-12)
        return Axis(
            GAIN, math.log(FACTOR), math.log(FACTOR) * 1.3, math.log(lower), math.log(upper), math.log(RETREAT), settings_at
        )

    def _first_place(self, axis: Axis, max_t: float) -> float:
        setting = {**self.stage.fixed, **self._others, MAX_T: max_t}
        return min(max(math.log(_gain_or(self.model, self.start_ratio, setting, math.exp(axis.upper))), axis.lower), axis.upper)

    def _other_axis(self, name: str, domain: Domain, settings: Mapping[str, Any]) -> Axis:
        if isinstance(domain, Choice):
            listed = _in_order(domain)
            return Axis(name, 1, 1, 0, len(listed) - 1, 1, lambda place: {**settings, name: listed[round(place)]})
        return Axis(name, UNIT_STEP, UNIT_STEP, 0, 1, UNIT_STEP, lambda place: {**settings, name: domain.at(place)})

    def _ratio(self, gain: float, setting: Mapping[str, Any]) -> float:
        return self.model.predict_setting({**setting, GAIN: gain}).ratio

    def _words(self, axis: Axis, place: float) -> str:
        settings = axis.settings_at(place)
        ratio = self.model.predict_setting({**self.stage.fixed, **settings}).ratio
        return f"predicted norm ratio {ratio:.3g} at gain {gain_of(settings):.3g}"


def _rival(best: _Try | None) -> tuple[int, float] | None:
    """The first evaluation of the best trial in the second half of its training, if it still improved after that. One that got
    worse there shows that being ahead at that step says little."""
    if best is None or best.outcome is None:
        return None
    found = next(((step, value) for step, value in best.outcome.curve if 2 * step >= best.outcome.steps), None)
    return found if found is not None and best.improvement >= found[1] else None


def _gain_or(model: NormModel, ratio: float, setting: Mapping[str, Any], otherwise: float) -> float:
    try:
        return gain_at(model, ratio, setting)
    except ValueError:
        return otherwise


def _has_order(domain: Domain) -> bool:
    return not isinstance(domain, Choice) or all(is_number(value) for value in domain.listed)


def _in_order(domain: Choice) -> list[Any]:
    return sorted(domain.listed) if _has_order(domain) else list(domain.listed)


def _nearest(domain: Domain, value: Any) -> Any:
    """The value of a parameter to start from: the given one, else the middle of the domain."""
    if value is not None and value in domain:
        return domain.clip(value)
    return _in_order(domain)[len(domain.listed) // 2] if isinstance(domain, Choice) else domain.at(0.5)


def _place_of(domain: Domain, value: Any) -> float:
    """The inverse of the positions of `_other_axis`."""
    if isinstance(domain, Choice):
        return float(_in_order(domain).index(value))
    lower, upper = domain.bounds
    if domain.kind == "log_uniform":
        return math.log(value / lower) / math.log(upper / lower)
    return float((value - lower) / (upper - lower))
