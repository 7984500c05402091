"""Guided search: starts where the calibration predicts a useful push, and moves while that improves the objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tune_ssim.base.errors import UserError
from tune_ssim.base.numbers import is_number
from tune_ssim.before_launch.forecast import gain_at, predicted
from tune_ssim.guards.verdict import Verdict
from tune_ssim.probes.norm_model import NormModel, Prediction
from tune_ssim.results.study_folder import Skipped
from tune_ssim.search.search import Done, Outcome, Suggestion, Wait
from tune_ssim.study.domains import Choice, Domain
from tune_ssim.study.space import GAIN, MAX_T, Stage, gain_of, resolve_settings

START_RATIO = 2.0  # docs/search.md: the best safe setting of five recordings was at 2.2 to 4 in four of them, at 1.3 in one
FACTOR = 2.0  # between neighbouring gains: FACTS §6, the objective is flat over a factor of 4 around its best
RETREAT = 4.0  # after a pruned trial: FACTS §2, from the first ruinous gain to the best is a factor of 16
AHEAD = 1.1  # a neighbour goes on after its evaluation if it improves by 10 % more: less is not worth its second half
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

    A harmful trial sends it to smaller gains, a pruned one further than a degraded one. A safe one that is not effective sends it
    to larger ones (SEEDS A5). From an effective one it tries its neighbours, which are stopped at an intermediate evaluation if
    they are behind it there. It ends when no neighbour is better by 10 %. A gate behind which nothing is effective is given up for
    the next narrower one. Then the other parameters of the space are searched in the same way, one after the other.

    stage: with a `gain`. model: the calibrated norm model. start: settings to start from, for the other parameters.
    noise_floor: the improvement that counts as effective must exceed it. max_ratio: as in `OptunaSearch`. is_parallel: both
    neighbours are tried at once, which takes less time and more training steps.
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
        is_parallel: bool = False,
    ) -> None:
        if GAIN not in stage.parameters:
            raise UserError(f"search.strategy: guided needs a space that searches {GAIN}; stage {stage.name!r} does not")
        self.stage, self.model, self.noise_floor = stage, model, noise_floor
        self.start_ratio, self.max_ratio, self.is_parallel = start_ratio, max_ratio, is_parallel
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
        return settings, predicted(self.model, {**self.stage.fixed, **settings})

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
                assert first.outcome is not None
                verdict = first.outcome.verdict
                place = first.place - (axis.step if verdict is Verdict.DEGRADED else axis.retreat)
                if not axis.holds(place):
                    return f"{label}: harmful down to the smallest value of the space"
                (first,) = yield from self._run(axis, tries, [(place, f"less push, since the last trial was {verdict}")])
        step_up, is_worth_more, is_worth_less = axis.step, True, True
        best = max(tries, key=lambda one: one.improvement)
        while True:
            candidates = []
            if is_worth_more and (above := self._above(axis, tries, best, step_up)) is not None:
                candidates.append(above)
            if is_worth_less and (below := self._below(axis, tries, best)) is not None:
                candidates.append(below)
            if not candidates:
                return f"{label}: {self._end_words(axis, tries, best)}"
            yield from self._run(axis, tries, candidates if self.is_parallel else candidates[:1], best)
            before, best = best, max(tries, key=lambda one: one.improvement)
            gained = best.improvement > AHEAD * before.improvement or not self._is_effective(before)
            if best.place > before.place:
                step_up, is_worth_more = 2 * step_up, gained  # still rising: larger steps
            elif best.place < before.place:
                step_up, is_worth_less = axis.step, gained

    def _above(self, axis: Axis, tries: Sequence[_Try], best: _Try, step: float) -> tuple[float, str] | None:
        """The next place above the best one, and why; None if none is needed."""
        if best.improvement < -self.noise_floor() or self._is_declining(best):
            return None  # it is pushed too hard already
        above = min((one.place for one in tries if one.place > best.place + 1e-9), default=None)
        if above is None:
            place = min(best.place + step, axis.upper)
            why = "safe and still improved" if self._is_effective(best) else "safe, but not effective"
            return (place, f"more push: the last was {why}") if place > best.place + 1e-3 * axis.step else None
        if above - best.place > axis.settle:
            return (best.place + above) / 2, "between the best and the next larger one"
        return None

    def _below(self, axis: Axis, tries: Sequence[_Try], best: _Try) -> tuple[float, str] | None:
        is_harmful, is_declining = best.improvement < -self.noise_floor(), self._is_declining(best)
        if not (self._is_effective(best) or is_harmful or is_declining):
            return None  # less of what has no effect has none either
        below = max((one.place for one in tries if one.place < best.place - 1e-9), default=None)
        if below is None:
            place = max(best.place - axis.step, axis.lower)
            why = "worse than the baseline" if is_harmful else "better before its end" if is_declining else ""
            why = f"less push: the last was {why}" if why else "less push: is it as good?"
            return (place, why) if place < best.place - 1e-3 * axis.step else None
        if best.place - below > axis.settle:
            return (best.place + below) / 2, "between the best and the next smaller one"
        return None

    def _is_declining(self, one: _Try) -> bool:
        """Whether it improved more at an evaluation on the way than at its end."""
        found = _in_second_half(one)
        return found is not None and one.improvement < found[1] - self.noise_floor()

    def _run(self, axis: Axis, tries: list[_Try], wanted: Sequence[tuple[float, str]], best: _Try | None = None) -> Walk:
        """Runs trials at `wanted` places side by side, each of which must keep up with `best`. Returns them."""
        rival = _rival(best) if best is not None else None
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
        return predicted(self.model, {**setting, GAIN: gain}).ratio

    def _words(self, axis: Axis, place: float) -> str:
        settings = axis.settings_at(place)
        ratio = predicted(self.model, {**self.stage.fixed, **settings}).ratio
        return f"predicted norm ratio {ratio:.3g} at gain {gain_of(settings):.3g}"


def _in_second_half(one: _Try) -> tuple[int, float] | None:
    """(step, improvement) of its first evaluation in the second half of its training, before its end."""
    if one.outcome is None:
        return None
    return next(((step, value) for step, value in one.outcome.curve if 2 * step >= one.outcome.steps), None)


def _rival(best: _Try) -> tuple[int, float] | None:
    """What a neighbour must reach to go on. If the best trial got worse after its evaluation, being behind it there says little."""
    found = _in_second_half(best)
    if found is None or best.improvement < found[1]:
        return None
    step, improvement = found
    return step, improvement * (AHEAD if improvement > 0 else 1)


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
