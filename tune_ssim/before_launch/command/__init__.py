"""Preflight and calibration of a command, from a few short starts with its updates held off."""
