"""Whether a trial's settings reached the command that trains with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tune_ssim.base.errors import BadSetup
from tune_ssim.study.command_spec import CommandSpec, is_neutral
from tune_ssim.trials.command.echoes import Echoes


class SettingsInForce:
    """The settings of a trial, as the command got them, looked them up, printed them, or sent them as being in force.

    stated: values that it printed or sent; one that it sent takes precedence. looked_up: what a `trial_context` loop has read from
    its configuration; None without such a loop. echoes: finds the printed ones."""

    def __init__(self, spec: CommandSpec, config: Mapping[str, Any]) -> None:
        self.spec, self.config = spec, config
        self.echoes = Echoes(config, spec)
        self.stated: dict[str, Any] = {}
        self.looked_up: set[str] | None = None
        self._sent: set[str] = set()
        self._is_checked = False

    def sent(self, values: Any) -> None:
        values = values if isinstance(values, dict) else {}
        self.stated |= values
        self._sent |= set(values)

    def printed(self, values: Mapping[str, Any]) -> None:
        self.stated |= {name: value for name, value in values.items() if name not in self._sent}

    def read(self, names: Any) -> None:
        self.looked_up = (self.looked_up or set()) | {str(name) for name in (names if isinstance(names, list) else [])}

    @property
    def used(self) -> set[str]:
        """Names that the command gets or has looked up."""
        return self.spec.referenced_settings() | (self.looked_up or set())

    def effective(self) -> dict[str, Any]:
        """The settings as the training sent or printed them, otherwise as it got them."""
        return {**self.spec.known, **self.config, **self.stated}

    def where_printed(self, name: str) -> str | None:
        return None if name in self._sent else self.echoes.lines.get(name)

    def require_used(self, quote: str) -> None:
        """Raises BadSetup for a setting that the command neither gets nor looks up, or that it does not print although
        `echo: required` is set. Checked once. quote: the last lines it printed."""
        if self._is_checked:
            return
        self._is_checked = True
        known = self.used | set(self.stated) | {"steps"}
        for name, value in self.config.items():
            if name not in known and not is_neutral(name, value):
                raise BadSetup(
                    f"{name} is set to {value!r} but does not reach the training: put {{{name}}} into the command, its "
                    f"environment or its config file, or read it with trial_context().config[{name!r}]"
                )
        if self.spec.echo == "required" and (silent := self._silent()):
            raise BadSetup(
                f"the command does not print {silent[0]}: it is not known to have reached the training (echo: required); "
                f"print it as {silent[0]}=…, or with trial_context().in_force({silent[0]}=…); {quote}"
            )

    def _silent(self) -> list[str]:
        wanted: Iterable[str] = self.spec.referenced_settings() & set(self.config) - {"steps"}
        return sorted(name for name in wanted if name not in self.stated)
