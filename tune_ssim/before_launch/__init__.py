"""Preflight, calibration and forecast: whether the set-up is sound, and how hard each setting pushes."""
