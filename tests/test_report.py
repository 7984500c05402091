"""`tune-ssim report`: one page that holds everything, needs no network, and stays harmless whatever a study is named."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_studies import SMALL, USUAL, baseline, study, trial

from tune_ssim.base.errors import UserError
from tune_ssim.cli.app import exit_code
from tune_ssim.orchestration.phases import run_study
from tune_ssim.report.importance import importance_of
from tune_ssim.report.study_page import PAGE, follow_study, page_of, write_page
from tune_ssim.report.trial_curves import POINTS, Curves, curves_of
from tune_ssim.results.events import EventWriter
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.results.study_lock import StudyLock
from tune_ssim.study.objective import Objective
from tune_ssim.study.space import load_space
from tune_ssim.study.study import load_study

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """A real study: calibrated, with a pruned trial, samples and a confirm phase."""
    settings: dict[str, Any] = {
        **SMALL,
        "name": "reported",
        "search": {"strategy": "random", "trials": 3},
        "calibration": {},
        "confirm": {"seeds": 2, "steps": 50, "finalists": 1},
    }
    return run_study(load_study(settings), storage=tmp_path_factory.mktemp("storage"), in_process=True)


def test_a_run_leaves_a_page_that_answers_first(ran: StudyFolder) -> None:
    page = (ran.path / PAGE).read_text()
    for one in ran.trials():
        assert one.trial_id in page and str(one.verdict) in page
    answer = page[page.index('aria-label="answer"') : page.index("Before launch")]
    header = page[: page.index("</header>")]
    assert "Which setting improves <b>ΔSSIM</b> without ruining the model?" in header
    assert "✗ pruned: it began to ruin the model" in page and "Gain 30 @ 0.3: weight × gradient scale" in page
    assert ("ssim_loss_weight=" in answer and "tune-ssim export reported" in answer) or "No setting to use" in answer
    assert page.count("<svg") >= len(ran.trials())
    assert page.count("data:image/png") == 1, "the heat map"
    shown = re.findall(r"<figcaption>.*? · (\S+), step", page)
    assert len(shown) == len(set(shown)) >= 3 and shown[0] == "baseline-0", "samples"
    assert "done ·" in page and 'http-equiv="refresh"' not in page


def test_it_needs_no_network(ran: StudyFolder) -> None:
    page = (ran.path / PAGE).read_text()
    fetched = re.findall(r"""(?:src|href)=["']?([^"'\s>]+)""", page)
    assert all(target.startswith(("data:", "#")) for target in fetched), [target[:60] for target in fetched]
    assert "default-src 'none'" in page and "@import" not in page and "url(http" not in page


def test_the_page_is_an_event_for_mlflow(ran: StudyFolder) -> None:
    assert [event["path"] for event in ran.events() if event["event"] == "file"][-1] == PAGE


def test_a_name_or_reason_is_text_and_nothing_else(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=http://example.org/x>"
    folder = study(tmp_path, baseline(), trial("00002", "error", reason=evil), trial("t'\"><b>", delta_ssim=0.01))
    page = page_of(folder)
    assert evil not in page and "&lt;script&gt;alert(1)" in page and "<b>" not in page.split("<h2>Trials")[1].split("</table>")[0]


def test_without_a_setting_it_says_why(tmp_path: Path) -> None:
    page = page_of(study(tmp_path, baseline(), trial("00002", "pruned", "NaN")))
    assert "No setting to use" in page and "no safe trial to export" in page and "tune-ssim export" not in page
    assert "Not calibrated" in page


def test_no_trial_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no trial has ended yet"):
        page_of(study(tmp_path))


def test_a_hundred_trials_stay_below_five_megabytes(tmp_path: Path) -> None:
    names = [f"trial-{index:03d}" for index in range(100)]
    folder = study(tmp_path, baseline(), *(trial(name, delta_ssim=0.001 * index) for index, name in enumerate(names)))
    writer = EventWriter(folder)
    for name in ("baseline-0", *names):
        writer.trial_started(name, "search", {})
        writer.result(name, {"records": [[step, {"loss": 1 / step, "total_norm": 2 + step % 7}] for step in range(1, 301)]})
    assert len(page_of(folder).encode()) < 5_000_000


def test_curves_are_short_and_keep_their_peaks() -> None:
    records = [[step, {"loss": 1.0, "total_norm": 900.0 if step == 777 else 1.0}] for step in range(2000)]
    records += [[2000, {"loss": "NaN", "total_norm": "Infinity"}]]
    curves = curves_of([{"event": "records", "trial_id": "a", "records": records}, {"event": "end"}])
    steps, norms = curves["a"].reduced("total_norm")
    assert len(steps) == len(norms) == POINTS and max(norms) == 900.0
    assert Curves().reduced("loss") == ([], [])


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    study(tmp_path, *USUAL)
    target = tmp_path / "page.html"
    assert exit_code(["report", "-o", str(target), "--storage-path", str(tmp_path)]) == 0
    assert f"wrote {target}" in capsys.readouterr().out
    assert "00004" in target.read_text()
    assert exit_code(["report", "--storage-path", str(tmp_path / "none")]) == 2


def test_following_ends_with_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tune_ssim.report.study_page.FOLLOW_S", 0.02)
    folder, path = study(tmp_path, *USUAL), tmp_path / "live.html"
    writer = EventWriter(folder)
    writer.study_started("fundus-ssim")
    follower = threading.Thread(target=follow_study, args=(folder, path))
    with StudyLock(folder.path):
        follower.start()
        while not (path.exists() and 'http-equiv="refresh"' in path.read_text()):
            assert follower.is_alive()
        writer.study_ended("done")
        follower.join(30)
    assert not follower.is_alive() and 'http-equiv="refresh"' not in path.read_text()


def test_following_a_study_that_was_killed_ends(tmp_path: Path) -> None:
    folder = study(tmp_path, *USUAL)
    EventWriter(folder).study_started("fundus-ssim")
    assert "still running, or killed" in follow_study(folder, tmp_path / "dead.html").read_text()


def test_a_damaged_study_gives_a_page_or_names_the_file(ran: StudyFolder, tmp_path: Path) -> None:
    folder = StudyFolder(Path(shutil.copytree(ran.path, tmp_path / "reported")))
    pictures = folder.path / "images" / ran.trials()[0].trial_id
    for name, content in (("000900", b"no picture"), ("000901", b""), ("best", b"x")):
        (pictures / f"smoke_{name}.png").write_bytes(content)
    (pictures / "smoke_000902.png").mkdir()
    for line in (
        '{"event": "records"}',
        '{"event": "records", "trial_id": "x", "records": [[1]]}',
        '{"event": "records", "records": 3}',
    ):
        with folder.events_file.open("a") as events:
            events.write(line + "\n")
    assert "Samples" in page_of(folder)
    for file, content in (
        ("calibration.json", '{"model": {}, "settings": []}'),
        ("preflight.json", '{"status": "ok", "checks": [1]}'),
        ("study.yaml", "name: reported\n"),
    ):
        sound = (ran.path / file).read_bytes() if (ran.path / file).exists() else None
        (folder.path / file).write_text(content)
        with pytest.raises(UserError, match=file):
            page_of(folder)
        if sound is None:
            (folder.path / file).unlink()
        else:
            (folder.path / file).write_bytes(sound)


def test_what_was_not_recorded_is_not_called_switched_off(tmp_path: Path) -> None:
    assert "There is no record of a preflight" in page_of(study(tmp_path, *USUAL))
    off = study(tmp_path / "off", *USUAL, yaml="name: fundus-ssim\npreflight: null\n")
    assert "The study has switched preflight off" in page_of(off)


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: chromium or google-chrome")
def test_a_browser_shows_it_and_the_slider_moves_the_samples(ran: StudyFolder, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    path = write_page(ran, tmp_path / "page.html")
    probe = """<script>
      const moved = document.querySelectorAll("figure[data-steps]");
      slider.value = 0; slider.dispatchEvent(new Event("input"));
      const visible = one => [...one.querySelectorAll("img")].filter(image => !image.hidden);
      const shown = [...moved].map(one => visible(one).map(image => image.dataset.step));
      const wide = document.documentElement.scrollWidth <= innerWidth;
      document.body.style.width = "340px";  // as on a phone
      const card = document.querySelector(".card"), edge = card.getBoundingClientRect().right;
      const cut = [...card.querySelectorAll("svg, pre")].filter(
        one => one.getBoundingClientRect().right > edge || one.scrollWidth > one.clientWidth + 1).length;
      document.title = JSON.stringify({shown, wide, cut,
        broken: [...document.images].filter(one => !one.hidden && !one.naturalWidth).length});
    </script>"""
    path.write_text(path.read_text().replace("</body>", f"{probe}</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900", f"--user-data-dir={tmp_path / 'profile'}"]
    dumped = subprocess.run(
        [CHROMIUM, *options, "--virtual-time-budget=3000", "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120
    )
    title = re.search(r"<title>(.*?)</title>", dumped.stdout, re.S)
    assert title is not None, dumped.stderr[-500:]
    assert '"wide":true,"cut":0,"broken":0' in title.group(1), title.group(1)
    shown = re.findall(r'\["(\d+)"\]', title.group(1))
    assert shown and set(shown) == {"0"}, "each figure shows one picture: that of the first step"


def _varied(trials: int, best_gain: float = 1.0) -> list[Any]:
    """Trials whose objective depends on the gain only; half of the large gains were pruned."""
    made = []
    for index in range(trials):
        gain, max_t = 10 ** (-2 + 4 * ((index * 0.618) % 1)), 0.05 + 0.9 * ((index * 0.755) % 1)
        config = {"ssim_loss_weight": gain, "ssim_loss_max_t": max_t, "ssim_grad_scale": 1.0}
        ruined = gain > 30 and index % 2
        worth = {} if ruined else {"delta_ssim": 0.01 - 0.002 * abs(math.log10(gain / best_gain))}
        made.append(trial(f"{index:05d}", "pruned" if ruined else "safe", worth.get("delta_ssim"), config=config))
    return made


SEARCHED = {"gain": {"log_uniform": [0.01, 100]}, "ssim_loss_max_t": {"uniform": [0.05, 0.95]}}


@pytest.mark.parametrize("best_gain", [0.05, 1.0, 20.0])
def test_the_setting_that_decides_comes_first(best_gain: float) -> None:
    found = importance_of(_varied(40, best_gain), Objective(), load_space({"name": "searched", "parameters": SEARCHED}))
    assert list(found) == ["gain", "ssim_loss_max_t"] and found["gain"] > 0.7 and sum(found.values()) == pytest.approx(1)


def test_few_trials_or_one_setting_tell_no_importance() -> None:
    space = load_space({"name": "searched", "parameters": SEARCHED})
    assert importance_of(_varied(19), Objective(), space) == {}
    one = load_space({"name": "one", "parameters": {"gain": SEARCHED["gain"]}, "fixed": {"ssim_loss_max_t": 0.3}})
    assert importance_of(_varied(40), Objective(), one) == {}
    same = [trial(f"{index:05d}", "pruned", None, config=one.config) for index, one in enumerate(_varied(40))]
    assert importance_of(same, Objective(), space) == {}, "nothing was better than anything else"


def test_the_page_shows_it_where_there_are_enough_trials(tmp_path: Path) -> None:
    folder = study(tmp_path, baseline(), *_varied(30))
    given = {**folder.study(), "space": {"name": "searched", "parameters": SEARCHED}}
    folder.study_file.write_text(yaml.safe_dump(given))
    page = page_of(folder)
    assert "Which setting decides" in page and page.index("<code>gain</code>") < page.index("<code>ssim_loss_max_t</code>")
