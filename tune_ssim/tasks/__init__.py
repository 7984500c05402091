"""Bundled trainings and their weights."""
