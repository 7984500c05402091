"""A trial: a training watched by guards, its checkpoints and quarantine."""
