"""What reaches the user: the source distribution, the wheel made from it, and an editable installation.

Built without isolation (hatchling is in the `test` extra), so without a network, from a copy of the checkout.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import versions
from audit import judge
from packaging.requirements import Requirement
from packaging.version import Version

import tune_ssim

ROOT = Path(__file__).resolve().parents[1]
# Data that the code reads at run time: folder in the repository → where the package finds it.
DATA = {
    "search_spaces": "tune_ssim/search_spaces",
    "tune_ssim/guards/rule_packs": "tune_ssim/guards/rule_packs",
    "tune_ssim/study/studies": "tune_ssim/study/studies",
    "tune_ssim/tasks/weights": "tune_ssim/tasks/weights",
}
STRAY = ("venv", "site-packages", "__pycache__", "tune_ssim_results", "mlruns", ".db", ".git/", ".cache")

USE_FROM_ELSEWHERE = """
import sys
from pathlib import Path
import tune_ssim
from tune_ssim.study.space import bundled_spaces_folder
print(Path(tune_ssim.__file__).resolve().parent)
print(Path(bundled_spaces_folder()).resolve())
print(*sorted(file.name for file in Path(bundled_spaces_folder()).glob("*.yaml")))
"""


@dataclass(frozen=True)
class Built:
    source: Path  # the repository's copy that it was built from
    sdist: Path
    wheel: Path


def run(arguments: Sequence[str | Path], cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        arguments, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def files_below(folder: Path) -> set[str]:
    """Paths relative to `folder` of what an installation needs, without what a run leaves behind."""
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The repository's copy with the litter of daily work in it, its sdist, and the wheel built from that sdist."""
    source = tmp_path_factory.mktemp("source") / "repository"
    source.mkdir()
    for name in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "Makefile",
        "constraints.txt",
        "cluster.yaml",
    ):
        (source / name).write_bytes((ROOT / name).read_bytes())
    (source / ".gitignore").write_bytes((ROOT / ".gitignore").read_bytes())
    for folder in ("tune_ssim", "search_spaces", "docs", "tests", "examples", "benchmarks"):
        for name in files_below(ROOT / folder):
            target = source / folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / folder / name).read_bytes())
    for litter in (
        ".venv/lib/site-packages/x.py",
        "tune_ssim_results/fundus-ssim/trials.jsonl",
        "mlruns/m",
        "mlflow.db",
    ):
        (source / litter).parent.mkdir(parents=True, exist_ok=True)
        (source / litter).write_text("litter")
    out = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source], cwd=out)
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    return Built(source, sdist, wheel)


def test_the_wheel_carries_the_package_and_its_data(built: Built) -> None:
    names = set(zipfile.ZipFile(built.wheel).namelist())
    package = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    wanted = {f"tune_ssim/{name}" for name in files_below(ROOT / "tune_ssim")}
    wanted |= {f"{DATA['search_spaces']}/{name}" for name in files_below(ROOT / "search_spaces")}
    assert package == wanted
    assert "tune_ssim/py.typed" in package
    assert {name.split("/")[-1] for name in names - package} >= {"METADATA", "entry_points.txt", "LICENSE"}


@pytest.mark.parametrize("folder", DATA)
def test_data_is_there_and_unchanged(built: Built, folder: str) -> None:
    names = files_below(ROOT / folder)
    assert names, f"{folder} is empty"
    with zipfile.ZipFile(built.wheel) as wheel, tarfile.open(built.sdist) as sdist:
        top = sdist.getnames()[0].split("/")[0]
        for name in names:
            content = (ROOT / folder / name).read_bytes()
            assert wheel.read(f"{DATA[folder]}/{name}") == content
            member = sdist.extractfile(f"{top}/{folder}/{name}")
            assert member is not None
            assert member.read() == content


def test_the_source_distribution_has_the_tests_and_no_litter(built: Built) -> None:
    with tarfile.open(built.sdist) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "constraints.txt",
        "cluster.yaml",
        "tests/test_packaging.py",
    } <= names
    assert not [name for name in names for stray in STRAY if stray in name]


def test_the_version_is_the_packages(built: Built) -> None:
    assert built.wheel.name == f"tune_ssim-{tune_ssim.__version__}-py3-none-any.whl"
    assert built.sdist.name == f"tune_ssim-{tune_ssim.__version__}.tar.gz"


def install(requirement: Sequence[str | Path], target: Path) -> None:
    """Into an own folder, without dependencies: those come from the interpreter that runs the tests."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    run([*pip, "--target", target, *requirement], cwd=target.parent)


def test_the_installed_wheel_finds_its_spaces_from_any_folder(built: Built, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install([built.wheel], site)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    package, folder, files = run([sys.executable, "-c", USE_FROM_ELSEWHERE], elsewhere, PYTHONPATH=str(site)).splitlines()
    assert Path(package) == (site / "tune_ssim").resolve()  # not the checkout, though that may be installed too
    assert Path(folder) == (site / "tune_ssim" / "search_spaces").resolve()
    assert files.split() == sorted(file.name for file in (ROOT / "search_spaces").glob("*.yaml"))


def test_an_editable_installation_reads_the_checkout_and_keeps_no_copy(built: Built, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    build = "import sys; from hatchling.build import build_editable; print(build_editable(sys.argv[1]))"
    run([sys.executable, "-c", build, wheels], cwd=built.source)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert len(names) == 1, f"only a path entry, no copies that go stale: {names}"
        assert names[0].endswith(".pth")
        path = archive.read(names[0]).decode().strip()
    assert Path(path) == built.source
    # A space added after the installation is seen at once.
    (built.source / "search_spaces" / "added_later.yaml").write_text("name: added_later\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    package, folder, files = run([sys.executable, "-c", USE_FROM_ELSEWHERE], elsewhere, PYTHONPATH=path).splitlines()
    assert Path(package) == built.source.resolve() / "tune_ssim"
    assert Path(folder) == built.source.resolve() / "search_spaces"
    assert "added_later.yaml" in files.split()


@pytest.mark.parametrize(("name", "place"), [("ray", 0), ("mlflow", 1)])
def test_the_range_of_a_library_is_the_tested_one(name: str, place: int) -> None:
    """tests/versions.py runs both ends."""
    requirements = re.findall(rf'^  "({name}(?:\[\w+\])?>=[^"]*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    (specifier,) = {Requirement(one).specifier for one in requirements}  # the same in each extra
    oldest, newest = Version(versions.OLDEST[place]), Version(versions.NEWEST[place])
    assert {f">={oldest.major}.{oldest.minor}", f"<{newest.major}.{newest.minor + 1}"} == {str(one) for one in specifier}
    assert newest.minor - oldest.minor >= 2
    assert f"{name}=={newest}\n" in (ROOT / "constraints.txt").read_text()


def test_an_audit_without_answers_fails() -> None:
    """Where the advisory database cannot be reached, pip-audit leaves every package out and ends with 0."""
    sound = {"name": "numpy", "version": "2.4.6", "vulns": []}
    leak = {"name": "ray", "version": "2.6.0", "vulns": [{"id": "CVE-2023-48022", "fix_versions": []}]}
    unknown = {"name": "wrapt", "skip_reason": "Dependency not found on PyPI"}
    assert judge(json.dumps({"dependencies": [sound]})) == (0, ["audit: no known vulnerability in 1 packages"])
    assert judge(json.dumps({"dependencies": [sound, leak]})) == (1, ["ray 2.6.0: CVE-2023-48022, fixed in no version yet"])
    code, lines = judge(json.dumps({"dependencies": [sound, unknown]}))
    assert code == 2 and "1 of 2 packages could not be looked up (wrapt)" in lines[-1]
    assert judge("", "Traceback\nConnectionError: no route") == (
        2,
        ["audit: pip-audit failed, nothing is known: ConnectionError: no route"],
    )
