"""Demonstration trials beside a search: settings that show what the guards do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tune_ssim.search.search import Done, Outcome, Search, Suggestion, Wait

PREFIX = "demo-"  # prefix of the trial ids


class WithDemonstrations:
    """The suggestions of `search`, and after its first one the demonstrations, which it is not told about.

    demonstrations: name → settings."""

    def __init__(self, search: Search, demonstrations: Mapping[str, Mapping[str, Any]]) -> None:
        self.search = search
        self._left = [
            Suggestion(-1 - index, settings, trial_id=PREFIX + name, reason="a demonstration of the guards")
            for index, (name, settings) in enumerate(demonstrations.items())
        ]
        self._has_begun = False

    def ask(self) -> Suggestion | Wait | Done:
        if self._has_begun and self._left:
            return self._left.pop(0)
        self._has_begun = True
        return self.search.ask()

    def tell(self, slot: int, outcome: Outcome) -> None:
        if slot >= 0:
            self.search.tell(slot, outcome)

    def replace(self, slot: int, settings: Mapping[str, Any]) -> bool:
        return slot >= 0 and self.search.replace(slot, settings)
