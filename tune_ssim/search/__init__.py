"""Search algorithms: baseline first, staged, Optuna, confirm."""
