"""Trainings that are commands, or functions run in a process of their own."""
