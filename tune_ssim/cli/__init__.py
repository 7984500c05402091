"""The command line: verbs, tables, live progress, exit codes."""

from tune_ssim.cli.app import main

__all__ = ["main"]
