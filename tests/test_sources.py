"""Sources: logs of other people's trainings become records, whatever the bytes are and however they arrive."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import struct
import tracemalloc
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tune_ssim.base.errors import UserError
from tune_ssim.records import Record, merge
from tune_ssim.records.readers import FORMATS, LineParser, Source, open_source, read_all, text_lines
from tune_ssim.records.readers.event_files import masked_crc32c
from tune_ssim.records.readers.lines import MAX_LINE_BYTES
from tune_ssim.records.readers.record_lines import RecordLines
from tune_ssim.records.readers.text_lines import MAX_PATTERN_TEXT
from tune_ssim.records.record_table import Table

# -- logs, in the very form in which their writers write them ---------------------------------------------------------

BAGEL = b"""\
[\x1b[34m2025-05-25 17:01:30\x1b[0m] Training for 500000 steps, starting at 0...
[\x1b[34m2025-05-25 17:01:37\x1b[0m] (step=0000000) Train Loss mse: 0.4063, Train Loss ce: 0.5504, Train Steps/Sec: 0.01, 
[\x1b[34m2025-05-25 17:01:37\x1b[0m] (step=0000000) Train Loss mse: 0.4063, Train Loss ce: 0.5504, Train Steps/Sec: 0.01, 
vit_token_seqlens is None, skipping this batch
[\x1b[34m2025-05-25 17:01:40\x1b[0m] (step=0000001) Train Loss mse: 0.4121, Train Loss ce: nan, Train Steps/Sec: 0.44, 
[\x1b[34m2025-05-25 17:01:40\x1b[0m] (step=0000001) Train Loss mse: 0.4121, Train Loss ce: nan, Train Steps/Sec: 0.44, 
"""  # noqa: W291  (upstream ends the line so)

TRAINER_STATE = {  # transformers' TrainerState.save_to_json
    "best_global_step": None,
    "best_metric": None,
    "epoch": 0.4,
    "eval_steps": 500,
    "global_step": 20,
    "is_hyper_param_search": False,
    "log_history": [
        {"epoch": 0.2, "grad_norm": 1.25, "learning_rate": 5e-05, "loss": 0.75, "step": 10},
        {"epoch": 0.2, "eval_loss": 0.5, "eval_runtime": 1.5, "step": 10},
        {"epoch": 0.4, "grad_norm": math.nan, "learning_rate": 4e-05, "loss": 0.5, "step": 20},
    ],
    "max_steps": 20,
}

LIGHTNING = """\
epoch,step,train_loss_step,val_loss
0,49,0.75,
0,49,,0.5
0,99,0.25,
"""  # CSVLogger's metrics.csv: each call of log_metrics is a row

MMENGINE = """\
{"lr": 0.01, "data_time": 0.5, "loss": 1.5, "time": 0.25, "epoch": 1, "iter": 50, "memory": 1000, "step": 50}
{"lr": 0.01, "data_time": 0.5, "loss": 1.0, "time": 0.25, "epoch": 1, "iter": 100, "memory": 1000, "step": 100}
"""  # LocalVisBackend's vis_data/<time>.json and scalars.json

HUGGING_FACE = """\
  0%|          | 0/3 [00:00<?, ?it/s]\r 33%|###3      | 1/3 [00:01<00:02,  1.00s/it]
{'loss': 0.75, 'grad_norm': 1.25, 'learning_rate': 5e-05, 'epoch': 0.1}
{'loss': '0.5', 'grad_norm': 'nan', 'learning_rate': '4e-05', 'epoch': '0.2'}
"""


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def rest_of(source: Source | LineParser) -> list[Record]:
    return [*(source.read() if hasattr(source, "read") else []), *source.finish()]


def exact(records: list[Record]) -> str:
    """Text in which NaN equals NaN and the order of keys means nothing."""
    return json.dumps([record.to_json() for record in records], sort_keys=True)


def parsed(data: bytes | str, **options: Any) -> list[Record]:
    parser = LineParser(**options)
    return [*parser.feed(data if isinstance(data, bytes) else data.encode()), *parser.finish()]


# -- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "log", "format", "expected"),
    [
        (
            "log.txt",
            BAGEL,
            "text",
            [
                (0, {"loss_flow": 0.4063, "loss_ce": 0.5504, "steps_per_sec": 0.01}),
                (1, {"loss_flow": 0.4121, "loss_ce": math.nan, "steps_per_sec": 0.44}),
            ],
        ),
        (
            "trainer_state.json",
            json.dumps(TRAINER_STATE, indent=2, sort_keys=True),
            "json",
            [
                (
                    10,
                    {"epoch": 0.2, "grad_norm": 1.25, "learning_rate": 5e-05, "loss": 0.75, "eval_loss": 0.5, "eval_runtime": 1.5},
                ),
                (20, {"epoch": 0.4, "grad_norm": math.nan, "learning_rate": 4e-05, "loss": 0.5}),
            ],
        ),
        ("state.json", json.dumps(TRAINER_STATE["log_history"][:1]), "json", [(10, TRAINER_STATE["log_history"][0])]),
        (
            "metrics.csv",
            LIGHTNING,
            "csv",
            [(49, {"epoch": 0, "train_loss_step": 0.75, "val_loss": 0.5}), (99, {"epoch": 0, "train_loss_step": 0.25})],
        ),
        (
            "20250601_120000.json",
            MMENGINE,
            "jsonl",
            [
                (50, {"lr": 0.01, "data_time": 0.5, "loss": 1.5, "time": 0.25, "epoch": 1, "iter": 50, "memory": 1000}),
                (100, {"lr": 0.01, "data_time": 0.5, "loss": 1.0, "time": 0.25, "epoch": 1, "iter": 100, "memory": 1000}),
            ],
        ),
        (
            "train.log",
            HUGGING_FACE,
            "text",
            [
                (1, {"loss": 0.75, "grad_norm": 1.25, "learning_rate": 5e-05, "epoch": 0.1}),
                (2, {"loss": 0.5, "grad_norm": math.nan, "learning_rate": 4e-05, "epoch": 0.2}),
            ],
        ),
        (
            "out.log",
            'Namespace(lr=0.1)\n[rank0]: TUNE_SSIM {"step": 1, "loss": 0.5} and more\nstep 2 loss 9\n'
            'TUNE_SSIM {"step": 2, "loss": 1e-3}\n',
            "jsonl",
            [(1, {"loss": 0.5}), (2, {"loss": 0.001})],
        ),
        (
            "print.log",
            "model loaded\nstep 12 | loss 0.31 | grad_norm: 1.2\nStep: 13, Loss=0.25\n"
            "[14:00:01] iter 14/1000: loss = 1e-3, time 1.5s\n",
            "text",
            [(12, {"loss": 0.31, "grad_norm": 1.2}), (13, {"loss": 0.25}), (14, {"loss": 0.001})],
        ),
        (
            "dit.log",
            "[2025-09-04 12:21:11] (step=0000500/epoch=0000) Train Loss: 0.1158, Gradient Norm: 0.1939, Train Steps/Sec: 17.58\n",
            "text",
            [(500, {"loss": 0.1158, "gradient_norm": 0.1939, "steps_per_sec": 17.58})],
        ),
        ("a.tsv", "global_step\tloss\tnote\n1\t0.5\tstart\n2\tnan\t\n", "csv", [(1, {"loss": 0.5}), (2, {"loss": math.nan})]),
        ("german.csv", "Step;loss\n1;0,5\n2;0,25\n", "csv", [(1, {"loss": 0.5}), (2, {"loss": 0.25})]),
        (
            "pandas.csv",
            ',step,"loss, train"\n0,1.0,0.5\n1,2.0,inf\n',
            "csv",
            [(1, {"loss, train": 0.5}), (2, {"loss, train": math.inf})],
        ),
    ],
)
def test_formats(tmp_path: Path, name: str, log: bytes | str, format: str, expected: list[tuple[int, Any]]) -> None:
    path = write(tmp_path / name, log)
    wanted = exact(
        [Record(step, {name: float(value) for name, value in values.items() if name != "step"}) for step, values in expected]
    )
    for given_format in (None, format):  # found, and said
        source = open_source(path, format=given_format)
        assert exact(rest_of(source)) == wanted
        assert not source.issues.unread, source.issues.sentence()
    assert exact(list(read_all(path))) == wanted
    waiting = open_source(tmp_path / "later" / name)  # nothing is there yet
    assert waiting.read() == []
    (tmp_path / "later").mkdir()
    write(tmp_path / "later" / name, log)
    assert exact(rest_of(waiting)) == wanted


def test_mmengines_json_may_be_called_json(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "scalars.json", MMENGINE), format="json")
    assert [record.step for record in rest_of(source)] == [50, 100]


def test_patterns_of_the_user(tmp_path: Path) -> None:
    log = "it 3: L 0.5 (g 7)\nit 4: L 0.25\nval @ 4 -> acc 91.5%\nit 5: L oops\n"
    train = r"it (?P<step>\d+): L (?P<loss>\S+)(?: \(g (?P<grad_norm>\d+)\))?"
    validation = r"val @ (?P<step>\d+) -> acc (?P<accuracy>\S+)"
    source = open_source(write(tmp_path / "log", log), pattern=[train, validation], names={"grad_norm": "total_norm"})
    assert rest_of(source) == [Record(3, {"loss": 0.5, "total_norm": 7.0}), Record(4, {"loss": 0.25, "accuracy": 91.5})]
    assert "line 4: 'it 5: L oops': group 'loss' found 'oops', which is not a number" in source.issues.sentence()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "parquet"}, "format: must be one of jsonl, json, csv, tensorboard, text; got 'parquet'"),
        (
            {"pattern": "loss (?P<loss>.*)"},
            "named groups: loss; valid is a regular expression with named groups",
        ),
        ({"pattern": r"step (?P<step>\d+)"}, "named groups: step; valid is"),
        ({"pattern": "(?P<step"}, "missing >"),
        ({"pattern": ""}, "pattern: must be"),
        ({"pattern": []}, "pattern: must be"),
        ({"pattern": ["bagel", "x"]}, "pattern: must be"),
        ({"format": "csv", "pattern": "bagel"}, "pattern: goes with format text, not with csv"),
        ({"format": "tensorboard", "pattern": "bagel"}, "pattern: goes with format text, not with tensorboard"),
        ({"names": {"grad_norm": 3}}, "names: must map"),
    ],
)
def test_arguments_that_cannot_be(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        open_source(tmp_path / "log", **options)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("log.gz", b"\x1f\x8b\x08\0", "compressed (gzip); unpack it first"),
        ("notes.txt", "first\nsecond, third\n", "beginning with 'first' 'second, third'; give a format"),
        ("notes.txt", "first\n", r"e.g. 'step (?P<step>\d+) .*loss (?P<loss>\S+)'"),
        ("config.json", '{"model": {"layers": "many"},\n "steps": "ten"}\n', "valid formats: jsonl, json, csv, tensorboard, text"),
    ],
)
def test_nothing_we_know(tmp_path: Path, name: str, data: bytes | str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        open_source(write(tmp_path / name, data))


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a folder without TensorBoard event files"):
        open_source(tmp_path)
    with pytest.raises(UserError, match="a folder; csv is a format of files"):
        open_source(tmp_path, format="csv")
    assert open_source(tmp_path, format="tensorboard").read() == []
    with pytest.raises(UserError, match="no such file"):
        list(read_all(tmp_path / "nothing"))


# -- values, names, steps ---------------------------------------------------------------------------------------------


def test_what_is_a_number() -> None:
    row = (
        '{"step": 1, "a": NaN, "b": "NaN", "c": "-Infinity", "d": null, "e": "text", "f": true, "g": [1], "h": {"i": {"j": 2}}, '
        '"k": "1e-4", "l": 1' + "0" * 400 + ', "m": 3, "m": 4, "n": "1_000", "\\ud800": 5}'
    )
    (record,) = parsed(row)
    expected = {"a": math.nan, "b": math.nan, "c": -math.inf, "f": 1.0, "h/i/j": 2.0, "k": 1e-4, "l": math.inf, "m": 4.0, "?": 5.0}
    assert exact([record]) == exact([Record(1, expected)])
    assert all(type(value) is float for value in record.values.values())


@pytest.mark.parametrize("name", ["step", "global_step", "iter", "iteration", "_step", "trainer/global_step", "mine"])
@pytest.mark.parametrize("log", ['{{"{}": 7, "loss": 0.5, "epoch": 1}}', "{},loss,epoch\n7,0.5,1"])
def test_the_step_has_many_names(name: str, log: str) -> None:
    assert parsed(log.format(name), names={"mine": "step"}) == [Record(7, {"loss": 0.5, "epoch": 1.0})]


@pytest.mark.parametrize("step", ["7", "7.0", '"7"', "7e0"])
def test_a_step_may_be_written_as_another_number(step: str) -> None:
    assert parsed(f'{{"step": {step}, "loss": 0.5}}') == [Record(7, {"loss": 0.5})]


@pytest.mark.parametrize("step", ["-1", "1.5", "NaN", '"abc"', "1e300", "[1]", "99999999999999999999"])
def test_a_step_that_is_none_costs_its_row(step: str) -> None:
    parser = LineParser(format="jsonl")
    records = parser.feed(f'{{"step": {step}, "loss": 0.5}}\n{{"step": 1, "loss": 0.25}}\n'.encode()) + parser.finish()
    assert records == [Record(1, {"loss": 0.25})]
    assert "line 1: " in parser.issues.sentence()
    assert "not an integer >= 0" in parser.issues.sentence()


@pytest.mark.parametrize(
    "log", ['{"step": 1, "grad_norm": 2, "total_norm": 3}', "step,grad_norm,total_norm\n1,2,3", "step,total_norm,grad_norm\n1,3,2"]
)
def test_a_name_that_the_user_gave_beats_one_in_the_log(log: str) -> None:
    assert parsed(log, names={"grad_norm": "total_norm"}) == [Record(1, {"total_norm": 2.0})]


@pytest.mark.parametrize("log", ['{"loss": 1}\n{"loss": 2}\n', "loss,lr\n1,\n2,\n"])
def test_without_steps_the_rows_are_numbered(log: str) -> None:
    parser = LineParser()
    assert parser.feed(log.encode()) + parser.finish() == [Record(1, {"loss": 1.0}), Record(2, {"loss": 2.0})]
    assert parser.issues.sentence() == "no step column: the rows are numbered from 1"


def test_names_may_be_swapped_and_are_any_case_in_printed_lines() -> None:
    assert parsed('{"step": 1, "a": 1, "b": 2}', names={"a": "b", "b": "a"}) == [Record(1, {"a": 2.0, "b": 1.0})]
    assert parsed("Iter: 3, Loss=0.5, Grad=2\n", names={"Loss": "loss_flow"}) == [Record(3, {"loss_flow": 0.5, "grad": 2.0})]
    assert parsed("Tick: 3, Loss=0.5\n", names={"Tick": "step"}) == [Record(3, {"loss": 0.5})]
    assert parsed('{"Step": 3, "loss": 0.5}\n') == [Record(3, {"loss": 0.5})]


@pytest.mark.parametrize(
    ("log", "name"),
    [
        ('{"step": 900, "lr": 1}\nnoise\nTUNE_SSIM {"step": 1, "loss": 0.5}\n', "loss"),
        ('step 900: lr=1\nTUNE_SSIM {"step": 1, "loss": 0.5}\n', "loss"),
        ("Namespace(step: 900, lr=1)\n(step=0000001) Train Loss mse: 0.5, Train Steps/Sec: 2, \n", "loss_flow"),
    ],
)
def test_a_surer_format_puts_a_guess_right(log: str, name: str) -> None:
    parser = LineParser()
    (record,) = parser.feed(log.encode()) + parser.finish()
    assert (record.step, record.values[name]) == (1, 0.5)
    assert parser.issues.sentence() == ""


def test_a_configuration_printed_first_is_no_row() -> None:
    parser = LineParser()
    assert parsed('{"lr": 0.1}\n{"step": 5, "loss": 1}\n{"runtime": 3}\n') == [Record(5, {"loss": 1.0})]
    parser.feed(b'{"lr": 0.1}\n{"step": 5, "loss": 1}\n')
    assert "line 1: '{\"lr\": 0.1}': no step" in parser.issues.sentence()


def test_the_newest_step_is_held_back() -> None:
    parser = LineParser(format="jsonl")
    assert parser.feed(b'{"step": 1, "loss": 1}\n{"step": 1, "val": 2}\n') == []
    assert parser.feed(b'{"step": 2, "loss": 3}\n') == [Record(1, {"loss": 1.0, "val": 2.0})]
    assert parser.feed(b'{"step": 1, "loss": 9}\n{"step": 2, "val": 4}\n') == []  # too late; not too late
    last = parser.finish()
    assert "line 4: step 1 after step 2" in parser.issues.sentence()
    assert parser.feed(b'{"step": 2, "loss": 5}\n') + parser.finish() == []
    assert last == [Record(2, {"loss": 3.0, "val": 4.0})]  # and stays so


STEP_TWICE = {
    "csv": "step,loss,lr\n1,0.5,\n1,9.0,0.1\n2,0.4,0.1\n1,8.0,0.2\n",
    "jsonl": '{"step": 1, "loss": 0.5}\n{"step": 1, "loss": 9.0, "lr": 0.1}\n'
    '{"step": 2, "loss": 0.4, "lr": 0.1}\n{"step": 1, "loss": 8}\n',
    "text": "step 1 loss 0.5\nstep 1 loss 9.0 lr 0.1\nstep 2 loss 0.4 lr 0.1\nstep 1 loss 8\n",
}


@pytest.mark.parametrize("format", STEP_TWICE)
def test_the_first_value_of_a_step_wins(format: str) -> None:
    wanted = [Record(1, {"loss": 0.5, "lr": 0.1}), Record(2, {"loss": 0.4, "lr": 0.1})]
    parser = LineParser(format=format)
    assert parser.feed(STEP_TWICE[format].encode()) + parser.finish() == wanted
    assert merge([Record(1, {"loss": 0.5}), Record(1, {"loss": 9.0, "lr": 0.1}), Record(2, {"loss": 0.4, "lr": 0.1})]) == wanted


def test_the_step_held_back_is_released_and_its_later_rows_are_not_lost() -> None:
    parser = LineParser(format="jsonl")
    assert parser.held() is None and parser.release() == []
    assert parser.feed(b'{"step": 1, "loss": 1}\n') == [] and parser.held() == 1
    assert parser.release() == [Record(1, {"loss": 1.0})]
    assert parser.held() is None and parser.release() == []
    assert parser.feed(b'{"step": 1, "loss": 9, "val": 2}\n') == [] and parser.held() == 1
    assert parser.feed(b'{"step": 2, "loss": 3}\n') == [Record(1, {"val": 2.0})]
    assert parser.feed(b'{"step": 1, "late": 1}\n') + parser.finish() == [Record(2, {"loss": 3.0})]


def test_a_restart_from_a_checkpoint_is_heard_again_once_it_is_past() -> None:
    steps = [1, 2, 3, 2, 3, 4, 5]
    parser = LineParser(format="jsonl")
    records = parser.feed("".join(f'{{"step": {step}, "at": {k}}}\n' for k, step in enumerate(steps)).encode())
    assert [(record.step, record.values["at"]) for record in records + parser.finish()] == [(1, 0), (2, 1), (3, 2), (4, 5), (5, 6)]
    assert parser.issues.repeated == 1


def test_a_step_that_was_misread_does_not_silence_the_rest() -> None:
    log = (
        "warm-up: step 5000, lr 0.5\n" + "".join(f"step {step} loss 1\n" for step in range(3)) + "step 340 loss 1\nstep 3 loss 1\n"
    )
    parser = LineParser(format="text")
    assert steps_of(parser.feed(log.encode())) == [0, 1, 2]
    assert steps_of(parser.feed(b"step 3 norm 1\nstep 4 loss 1\nstep 340 norm 1\nstep 400 loss 1\n")) == [3, 4, 340]
    assert steps_of(parser.finish()) == [400, 5000]
    assert parser.issues.sentence() == ""


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from("abc"))), st.integers(0, 20))
def test_steps_only_grow_and_the_first_value_of_a_released_one_stands(log: list[tuple[int, str]], cut: int) -> None:
    lines = [f'{{"step": {step}, "{name}": {k}}}\n'.encode() for k, (step, name) in enumerate(log)]
    parser = LineParser(format="jsonl")
    early = parser.feed(b"".join(lines[:cut]))
    found = early + parser.feed(b"".join(lines[cut:])) + parser.finish()
    assert steps_of(found) == sorted(set(steps_of(found)))
    if log == sorted(log, key=lambda row: row[0]):
        merged = merge(Record(step, {name: float(k)}) for k, (step, name) in enumerate(log))
        assert found == merged
    assert parser.issues.repeated + sum(len(record.values) for record in found) <= len(log)


def test_lines_that_come_twice_change_nothing() -> None:
    once = "".join(f"step {step} loss {step / 8}\n" for step in range(50))
    twice = "".join(line * 2 for line in once.splitlines(keepends=True))
    assert parsed(twice) == parsed(once)
    assert parsed(once + once) == parsed(once)  # stdout is flushed later than stderr


# -- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b'\xef\xbb\xbf{"step": 1, "loss": 0.5}\r\n{"step": 2, "loss": 0.25}\r\n',
        b'{"step": 1, "loss": 0.5}\r{"step": 2, "loss": 0.25}\r',
        b'\xff\xfe\x80{"ste\n{"step": 1, "loss": 0.5}\0\0\n\0\n  {"step": 2, "loss": 0.25}  \n{"step": 3,',
        b'\x1b[1m{"step": 1, "loss": 0.5}\x1b[0m\n\x1b]0;title\x07{"step": 2, "loss": 0.25}\n',
    ],
)
def test_bytes_that_are_not_plain(data: bytes) -> None:
    assert parsed(data, format="jsonl") == [Record(1, {"loss": 0.5}), Record(2, {"loss": 0.25})]


def test_utf16_as_powershell_redirects_it() -> None:
    rows = "".join(f'{{"step": {step}, "loss": 0.5}}\n' for step in range(600))
    assert [len(parsed(rows.encode(encoding))) for encoding in ("utf-16", "utf-8-sig")] == [600, 600]
    assert parsed("step 1 loss 0.5\r\nstep 2 loss 0.25\r\n".encode("utf-16")) == [
        Record(1, {"loss": 0.5}),
        Record(2, {"loss": 0.25}),
    ]


def test_a_line_without_an_end_is_skipped_in_bounded_memory() -> None:
    parser = LineParser(format="jsonl")
    assert parser.feed(b'{"step": 1, "loss": 1}\n') == []
    chunk = b"x" * 1_000_000
    tracemalloc.start()
    for _ in range(100):
        parser.feed(chunk)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * MAX_LINE_BYTES
    assert parser.feed(b'\n{"step": 2, "loss": 2}\n') + parser.finish() == [Record(1, {"loss": 1.0}), Record(2, {"loss": 2.0})]
    assert parser.issues.unread == 1
    assert parser.issues.sentence() == "1 of 3 lines could not be read (line 2: longer than 4 MiB)"


def test_a_pattern_sees_a_bounded_part_of_a_line() -> None:
    log = "step 1 " + "x" * MAX_PATTERN_TEXT + " loss 0.5\n" + "step 2 " + "x" * (MAX_PATTERN_TEXT - 20) + " loss 0.5\n"
    assert steps_of(parsed(log, pattern=r"step (?P<step>\d+) .*loss (?P<loss>\S+)")) == [2]


def test_a_pattern_that_would_take_years(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_lines, "LINE_LIMIT_S", 0.05)
    pattern = r"step (?P<step>\d+) (?P<loss>([0-9]|\d\d)+)$"
    bad = "".join(f"step {step} " + "9" * 60 + "!\n" for step in range(5))

    def parse() -> tuple[list[Record], LineParser]:
        parser = LineParser(pattern=pattern)
        return parser.feed(f"step 7 55\n{bad}step 8 55\n".encode()) + parser.finish(), parser

    for records, parser in (parse(), in_another_thread(parse)):
        assert records == [Record(7, {"loss": 55.0})]
        assert parser.issues.unread == text_lines.SLOW_LINES
        assert "was given up after 3 lines that took too long" in parser.issues.sentence()
    assert not RecordLines(pattern, {}, printed=False).takes(bad.splitlines()[0])


def in_another_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=60)


def test_progress_bars_are_lines() -> None:
    bar = "".join(f"\r {k}%|## | {k}/100 [00:01<00:02, 1.0it/s, step={k}, loss={k / 8}]" for k in range(100))
    records = parsed(bar)
    assert [record.step for record in records] == list(range(100))
    assert records[7].values["loss"] == 7 / 8


# -- files that grow --------------------------------------------------------------------------------------------------


def rows(first: int, last: int, loss: float = 0.5) -> str:
    return "".join(f'{{"step": {step}, "loss": {loss}}}\n' for step in range(first, last))


def steps_of(records: list[Record]) -> list[int]:
    return [record.step for record in records]


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_a_log_is_followed_while_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    source = open_source(path)
    assert source.read() == []
    path.touch()
    assert source.read() == []
    append(path, rows(0, 3))
    assert steps_of(source.read()) == [0, 1]
    append(path, rows(3, 4)[:-9])
    assert source.read() == []
    append(path, rows(3, 4)[-9:] + '{"step": 4, "loss": 1}')
    assert steps_of(source.read()) == [2]
    assert steps_of(source.finish()) == [3, 4]  # the last line has no newline
    assert source.issues.sentence() == ""


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="feed what comes from a pipe to a LineParser"):
        open_source(tmp_path / "pipe")


def test_nothing_was_written(tmp_path: Path) -> None:
    source = open_source(tmp_path / "log")
    assert rest_of(source) == []
    assert "nothing was written there" in source.issues.sentence()


@pytest.mark.parametrize(
    ("name", "first"), [("metrics.csv", "step,loss\n"), ("log.jsonl", '{"event": "start"}\n'), ("a.csv", "step,")]
)
def test_a_log_that_has_just_begun_is_known_by_its_name(tmp_path: Path, name: str, first: str) -> None:
    path = write(tmp_path / name, first)
    source = open_source(path)
    assert source.read() == []
    append(path, "loss\n" if name == "a.csv" else "")
    append(path, '{"step": 1, "loss": 0.5}\n' if name == "log.jsonl" else "1,0.5\n")
    assert source.finish() == [Record(1, {"loss": 0.5})]


def test_a_short_log(tmp_path: Path) -> None:
    source = open_source(tmp_path / "log")
    write(tmp_path / "log", "step 1, a=2")
    assert rest_of(source) == [Record(1, {"a": 2.0})]


def test_a_log_without_rows_says_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "log"
    source = open_source(path)
    write(path, "loading\nOutOfMemory\n")
    assert rest_of(source) == []
    assert "no row of a training in 2 lines, beginning with 'loading' 'OutOfMemory'; give a format" in source.issues.sentence()


def test_a_log_that_is_rewritten(tmp_path: Path) -> None:
    path = write(tmp_path / "log", rows(0, 5))
    source = open_source(path)
    assert steps_of(source.read()) == [0, 1, 2, 3]
    write(path, rows(0, 2, loss=9.0))  # shorter
    assert source.read() == []
    append(path, rows(2, 9, loss=9.0))
    assert [(record.step, record.values["loss"]) for record in source.read()] == [(4, 0.5), (5, 9.0), (6, 9.0), (7, 9.0)]
    write(path, rows(0, 20, loss=0.0))  # longer: its size alone tells nothing
    assert [(record.step, record.values["loss"]) for record in source.read()] == [(8, 9.0), *((k, 0.0) for k in range(9, 19))]
    assert "the log was rewritten" in source.issues.sentence()
    assert not source.issues.repeated


def test_a_log_that_is_rotated(tmp_path: Path) -> None:
    path = write(tmp_path / "log", rows(0, 5))
    source = open_source(path)
    source.read()
    append(path, rows(5, 7))
    path.rename(tmp_path / "log.1")
    assert steps_of(source.read()) == [4, 5]  # the old file to its end, though its name is gone
    write(path, rows(7, 9))
    assert steps_of(source.read()) == [6, 7]
    assert "the log was replaced" in source.issues.sentence()


def test_a_header_that_grows_a_column(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.csv", "step,loss\n1,0.5\n2,0.25\n")
    source = open_source(path)
    assert steps_of(source.read()) == [1]
    write(path, "step,loss,val_loss\n1,0.5,\n2,0.25,\n2,,0.75\n")  # Lightning writes the file anew
    assert source.finish() == [Record(2, {"loss": 0.25, "val_loss": 0.75})]


def test_trainer_state_is_written_anew_each_time(tmp_path: Path) -> None:
    path = tmp_path / "trainer_state.json"
    source = open_source(path)
    history = [{"step": step, "loss": step / 4} for step in range(1, 6)]
    seen = []
    for rows_so_far in range(1, 6):
        text = json.dumps({"log_history": history[:rows_so_far]}, indent=2)
        write(path, text[:-7])  # half written
        seen += source.read()
        write(path, text)
        os.utime(path, ns=(rows_so_far, rows_so_far))
        seen += source.read()
    assert steps_of(seen) == [1, 2, 3, 4]
    assert steps_of(source.finish()) == [5]
    assert source.issues.sentence() == ""


LOGS: dict[str, bytes] = {
    "log.txt": BAGEL,
    "metrics.csv": LIGHTNING.encode(),
    "train.log": HUGGING_FACE.encode(),
    "log.jsonl": rows(0, 5).encode(),
    "out.log": b'{"lr": 0.5}\nnoise\r\nTUNE_SSIM {"step": 1, "loss": 2}\r\nTUNE_SSIM {"step": 1, "x": 2}\n'
    b'TUNE_SSIM {"step": 2, "x": 1}',
    "plain.csv": b"loss,lr\n" + b"".join(b"%d,0.5\n" % k for k in range(20)),
}


@pytest.mark.parametrize("name", LOGS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 700), max_size=5))
def test_pieces_change_nothing(tmp_path: Path, name: str, cuts: list[int]) -> None:
    data, path = LOGS[name], tmp_path / name
    path.unlink(missing_ok=True)
    whole = LineParser(file_name=name)
    wanted = exact(whole.feed(data) + whole.finish())
    source, found = open_source(path), []
    ends = [*sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for begin, end in zip([0, *ends], ends, strict=False):
        with path.open("ab") as file:
            file.write(data[begin:end])
        found += source.read()
    assert exact(found + source.finish()) == wanted
    assert source.issues.sentence() == whole.issues.sentence()


# -- TensorBoard ------------------------------------------------------------------------------------------------------


def event_files_of(folder: Path, steps: range, suffix: str = "", then: Callable[[Any], None] | None = None) -> Path:
    """A real event file, by tensorboardX."""
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(folder), filename_suffix=suffix) as writer:
        for step in steps:
            writer.add_scalar("train/loss", step / 8, step)
            writer.add_scalar("train/grad_norm", math.nan if step == 3 else 2.0, step)
            writer.add_histogram("weights", [1.0, 2.0, float(step)], step)
            writer.add_text("note", "x" * 100, step)
        if then:
            then(writer)
    (file,) = folder.glob(f"*{suffix}") if suffix else folder.glob("*")
    return file


NAMES = {"train/grad_norm": "total_norm"}


def test_event_files(tmp_path: Path) -> None:
    file = event_files_of(tmp_path / "run", range(5))
    wanted = [Record(k, {"train/loss": k / 8, "total_norm": math.nan if k == 3 else 2.0}) for k in range(5)]
    for path, format in [
        (file, None),
        (tmp_path / "run", None),
        (tmp_path, None),
        (file, "tensorboard"),
        (tmp_path, "tensorboard"),
    ]:
        source = open_source(path, format=format, names=NAMES)
        assert exact(rest_of(source)) == exact(wanted)
        assert source.issues.sentence() == ""
    event_files_of(tmp_path / "other", range(2))
    with pytest.raises(UserError, match="2 TensorBoard runs; name one of them: other, run"):
        open_source(tmp_path)


def test_event_files_of_a_resumed_run(tmp_path: Path) -> None:
    first = event_files_of(tmp_path / "a", range(5), suffix=".1")
    second = event_files_of(tmp_path / "b", range(3, 8), suffix=".2")
    folder = tmp_path / "run"
    folder.mkdir()
    first.rename(folder / "events.out.tfevents.999999999.host.9")  # as a text, the later one
    source = open_source(folder)
    assert steps_of(source.read()) == [0, 1, 2, 3]
    second.rename(folder / "events.out.tfevents.1000000000.host.1")
    assert steps_of(source.read()) == [4, 5, 6]
    assert steps_of(source.finish()) == [7]
    assert steps_of(list(read_all(folder))) == list(range(8))


def test_an_event_file_that_grows(tmp_path: Path) -> None:
    data = event_files_of(tmp_path / "run", range(6)).read_bytes()
    path = tmp_path / "events.out.tfevents.1.host"
    source, found = open_source(path), []
    for end in range(0, len(data) + 97, 97):
        write(path, data[:end])
        found += source.read()
    assert steps_of(found) == [0, 1, 2, 3, 4]
    assert steps_of(source.finish()) == [5]
    assert source.issues.sentence() == ""


def test_the_checksum() -> None:
    def unmasked(data: bytes) -> int:
        rotated = (masked_crc32c(data) - 0xA282EAD8) & 0xFFFFFFFF
        return ((rotated << 15) | (rotated >> 17)) & 0xFFFFFFFF

    assert unmasked(b"123456789") == 0xE3069283  # the check value of CRC-32/ISCSI in the catalogue of CRC algorithms
    assert unmasked(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert unmasked(b"") == 0


def test_a_broken_event_file(tmp_path: Path) -> None:
    data = bytearray(event_files_of(tmp_path / "run", range(6)).read_bytes())
    path = tmp_path / "events.out.tfevents.1.host"
    at = data.index(b"train/loss", data.index(b"train/loss") + 10)  # of step 1
    damaged = bytearray(data)
    damaged[at + 12] ^= 1  # a bit of its value
    source = open_source(write(path, bytes(damaged)))
    assert [sorted(record.values) for record in rest_of(source)][:2] == [["train/grad_norm", "train/loss"], ["train/grad_norm"]]
    assert "'train/loss': its checksum is wrong" in source.issues.sentence()
    damaged[at - 60 : at + 5] = b"\0" * 65  # and the frame itself
    source = open_source(write(path, bytes(damaged)))
    assert steps_of(rest_of(source)) == list(range(6))
    assert "bytes are not an event" in source.issues.sentence()
    source = open_source(write(path, bytes(data[:-5])))
    assert steps_of(rest_of(source)) == list(range(6))
    assert "bytes are not a complete event" in source.issues.sentence()


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ({"dtype": 1, "float_val": [0.25]}, 0.25),
        ({"dtype": 2, "double_val": [0.1]}, 0.1),
        ({"dtype": 3, "int_val": [-3]}, -3.0),
        ({"dtype": 9, "int64_val": [2**40]}, 2.0**40),
        ({"dtype": 10, "bool_val": [True]}, 1.0),
        ({"dtype": 19, "half_val": [0x3C00]}, 1.0),
        ({"dtype": 14, "half_val": [0x3FC0]}, 1.5),
        ({"dtype": 1, "tensor_content": b"\0\0\x80?"}, 1.0),
        ({"dtype": 14, "tensor_content": b"\xc0?"}, 1.5),
        ({"dtype": 7, "string_val": [b"0.5"]}, None),
        ({"dtype": 1, "float_val": [0.25], "tensor_shape": {"dim": [{"size": 1}]}}, None),
        ({"dtype": 1, "tensor_content": b"\0\0\x80?\0\0\x80?"}, None),
    ],
)
def test_scalars_as_tensors(tensor: dict[str, Any], value: float | None) -> None:
    """As TensorFlow 2 writes them. The message is encoded by tensorboardX's own classes."""
    from tensorboardX.proto import event_pb2, summary_pb2, tensor_pb2

    from tune_ssim.records.readers.protobuf import scalars

    summary = summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag="loss", tensor=tensor_pb2.TensorProto(**tensor))])
    event = event_pb2.Event(wall_time=1e9, step=2**40, summary=summary)
    assert scalars(event.SerializeToString()) == (2**40, [] if value is None else [("loss", value)])


# -- anything at all --------------------------------------------------------------------------------------------------

# The event {step: 5, summary: {value: {tag: "loss", simple_value: 0.5}}}, and around it its frame.
EVENT = b"\x10\x05\x2a\x0d\x0a\x0b\x0a\x04loss\x15\0\0\0\x3f"
HEAD = struct.pack("<Q", len(EVENT))
FRAME = HEAD + struct.pack("<I", masked_crc32c(HEAD)) + EVENT + struct.pack("<I", masked_crc32c(EVENT))

PIECES = st.sampled_from(
    [
        *(b'{"step": 1', b"}", b'{"step": 2, "loss": 0.5}', b"\n", b"\r", b"\r\n", b"\0", b"\x1b[31m", b"\xff\xfe"),
        *(b"TUNE_SSIM {", b'TUNE_SSIM {"step": 3, "x": 1e999}', b"step,loss\n", b"1,0.5\n", b",,", b'"', b"NaN", b"="),
        *(b"(step=0000007) Train Loss mse: 0.5, ", b"[" * 3000, b"9" * 5000, b'{"log_history": [', b'{"a":' * 2000),
        *(b"{'loss': 0.5}", b"|", b"-1", struct.pack("<QI", 20, 0x12345678), FRAME, b"\x0b", b"\xe2\x80\xa8", b"1_0"),
        *(b"step", b"step 4 loss nan", b"\xef\xbb\xbf", b"\\ud800"),
    ]
)
ANYTHING = st.lists(st.one_of(PIECES, PIECES, PIECES, st.binary(max_size=30)), max_size=30).map(b"".join)


@pytest.mark.parametrize("format", [None, *FORMATS, "pattern"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=ANYTHING, more=ANYTHING, cut=st.integers(0, 400))
def test_no_content_is_an_exception(tmp_path: Path, format: str | None, data: bytes, more: bytes, cut: int) -> None:
    path = tmp_path / "events.out.tfevents.1"
    options: dict[str, Any] = {"pattern": r"(?P<step>\d+)\D+(?P<loss>\S+)"} if format == "pattern" else {"format": format}
    path.unlink(missing_ok=True)
    source = open_source(path, names={"loss": "loss_flow"}, **options)
    found = source.read()
    for content in (data[:cut], data, data + more, more):
        write(path, content)
        found += source.read()
    found += source.finish()
    assert found == [] or steps_of(found) == sorted(set(steps_of(found)))
    assert all(type(value) is float for record in found for value in record.values.values())
    source.issues.sentence().encode()
    for name in {name for record in found for name in record.values}:
        name.encode()
    try:
        again = open_source(path, **options)
    except UserError as error:
        str(error).encode()
    else:
        rest_of(again)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.dictionaries(st.text(max_size=3), st.one_of(st.floats(), st.integers(), st.none(), st.text(max_size=3)), max_size=3),
            st.sampled_from(['{"a": [{}', "{}]}", '{"step": 1, "x": "', '"}', '{"step": 1}, {"step": 2}', "{} {}", "[]", "1"]),
        ),
        max_size=20,
    )
)
def test_decoding_lines_together_is_decoding_each(lines: list[Any]) -> None:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    together = LineParser(format="jsonl")
    found = together.feed("".join(text + "\n" for text in texts).encode()) + together.finish()
    alone = LineParser(format="jsonl")
    one_by_one = [record for text in texts for record in alone.feed(text.encode() + b"\n")] + alone.finish()
    assert exact(found) == exact(one_by_one)
    assert together.issues == alone.issues


JSON_NUMBERS = st.one_of(
    st.floats().map(json.dumps),
    st.integers().map(str),
    st.sampled_from(["0", "-0.0", "1e400", "1" * 400, "9223372036854775808", "NaN", "Infinity", "-Infinity"]),
    st.floats(-9, 9).map("{:.3e}".format),
)
NOT_A_NUMBER = st.sampled_from(
    ["Inf", "-Inf", "-NaN", "nan", "01", "1.", ".5", "null", "true", '"0.5"', '"Inf"', '{"b": 1}', "[1]", "1}{", ""]
)


@settings(max_examples=400, deadline=None)
@given(
    names=st.lists(st.sampled_from(["a", "b", "step", "global_step", "é", "a\\u0041", "Inf", "{", ""]), min_size=1, max_size=4),
    rows=st.lists(st.lists(JSON_NUMBERS, min_size=4, max_size=4), min_size=4, max_size=12),
    odd=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 3), NOT_A_NUMBER), max_size=1),
    line=st.lists(st.tuples(st.integers(0, 12), st.sampled_from(["", "{}", '{"a": 1}{"b": 2}', '{"a": 1,', "}", " "])), max_size=1),
    spaced=st.booleans(),
)
def test_reading_objects_by_columns_is_reading_each(
    names: list[str], rows: list[list[str]], odd: list[tuple[int, int, str]], line: list[tuple[int, str]], spaced: bool
) -> None:
    for row, at, value in odd:
        rows[row % len(rows)][at] = value
    colon = ": " if spaced else ":"
    texts = []
    for step, row in enumerate(rows):
        fields = (
            [("step", str(step)), *zip(names, row, strict=False)] if "step" not in names else list(zip(names, row, strict=False))
        )
        texts.append("{" + ", ".join(f'"{name}"{colon}{value}' for name, value in fields) + "}")
    for at, text in line:
        texts.insert(at, text)
    together, alone = (LineParser(format="jsonl", names={"b": "loss"}) for _ in range(2))
    found = together.feed("".join(text + "\n" for text in texts).encode()) + together.finish()
    one_by_one = [record for text in texts for record in alone.feed(text.encode() + b"\n")] + alone.finish()
    assert exact(found) == exact(one_by_one)
    assert together.issues == alone.issues


NUMBERS = st.one_of(
    st.floats().map(repr), st.integers(-5, 40).map(str), st.sampled_from(["", " 1", "x", "1_0", "0x1", "NaN", "-inf"])
)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(NUMBERS, NUMBERS, st.sampled_from([1, 1, 1, 1, 1, 2, 0, -1, 1e9, 0.5])), min_size=40, max_size=60),
    odd=st.lists(
        st.tuples(st.integers(0, 60), st.sampled_from(["", "1", "1,2,3,4", '"4",5,6', "step,a,b", "b,step,a", "\0"])), max_size=2
    ),
    clean=st.booleans(),
    delimiter=st.sampled_from([",", ";", "\t"]),
)
@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_reading_many_rows_at_once_is_reading_each(
    format: str, rows: list[tuple[str, str, float]], odd: list[tuple[int, str]], clean: bool, delimiter: str
) -> None:
    """`clean`: mostly rows that are read as a table."""
    texts, step = [], 0.0
    for k, (a, b, gap) in enumerate(rows):
        step = max(step + gap, 0)
        at: Any = int(step) if step == int(step) else step
        if format == "csv":
            texts.append(delimiter.join([str(at), *((str(k / 7), "2") if clean else (a, b))]))
        else:
            texts.append(
                json.dumps({"step": at, "a": k / 7} | ({"b": k} if k % 3 else {}) if clean else {"a": a, "b": b, "step": at})
            )
    for place, text in odd[: 1 if clean else 2]:
        texts.insert(place, text.replace(",", delimiter))
    if format == "csv":
        texts.insert(0, delimiter.join(["step", "a", "b"]))
    together, alone = (LineParser(format=format, names={"b": "loss"}) for _ in range(2))
    found = together.feed("".join(text + "\n" for text in texts).encode()) + together.finish()
    one_by_one = [record for text in texts for record in alone.feed(text.encode() + b"\n")] + alone.finish()
    assert exact(found) == exact(one_by_one)
    assert together.issues == alone.issues


A_NUMBER = st.one_of(
    st.floats(-50, 50).map(lambda value: f"{value:.4g}"),
    st.integers(0, 10**12).map(str),
    st.sampled_from(["nan", "NaN", "-inf", "Infinity", "+.5", "1.", "1e400", "x", "0x1"]),
)
STEP_FORMS = ["step {}", "Step: {}/1000", "iter=[{}]", "global_step: {}", "(step={:07d}) ", "(step={:07d}/epoch=0003) "]
PRINTED_NAMES = [
    "loss",
    "loss_2",
    "Total Norm",
    "train/loss",
    "Train Loss mse",
    "Train Loss l1",
    "lr",
    "epoch",
    "it",
    "x-y",
    "eta",
    "step_time",
]


@settings(max_examples=150, deadline=None)
@given(
    head=st.sampled_from(["", "[2026-11-22 1{0}:0{0}:59] ", "INFO {0}{0}: ", "rank{0} "]),
    form=st.sampled_from(STEP_FORMS),
    fields=st.lists(
        st.tuples(
            st.sampled_from(PRINTED_NAMES), st.sampled_from([": ", "=", " ", " : "]), st.sampled_from(["", "s", "%", " MB", ")"])
        ),
        min_size=1,
        max_size=4,
    ),
    joiner=st.sampled_from([" ", " | ", ", "]),
    tail=st.sampled_from(["", " [{0}/100]", " v1.{0}", " (gpu{0} 3GB)", "x{0}"]),
    numbers=st.lists(A_NUMBER, min_size=8, max_size=8),
    gaps=st.lists(st.sampled_from([1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 7, -3]), min_size=40, max_size=60),
    odd=st.lists(
        st.tuples(st.integers(0, 60), st.sampled_from(["chatter", "", "step 5 loss 1", "loss=3", "(step=9) a: 1"])), max_size=3
    ),
    pattern=st.sampled_from([None, r"(?:tep|iter)\D{1,3}(?P<step>\d+)\D+(?P<a>\d[\d.]*)(?:\D+(?P<b>\d[\d.]*))?"]),
)
def test_reading_lines_that_are_alike_is_reading_each(
    head: str, form: str, fields: list[tuple[str, str, str]], joiner: str, tail: str, numbers: list[str], gaps: list[int],
    odd: list[tuple[int, str]], pattern: str | None,
) -> None:  # fmt: skip
    texts, step = [], 0
    for k, gap in enumerate(gaps):
        step = max(step + gap, 0)
        # Each number in a line or two; most of the others are plain.
        shown = [numbers[(k + at) % 8] if (k + at) % 19 == 0 else f"{k * (at + 1) / 7:.5g}" for at in range(len(fields))]
        line = [form.format(step)] + [name + sign + number + end for (name, sign, end), number in zip(fields, shown, strict=True)]
        texts.append((head + "{1}" + tail).format(k % 10, joiner.join(line)))
    for place, text in odd:
        texts.insert(place, text)
    together, alone = (LineParser(format="text", pattern=pattern, names={"loss_2": "loss", "a": "total_norm"}) for _ in range(2))
    half = len(texts) // 2  # what is read first says how the rest looks
    found = [
        record for part in (texts[:half], texts[half:]) for record in together.feed("".join(text + "\n" for text in part).encode())
    ] + together.finish()
    one_by_one = [record for text in texts for record in alone.feed(text.encode() + b"\n")] + alone.finish()
    assert exact(found) == exact(one_by_one)
    assert together.issues == alone.issues


@pytest.mark.parametrize("word", ["nan", "-nan", "NAN", "inf", "-Inf", "+inf", "-NaN", "infinity"])
def test_numbers_that_are_none_are_read_however_they_are_spelt(word: str) -> None:
    parser = LineParser()
    lines = "".join(f'{{"step": {step}, "loss": {word if step > 300 else 0.5}, "note": "nan, inf"}}\n' for step in range(600))
    found = parser.feed(lines.encode()) + parser.finish()
    assert (len(found), parser.issues.unread) == (600, 0)
    assert repr(found[-1].values["loss"]) == repr(float(word)).replace("-nan", "nan")
    tagged = LineParser()
    found = tagged.feed(f'epoch 1\nTUNE_SSIM {{"step": 3, "loss": {word}}} ok\n'.encode()) + tagged.finish()
    assert repr(found[-1].values["loss"]) == repr(float(word)).replace("-nan", "nan")


def test_lines_that_have_a_step_and_no_metric() -> None:
    """As a training prints before its first loss."""
    texts = [
        *(f"(step={step:07d}) " for step in range(30)),
        *(f"(step={step:07d}) Train Loss mse: 0.5, " for step in range(30, 60)),
    ]
    parser = LineParser()
    found = parser.feed("".join(text + "\n" for text in texts).encode()) + parser.finish()
    assert [(record.step, dict(record.values)) for record in found][-1] == (59, {"loss_flow": 0.5})
    assert len(found) == 30


def test_a_surer_format_in_the_midst_of_lines_that_are_alike() -> None:
    texts = [f"step {step}/1000 | loss 0.5" for step in range(700)]
    texts[520] = "(step=0000520) Train Loss mse: 0.4, "
    whole, pieces = LineParser(), LineParser()
    found = whole.feed("".join(text + "\n" for text in texts).encode()) + whole.finish()
    assert found == [record for text in texts for record in pieces.feed(text.encode() + b"\n")] + pieces.finish()
    assert found[-1].step == 520


@pytest.mark.parametrize("line", ["micro-step 7 | step 3 | loss 0.5", "sub-step: 9, step: 3, loss: 0.5"])
def test_a_part_of_a_word_is_no_step(line: str) -> None:
    parser = LineParser(format="text")
    assert [record.step for record in parser.feed(line.encode() + b"\n") + parser.finish()] == [3]


@pytest.mark.parametrize("name", ["a.jsonl", "b.csv", "d.log"])
def test_a_plain_log_is_read_as_tables(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, DOORS[name][:1000])
    source = open_source(path)
    parts = list(source.batches())
    write(path, DOORS[name])
    parts += source.batches()
    assert any(isinstance(part, Table) for part in parts)
    assert [record for part in parts for record in part] == RUN[:-1]


# -- one run through every door ---------------------------------------------------------------------------------------

KEYS = ["loss", "loss_ssim", "total_norm"]
RUN = [Record(step, {key: 1 / (step + k + 1) for k, key in enumerate(KEYS)}) for step in range(40)]


def as_csv(run: list[Record]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["step", *KEYS])
    writer.writeheader()
    writer.writerows({"step": record.step, **record.values} for record in run)
    return text.getvalue()


def as_lines(run: list[Record], form: Callable[[int, Mapping[str, float]], str]) -> str:
    return "".join(form(record.step, record.values) + "\n" for record in run)


DOORS: dict[str, str] = {
    "a.jsonl": as_lines(RUN, lambda step, values: json.dumps({"step": step, **values})),
    "b.csv": as_csv(RUN),
    "c.json": json.dumps({"log_history": [{"step": record.step, **record.values} for record in RUN]}, indent=2),
    "d.log": as_lines(RUN, lambda step, values: f"step {step}: " + ", ".join(f"{key}={value!r}" for key, value in values.items())),
    "e.log": as_lines(RUN, lambda step, values: "noise\nTUNE_SSIM " + json.dumps({"step": step, **values})),
}


@pytest.mark.parametrize("name", DOORS)
def test_one_run_through_every_door(tmp_path: Path, name: str) -> None:
    assert list(read_all(write(tmp_path / name, DOORS[name]))) == RUN == merge(RUN)


def test_a_large_log_comes_in_parts(tmp_path: Path) -> None:
    path = write(tmp_path / "log.jsonl", rows(0, 200_000))
    sizes = [len(part) for part in open_source(path).batches()]
    assert sum(sizes) == 199_999
    assert max(sizes) < 50_000
