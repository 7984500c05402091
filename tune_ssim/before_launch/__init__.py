"""Checks before launch: preflight tests the set-up; calibration and forecast predict how hard each setting pushes."""
