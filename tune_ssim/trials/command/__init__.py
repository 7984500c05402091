"""Trainings run as commands, or as functions in a separate process."""
