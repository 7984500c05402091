"""The observer inside programs that know nothing of it: the same numbers with and without it, and the right norms."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tune_ssim.before_launch.command.observed_weights import check_observed
from tune_ssim.probes.observer import EventReader, observed_environment
from tune_ssim.records import Record, merge

LOOP = Path(__file__).parent / "programs" / "loop.py"
LOOPS = LOOP.with_name("loops.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def run(words: list[str], environment: dict[str, str] | None = None) -> str:
    own = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    ended = subprocess.run(words, env=own, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def observed(
    folder: Path, *flags: str, program: Path = LOOP, launcher: tuple[str, ...] = (sys.executable,), path: str = "", **options: Any
) -> tuple[str, list[Record], EventReader]:
    """What the program printed, and the records of its steps."""
    environment = {"PYTHONPATH": path} if path else {}
    extra = {**environment, **observed_environment(folder, environment, **options)}
    output = run([*launcher, str(program), *flags], extra)
    reader = EventReader(folder)
    return output, list(merge(reader.read())), reader


def printed(output: str, name: str = "norm") -> list[float]:
    return [float(found) for found in re.findall(rf"{name} (\S+)", output) if found != "None"]


def norms(records: list[Record], name: str = "total_norm") -> list[float]:
    return [record.values[name] for record in records if name in record.values]


KINDS = ("plain", "accumulated", "scaled", "loose", "unclipped")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, list[Record], EventReader]:
    """Five trainings in one program: (printed without the observer, printed with it, records, reader)."""
    bare = run([sys.executable, str(LOOPS), "kinds"])
    return bare, *observed(tmp_path_factory.mktemp("events"), "kinds", program=LOOPS)


def test_the_numbers_are_the_same_with_the_observer(kinds: tuple[str, str, list[Record], EventReader]) -> None:
    bare, output, _, reader = kinds
    assert output == bare and len(bare.splitlines()) == 6 * len(KINDS)
    seen = reader.observation
    assert list(seen.files["code"]) == [str(LOOPS)] and seen.files["settings"] == {}
    assert seen.is_observed and seen.notes == [] and seen.optimizers[0]["modules"] == ["Net"]


@pytest.mark.parametrize("kind", KINDS[:4])
def test_the_norms_are_those_of_the_program(kinds: tuple[str, str, list[Record], EventReader], kind: str) -> None:
    """Each optimiser has its own steps; micro-batches are no steps, and a step that a GradScaler leaves out is one."""
    bare, _, records, _ = kinds
    suffix = f"/optimizer{KINDS.index(kind)}" if kind != KINDS[0] else ""
    lines = "\n".join(line for line in bare.splitlines() if line.startswith(kind))
    assert norms(records, "total_norm" + suffix) == pytest.approx(printed(lines), nan_ok=True, rel=1e-7)
    skipped = [record.step for record in records if record.values.get("step_skipped" + suffix)]
    assert skipped == ([3] if kind == "scaled" else [])  # the program's step 2 has an infinite gradient


def test_without_a_clip_call_the_norm_is_that_of_the_gradients(kinds: tuple[str, str, list[Record], EventReader]) -> None:
    _, _, records, _ = kinds
    loose, unclipped = (norms(records, f"total_norm/optimizer{KINDS.index(kind)}") for kind in ("loose", "unclipped"))
    assert unclipped == pytest.approx(loose, rel=1e-6) and len(unclipped) == 6
    first = records[0].values
    assert first["grad_coverage"] == 1.0 and 0 < first["update_ratio"] < 1
    assert first["total_norm_clipped"] == pytest.approx(min(1.0, first["total_norm"]), rel=1e-5)


def test_each_module_with_full(tmp_path: Path) -> None:
    _, records, _ = observed(tmp_path, level="full")
    first = records[0].values
    parts = [first[f"dbg/grad_{tag}"] for tag in ("body", "norm", "head")]
    assert sum(part**2 for part in parts) ** 0.5 == pytest.approx(first["total_norm"], rel=1e-4)
    assert first["dbg/body_coverage"] == 1.0 and first["dbg/body_trainable"] == 2.0


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_have_one_norm(tmp_path: Path, kind: str) -> None:
    flags = (f"--ranks={kind}", "--steps=3")
    output, records, reader = observed(tmp_path, *flags, launcher=TORCHRUN)
    assert norms(records) == pytest.approx(printed(output), rel=1e-6) and len(records) == 3
    assert reader.observation.world_size == 2 and reader.observation.notes == []


def test_the_norm_of_fsdp1_is_that_of_its_own_method(tmp_path: Path) -> None:
    """Of the real class, in one process: only its own method knows the norm over all shards, and is hooked."""
    output, records, reader = observed(tmp_path, "--ranks=fsdp1", "--steps=3")
    assert norms(records) == pytest.approx(printed(output), rel=1e-7) and len(records) == 3
    seen = reader.observation
    assert "FullyShardedDataParallel.clip_grad_norm_" in seen.hooked and seen.max_grad_norm == 1.0 and seen.notes == []
    assert output == run([sys.executable, str(LOOP), "--ranks=fsdp1", "--steps=3"])


def test_held_updates_leave_every_weight_alone(tmp_path: Path) -> None:
    """For every optimiser of torch: each step has the norm of the untouched weights."""
    output, records, reader = observed(tmp_path, "optimizers", program=LOOPS, hold=True)
    lines = output.splitlines()
    still = printed("\n".join(line for line in lines if line.startswith("still")))
    names = list(dict.fromkeys(line.split()[0] for line in lines))
    assert len(names) == 12 and reader.observation.held is True
    for index, name in enumerate(names[1:], 1):
        own = norms(records, f"total_norm/optimizer{index}")
        assert own == pytest.approx(still[:3], rel=1e-6) and len(own) == 3, name


def test_an_existing_sitecustomize_still_runs(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sitecustomize.py").write_text("print('mine')\n")
    output, records, _ = observed(tmp_path / "events", "--steps=1", path=str(tmp_path / "own"))
    assert output.startswith("mine\n") and len(records) == 1


def test_an_error_of_the_observer_never_ends_a_program(tmp_path: Path) -> None:
    """Its folder disappears while the program runs: nothing can be written any more."""
    program = tmp_path / "program.py"
    program.write_text(f"import shutil; shutil.rmtree({str(tmp_path / 'events')!r})\n" + LOOP.read_text())
    output, records, _ = observed(tmp_path / "events", "--steps=2", program=program)
    assert len(printed(output)) == 2 and records == []


def test_a_program_that_shuts_the_environment_out_is_said(tmp_path: Path) -> None:
    _, records, reader = observed(tmp_path, "--steps=1", launcher=(sys.executable, "-I"))
    assert records == [] and reader.observation.sentence().startswith("not observed: no Python process")


@pytest.mark.parametrize("log", ["tensorboard", "mlflow", "wandb"])
def test_what_a_logger_gets_becomes_a_record(tmp_path: Path, log: str) -> None:
    if log == "wandb":  # not installed: the call is wrapped by the module's name
        (tmp_path / "wandb.py").write_text("def log(data, step=None): pass\n")
    else:
        pytest.importorskip({"tensorboard": "tensorboard", "mlflow": "mlflow"}[log])
    folder = tmp_path / "log"
    folder.mkdir()
    flags = (f"--log={log}", f"--folder={folder}", "--steps=3")
    output, records, reader = observed(tmp_path / "events", *flags, path=str(tmp_path))
    assert [record.step for record in records] == [1, 2, 3]
    assert norms(records, "train/loss") == pytest.approx(printed(output, "loss"), rel=1e-6)
    assert reader.observation.loggers == [log] and all("text" not in record.values for record in records)
    assert reader.observation.offset == (0 if log == "wandb" else -1)  # the program counts from 0


# ---- weights before the first update ----


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """raw.pt and ema.pt: two trained states with the same keys."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(5)
    for name in ("raw", "ema"):
        body, norm, head = torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 1)
        torch.nn.init.normal_(norm.weight)
        modules = {"body": body, "norm": norm, "head": head}
        state = {f"{part}.{key}": value for part, module in modules.items() for key, value in module.state_dict().items()}
        torch.save(state, folder / f"{name}.pt")
        from safetensors.torch import save_file

        save_file({key: value.to(torch.bfloat16) for key, value in state.items()}, folder / f"{name}.safetensors")
    return folder


def trained_module(reader: EventReader) -> Any:
    return next(module for module in reader.observation.weights if module["is_trained"])


def faults(reader: EventReader) -> dict[str, str]:
    """Name → status of what preflight says of the weights, except for what is well."""
    seen = reader.observation
    plain = {"weights": seen.weights, "loads": seen.loads, "sentence": seen.sentence()}
    # The averaged copy of this program is loaded in one test only.
    own = [check for check in check_observed(plain) if check.name in ("weights/Net", "load/Net")]
    return {check.name: check.status for check in own[:1] + own[2:] if check.status != "ok"}


def test_loaded_weights_equal_their_file(tmp_path: Path, checkpoints: Path) -> None:
    _, _, reader = observed(tmp_path, f"--load={checkpoints / 'raw.pt'}", "--steps=1", weights=[checkpoints / "ema.pt"])
    module = trained_module(reader)
    raw, ema = (next(f for f in module["files"] if Path(f["path"]).name == name) for name in ("raw.pt", "ema.pt"))
    assert (raw["equal"], raw["of"], raw["missing"]) == (5, 5, 0) and module["in_no_file"] == 0  # a bias of zeros tells nothing
    assert (ema["equal"], ema["rounded"], ema["of"]) == (0, 0, 5)
    (load,) = (event for event in reader.observation.loads if event["event"] == "load_state_dict")
    assert load["path"] == str(checkpoints / "raw.pt") and load["missing"] == load["unexpected"] == 0
    assert faults(reader) == {"weights/Net": "bad_setup"}  # the study names the averaged weights


def test_a_checkpoint_in_half_precision_is_equal_too(tmp_path: Path, checkpoints: Path) -> None:
    """BAGEL saves bf16 checkpoints (FACTS §7)."""
    _, _, reader = observed(tmp_path, f"--load={checkpoints / 'raw.safetensors'}", "--steps=1", weights=[checkpoints / "raw.pt"])
    found = {Path(file["path"]).name: (file["equal"], file["rounded"]) for file in trained_module(reader)["files"]}
    assert found == {"raw.safetensors": (5, 0), "raw.pt": (0, 5)}


def test_weights_that_were_never_loaded_are_seen(tmp_path: Path, checkpoints: Path) -> None:
    _, _, reader = observed(tmp_path, "--steps=1", weights=[checkpoints / "raw.pt"])
    (file,) = trained_module(reader)["files"]
    assert (file["of"], file["equal"], file["different"]) == (5, 0, 5)
    assert faults(reader) == {"weights/Net": "bad_setup"}


def test_a_lost_layer_is_named(tmp_path: Path, checkpoints: Path) -> None:
    _, _, reader = observed(tmp_path, f"--load={checkpoints / 'raw.pt'}", "--strip=head.weight", "--steps=1")
    (file,) = trained_module(reader)["files"]
    assert file["missing_names"] == [] and file["different_names"] == ["head.weight"] and file["equal"] == 4
    (load,) = (event for event in reader.observation.loads if event["event"] == "load_state_dict")
    assert load["missing_names"] == ["head.weight"]
    assert faults(reader) == {"weights/Net": "warn", "load/Net": "warn"}


def test_averaged_weights_in_place_of_raw_ones(tmp_path: Path, checkpoints: Path) -> None:
    flags = (f"--load={checkpoints / 'ema.pt'}", f"--load_ema={checkpoints / 'ema.pt'}", "--steps=1")
    _, _, reader = observed(tmp_path, *flags, weights=[checkpoints / "raw.pt"])
    equal = {Path(file["path"]).name: file["equal"] for file in trained_module(reader)["files"]}
    assert equal == {"ema.pt": 5, "raw.pt": 0}
    assert faults(reader) == {"weights/Net": "bad_setup"}


def test_the_verb_writes_a_log_that_check_reads(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tune_ssim", "observe", "-o", "seen.jsonl", "--", sys.executable, str(LOOP), "--steps=4"]
    ended = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0 and ended.stdout == run([sys.executable, str(LOOP), "--steps=4"])
    assert "observed 4 steps" in ended.stderr and "Net: 6 of 6 tensors are trained" in ended.stderr
    rows = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]  # the program's own counter
    assert "the program's step 0 is taken to be its update 1" in ended.stderr
    assert [row["total_norm"] for row in rows] == pytest.approx(printed(ended.stdout), rel=1e-7)
    assert [row["loss"] for row in rows] == pytest.approx(printed(ended.stdout, "loss"), rel=1e-7)
