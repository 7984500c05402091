"""Lets `python -m tune_ssim` run the `tune-ssim` command."""

from tune_ssim.cli.app import main

if __name__ == "__main__":
    main()
