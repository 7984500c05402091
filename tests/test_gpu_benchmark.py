"""benchmarks/gpu.py at toy size on the CPU, so that it is known to run where a GPU can be had."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.e2e
def test_it_measures_all_parts_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    out = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--rounds", "2", "--size", "0.07", "--steps", "2", "--no-compile", "--output", str(out)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    import gpu

    gpu.main()
    found = json.loads(out.read_text())
    assert found["device"] == "cpu"
    assert [sorted(row["ms"]) for row in found["ssim"]] == [["ours", "pytorch_msssim"]] * 2
    assert all(row["over_ours"]["pytorch_msssim"] > 0 for row in found["ssim"])
    assert found["decoded"]["over_shared"]["separate"] > 0
    assert set(found["watching"]["percent_of_a_step"]) == {"watched", "clip_taps"}
    trial = found["transfers"]["a trial with the default guards"]
    assert trial["host_reads_per_step"] > 0, "a trial's numbers are read by the host"
    assert trial["copies_to_host_per_step"] is None, "nothing is claimed of a GPU"
    assert "not measured on a CPU" in capsys.readouterr().out
