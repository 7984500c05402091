"""Trials: a training run watched by guards, its checkpoints, and the quarantine."""
