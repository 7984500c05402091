"""Observes a program's own processes from outside, by environment alone. `inside/` is loaded there; the rest is for its parent."""

from tune_ssim.probes.observer.events import EventReader, Observation
from tune_ssim.probes.observer.launch import observed_environment

__all__ = ["EventReader", "Observation", "observed_environment"]
