"""Runs "module:function" as a program: `python -m tune_ssim.trials.command.call_function my_pkg.train:main`."""

from __future__ import annotations

import importlib
import sys


def main() -> None:
    module_name, _, name = sys.argv[1].partition(":")
    getattr(importlib.import_module(module_name), name)()


if __name__ == "__main__":
    main()
