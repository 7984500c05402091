"""What the pages and docstrings show is run: Python as it stands, every `tune-ssim …` as far as its arguments are read."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import torch
from tapped_model import Branches
from torch import Tensor, nn

import tune_ssim
from tune_ssim.cli.app import cli, exit_code
from tune_ssim.probes import GradientTaps, shadow_terms, taps
from tune_ssim.trials import push

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*/README.md"))]
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.M | re.S)
COMMAND = re.compile(r"(?:^|[`\s;&])(?:\.venv/bin/)?tune-ssim((?: +[^`\n|&#;]+)?)")
# Docstrings with an example that is no formula: the module or class, and what it shows.
EXAMPLES: dict[str, Any] = {
    "trials.push": push,
    "probes.taps": taps,
    "probes.shadow_terms": shadow_terms,
}


class Model(Branches):
    """A training's model as the pages name its parts: a flow, a DINO head, a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer, self.dino_head = self.flow, self.head

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        return self(x)


def surroundings() -> dict[str, Any]:
    """The names that a snippet may take for granted: what any training has, and the class of examples/own_task."""
    sys.path.append(str(ROOT / "examples" / "own_task"))
    torch.manual_seed(0)
    model = Model()
    x = torch.randn(8, 6)
    losses = model.losses(x)
    decoder = nn.Upsample(scale_factor=4)
    z0, images = torch.rand(2, 3, 8, 8, requires_grad=True), torch.rand(2, 3, 32, 32)
    names: dict[str, Any] = {
        "torch": torch, "model": model, "backbone": model.backbone, "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "loader": [x] * 3, "steps": 3, "metrics": {}, "losses": losses,
        "loss_flow": losses["loss_flow"], "loss_dino": losses["loss_head"],
        "micro_batches": lambda n: [x] * n, "loss_of": lambda model, batch: model.loss(batch),
        "z0_prediction": z0, "t_flow": torch.tensor([0.1, 0.9]), "images": images, "decode": decoder,
        "fixed_noise": images, "truth": images, "generate": lambda model, noise: noise, "held_out": lambda model: {"ssim": 0.5},
    }  # fmt: skip
    names |= {"tune_ssim": tune_ssim, "GradientTaps": GradientTaps, "shadow_terms": shadow_terms}
    names["MyTask"] = import_module("task").MyTask
    names["taps"] = GradientTaps({"flow": model.flow}, every=1)
    return names


def blocks(*languages: str) -> Iterator[Any]:
    for page in PAGES:
        for n, (language, text) in enumerate(BLOCK.findall(page.read_text())):
            if language in languages:
                yield pytest.param(text, id=f"{page.relative_to(ROOT)}-{n}")


def indented(documented: Any) -> list[str]:
    """The indented blocks of a docstring."""
    text = inspect.getdoc(documented) or ""
    return [textwrap.dedent(found) for found in re.findall(r"(?:(?<=\n\n)|\A)((?: {4}.*\n|\n)*(?: {4}.*))", text)]


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def run_snippet(text: str, names: dict[str, Any]) -> None:
    exec(compile(text, "<snippet>", "exec"), names)
    for name, value in list(names.items()):
        if name.startswith("test_"):
            value()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a snippet, with the logs that the pages read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("step,loss,grad_norm\n0,1.0,2.0\n1,0.5,1.0\n")
    line = "[2026-01-01 00:00:00] (step={:07d}) Train Loss mse: 0.1, Train Loss ce: 0.0, total_norm: 1.0\n"
    (tmp_path / "run" / "log.txt").write_text("".join(line.format(step) for step in range(3)))
    return tmp_path


@pytest.mark.parametrize("text", list(blocks("python")))
def test_python_on_a_page_runs(text: str, folder: Path) -> None:
    run_snippet(text, surroundings())


@pytest.mark.parametrize("name", EXAMPLES)
def test_python_in_a_docstring_runs(name: str, folder: Path) -> None:
    (text,) = indented(EXAMPLES[name])
    run_snippet(text, surroundings())


def test_every_docstring_with_python_is_known_here() -> None:
    """Its example is run above, or stands word for word on a page. (Formulas and drawings are no examples.)"""
    pages = [lines_of(text.values[0]) for text in blocks("python")]
    calls = re.compile(r"^\s*(with|from|import|def) |^\s*[\w.]+ \|?= [\w.]+\(", re.M)
    known = {inspect.getdoc(documented) for documented in EXAMPLES.values()}
    for file in sorted((ROOT / "tune_ssim").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                shown = ModuleType("documented", text)
                if any(calls.search(block) and lines_of(block) not in pages for block in indented(shown)):
                    assert inspect.cleandoc(text) in known, (
                        f"{file}: {getattr(node, 'name', 'module')}: its example is run by no test"
                    )


def command_lines() -> Iterator[Any]:
    for page in PAGES:
        text = page.read_text()
        in_code = [block for language, block in BLOCK.findall(text) if language in ("bash", "sh")]
        inline = re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))
        for code in [line for block in in_code for line in block.splitlines()] + inline:
            for found in COMMAND.findall(code):
                words = found.strip().removesuffix("--json") if page.name == "check_schema.md" else found.strip()
                yield pytest.param(words, id=f"{page.relative_to(ROOT)}-{found.strip()}")


@pytest.mark.parametrize("words", list(command_lines()))
def test_a_command_on_a_page_can_be_parsed(words: str, folder: Path) -> None:
    command: click.Command = cli
    context = click.Context(cli, info_name="tune-ssim")
    arguments = shlex.split(words)
    while isinstance(command, click.Group) and arguments:
        _, found, arguments = command.resolve_command(context, arguments)
        assert found is not None
        command = found
        context = click.Context(command, parent=context)
    if arguments or not any(parameter.required for parameter in command.params):  # a verb alone is its name, in a sentence
        command.make_context(command.name, arguments, parent=context.parent)


def answers() -> Iterator[Any]:
    """Blocks that show a command and its answer: `$ tune-ssim …`, lines of its output, `exit code N`."""
    for text in blocks("text"):
        if text.values[0].startswith("$ tune-ssim "):
            yield text


@pytest.mark.parametrize("text", list(answers()))
def test_a_command_answers_as_a_page_shows(text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`…` is the rest of a line."""
    monkeypatch.chdir(ROOT)
    command, *shown, code = text.splitlines()
    assert f"exit code {exit_code(shlex.split(command)[2:])}" == code
    printed = "".join(capsys.readouterr()).splitlines()
    for line in shown:
        begin, dots, _ = line.partition("…")
        assert any(found.startswith(begin) if dots else found == line for found in printed), printed


def test_the_messages_that_troubleshooting_explains_are_those_of_the_program() -> None:
    """`…` stands for what differs from case to case."""
    code = "".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "tune_ssim").rglob("*.py")))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # texts over several lines
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = [message for message in re.findall(r"`([^`\n]*…[^`\n]*)`", page) if "\n" not in message]
    assert len(messages) >= 8
    for message in messages:
        for part in filter(None, (part.strip() for part in message.split("…"))):
            assert part in code, message


def test_the_json_of_a_page_is_json() -> None:
    for language, text in BLOCK.findall((ROOT / "docs" / "check_schema.md").read_text()):
        if language == "json":
            json.loads(text)
