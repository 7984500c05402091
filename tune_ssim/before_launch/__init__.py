"""Is the set-up sound, and how hard does each setting push: preflight, calibration, forecast."""
