"""A command's specification, filled with the values of one trial: arguments, paths, environment, configuration file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tune_ssim.base.errors import UserError
from tune_ssim.base.yaml_source import dump_yaml, read_yaml
from tune_ssim.study.command_spec import CommandSpec, fill, fill_all, fill_value
from tune_ssim.trials.command.process import Invocation, this_node
from tune_ssim.trials.processes import SupervisedProcess, quote_of
from tune_ssim.trials.processes.output_log import QUOTED_FROM


class FilledSpec:
    """fields: the values for the templates. home: the working folder if the specification has no `cwd`."""

    def __init__(self, spec: CommandSpec, fields: Mapping[str, Any], home: str | None) -> None:
        self.spec, self.fields, self.home = spec, fields, home

    @property
    def cwd(self) -> str | None:
        if self.spec.cwd is None:
            return self.home
        return str(Path(self.home or ".", fill(self.spec.cwd, self.fields)).absolute())

    def path(self, template: str) -> Path:
        """A path of the specification; relative ones start from the working folder."""
        return self.beside(fill(template, self.fields))

    def beside(self, path: str) -> Path:
        return Path(self.cwd or ".", path)

    def invocation(
        self,
        node: Mapping[str, Any],
        more: Mapping[str, str],
        resume: Mapping[str, Any] | None = None,
        observe: Callable[[Mapping[str, str]], Mapping[str, str]] | None = None,
    ) -> Invocation:
        """The invocation on one node. more: the trial's environment variables. resume: the fields of the `resume` arguments.
        observe: environment → variables with which the command is observed."""
        fields = {**self.fields, **node}
        argv = fill_all(self.spec.command, fields)
        if resume is not None and self.spec.resume:
            argv += fill_all(self.spec.resume, {**fields, **resume})
        own = {name: fill(str(value), fields) for name, value in self.spec.environment.items()}
        environment = {
            "PYTHONUNBUFFERED": "1",  # lines arrive as they are printed, not in 8 KB blocks
            "EXP_NAME": str(fields["exp_name"]),
            **own,
            **more,
        }
        if observe is not None:
            environment |= observe({**os.environ, **environment})
        return Invocation(argv, environment, self.cwd, self.spec.grace_s)

    def write_config_file(self) -> None:
        """Writes the base configuration with the trial's values, in the format that the file name implies."""
        spec = self.spec.config_file
        if spec is None:
            return
        path = self.path(spec.path)
        contents: Any = read_yaml(self.beside(spec.base)).value if spec.base else {}  # JSON is YAML 1.2
        if not isinstance(contents, dict):
            raise UserError(f"{spec.base}: must be a mapping to be a base for the trial's settings")
        for key, template in spec.set.items():
            *parents, last = key.split(".")
            place = contents
            for parent in parents:
                place = place.setdefault(parent, {})
                if not isinstance(place, dict):
                    raise UserError(f"config_file: {key}: {parent!r} is no mapping in {spec.base}")
            place[last] = fill_value(template, self.fields)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(contents, indent=1) if path.suffix == ".json" else dump_yaml(contents, for_any_reader=True)
        path.write_text(text, encoding="utf-8")

    def run(self, words: Sequence[str], more: Mapping[str, Any], timeout_s: float, what: str) -> str:
        """Runs another command of the specification and returns its output. Raises UserError unless it exits with 0 in time."""
        output: list[bytes] = []
        process = SupervisedProcess(
            fill_all(words, {**self.fields, **more, **this_node()}),
            output.append,
            environment={**os.environ, "PYTHONUNBUFFERED": "1"},
            cwd=self.cwd,
            grace_s=self.spec.grace_s,
        )
        try:
            in_time = process.wait(timeout_s)
        finally:
            process.stop()
        text = b"".join(output).decode(errors="replace")
        if not in_time or process.exit_code != 0:
            how = process.describe_exit() if in_time else f"not done after {timeout_s:g} s"
            raise UserError(f"{what} failed, {how}: {quote_of(text.splitlines()[-QUOTED_FROM:]) or 'it printed nothing'}")
        return text
