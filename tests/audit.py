"""Known vulnerabilities of the versions in constraints.txt, by pip-audit: `make audit`.

It is installed into a temporary folder, from the package index, and asks PyPI's advisory database. Exit code 1: a version has a
known vulnerability. Exit code 2: a version could not be looked up, so that nothing is known.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]


def audit() -> tuple[str, str]:
    """What pip-audit prints to its two outputs."""
    with tempfile.TemporaryDirectory(prefix="tune-ssim-audit-") as folder:
        venv.create(folder, with_pip=True)
        subprocess.run([f"{folder}/bin/pip", "install", "--quiet", "pip-audit"], check=True)
        command = [f"{folder}/bin/pip-audit", *OPTIONS, "--requirement", str(ROOT / "constraints.txt")]
        done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout, done.stderr


def judge(found: str, errors: str = "") -> tuple[int, list[str]]:
    """The exit code and the lines to print. found: pip-audit's JSON; empty if it failed."""
    try:
        packages: list[dict[str, Any]] = json.loads(found)["dependencies"]
    except (ValueError, KeyError):
        last = errors.strip().splitlines()[-1:] or ["pip-audit printed nothing"]
        return 2, [f"audit: pip-audit failed, nothing is known: {last[0]}"]
    lines = [
        f"{package['name']} {package['version']}: {one['id']}, fixed in {', '.join(one['fix_versions']) or 'no version yet'}"
        for package in packages
        for one in package.get("vulns", [])
    ]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    if skipped:
        names = ", ".join(skipped[:3]) + (", …" if len(skipped) > 3 else "")
        text = f"audit: {len(skipped)} of {len(packages)} packages could not be looked up ({names}), nothing is known of them:"
        return 2, [*lines, f"{text} PyPI's advisory database cannot be reached (a mirror may lack it)"]
    return (1, lines) if lines else (0, [f"audit: no known vulnerability in {len(packages)} packages"])


def main() -> int:
    code, lines = judge(*audit())
    print(*lines, sep="\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
